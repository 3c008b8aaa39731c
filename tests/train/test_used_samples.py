"""Which samples a run reads, and training on a record of those alone."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
import torch

from lrmc_ray.errors import DataError
from lrmc_ray.files.artifacts import file_digest, write_manifest
from lrmc_ray.method.microbatch import NO_CANDIDATES
from lrmc_ray.record.reader import Records
from lrmc_ray.record.schema import write_part
from lrmc_ray.train.sample_order import samples_of_step
from lrmc_ray.train.samples import TrainingSamples
from lrmc_ray.train.used import check_used, used_samples
from tests.support.training import assert_same, model_of, run_alone, settings_of

torch.set_num_threads(1)

DOMAINS = [""] * 20


def only(record, directory, used):
    """``record`` without the positions of samples that are not used."""
    shutil.copytree(record, directory)
    manifest = json.loads((directory / "manifest.json").read_text())
    records = Records(record)
    indices = used.choose([records[index].domain for index in range(len(records))])
    samples = []
    for index in range(len(records)):
        sample = records[index]
        if index not in indices:
            none = torch.zeros(0, dtype=torch.int64)
            sample.__dict__.update(
                positions_P=none, is_supervised_P=none.bool(), candidates=NO_CANDIDATES
            )
        samples.append(sample)
    (part,) = manifest["files"]
    write_part(directory / part["name"], samples, manifest["provenance"])
    part["sha256"] = file_digest(directory / part["name"])
    manifest["identity"]["samples"] = dict(used.recipe)
    write_manifest(directory, manifest)
    return directory


def test_the_samples_are_those_of_the_steps():
    settings = settings_of(steps=3, batch_size=4, seed=7)
    expected = {
        index for step in range(3) for index in samples_of_step(20, step, batch_size=4, seed=7)
    }
    assert len(expected) == 12
    assert used_samples(settings, 12).choose(DOMAINS) == expected
    # More places than there are samples: the second epoch has them all.
    assert used_samples(settings, 24).choose(DOMAINS) == set(range(20))


def test_domains_and_held_out_samples_count_as_in_training(recorded, tmp_path):
    settings = settings_of(
        steps=2, batch_size=3, evaluate_every=1, holdout_share=0.2, domain_weights={"": 0.5}
    )
    samples = TrainingSamples(Records(recorded), settings)
    read = {*samples.held_out, *samples.indices_of_step(0), *samples.indices_of_step(1)}
    assert len(samples.held_out) == 4
    assert used_samples(settings, 6).choose(DOMAINS) == read


@pytest.mark.parametrize("changes", [{}, {"evaluate_every": 2, "holdout_share": 0.1}])
def test_training_on_them_alone_ends_in_the_same_bits(tiny_model, recorded, tmp_path, changes):
    settings = settings_of(steps=3, **changes)
    some = only(recorded, tmp_path / "some", used_samples(settings, 12))
    bare = [i for i in range(20) if not len(Records(some)[i].positions_P)]
    assert len(bare) == (6 if changes else 8)
    check_used(some, settings)
    for name, record in (("all", recorded), ("one", some)):
        run_alone(settings, record=record, model=tiny_model, directory=tmp_path / name).run()
    assert_same(model_of(tmp_path / "all"), model_of(tmp_path / "one"))
    assert pq.read_table(some / "part-00000.parquet").num_rows == 20


def test_a_record_of_all_and_a_shorter_run_are_let_through(recorded, tmp_path):
    settings = settings_of(steps=3)
    check_used(recorded, settings_of(seed=5))
    some = only(recorded, tmp_path / "some", used_samples(settings, 12))
    check_used(some, settings_of(steps=2))
    check_used(some, settings_of(steps=6, batch_size=2))
    check_used(some, settings_of(steps=3, loss="flow", flow_temperature=1.0, anchor_weight=0))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"steps": 4}, "places is 12 there, 16 here"),
        ({"batch_size": 5}, "places is 12 there, 15 here"),
        ({"seed": 1}, "seed is 0 there, 1 here"),
        ({"domain_weights": {"": 2.0}}, "domain_weights is {} there, {'': 2.0} here"),
        ({"evaluate_every": 1}, "evaluate_every is False there, True here"),
        ({"loss": "flow", "anchor_weight": 0}, "needs train.flow_temperature"),
    ],
)
def test_a_run_that_reads_others_is_refused(recorded, tmp_path, changes, told):
    some = only(recorded, tmp_path / "some", used_samples(settings_of(steps=3), 12))
    with pytest.raises(DataError) as refused:
        check_used(some, settings_of(**({"steps": 3} | changes)))
    assert told in str(refused.value)
    assert "record all with `python -m lrmc_ray.record`" in str(refused.value)
