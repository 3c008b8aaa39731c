"""A record of the samples that a search uses: the same candidates, and no others are read."""

import pytest
import torch

from lrmc_ray.config import load_settings
from lrmc_ray.files.artifacts import read_manifest
from lrmc_ray.record import identity as identity_module
from lrmc_ray.record import prepare as prepare_module
from lrmc_ray.record import run as record_run
from lrmc_ray.record.actors import Recorder, recorder_options
from lrmc_ray.record.inspect import shown_samples
from lrmc_ray.record.prepare import prepare, record_name
from lrmc_ray.record.reader import Records
from lrmc_ray.record.run import record
from lrmc_ray.record.used import UsedSamples, shards_with
from tests.support.tiny import make_data

torch.set_num_threads(1)

CHOSEN = [1, 2, 5, 11, 29]


def actors_here(prepared, shards, tokenizer_size):
    recorder = Recorder(**recorder_options(prepared, tokenizer_size))
    for shard in shards:
        yield recorder.record(shard)


@pytest.fixture(scope="module")
def settings(tiny_model, tmp_path_factory):
    data = make_data(tmp_path_factory.mktemp("data") / "train.jsonl", num_rows=30)
    return load_settings(None, [f'model.name="{tiny_model}"', f'data.train="{data}"'])


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    monkeypatch.setattr(record_run, "run_actors", actors_here)
    monkeypatch.setattr(prepare_module, "SMALLEST_SHARD_TOKENS", 60)


def used(asked=None, chosen=CHOSEN):
    def choose(domains):
        if asked is not None:
            asked.append(list(domains))
        return set(chosen)

    return UsedSamples({"places": len(chosen)}, choose)


def equal(one, other) -> bool:
    sets, others = one.candidates, other.candidates
    return (
        torch.equal(one.positions_P, other.positions_P)
        and torch.equal(one.is_supervised_P, other.is_supervised_P)
        and torch.equal(sets.offsets, others.offsets)
        and torch.equal(sets.token_ids, others.token_ids)
        # Other samples are computed beside it, so the last bit of float16 may differ.
        and torch.allclose(sets.logprobs.float(), others.logprobs.float(), rtol=2e-3, atol=1e-6)
    )


def test_used_samples_are_recorded_as_in_a_record_of_all(settings, tmp_path):
    asked: list[list[str]] = []
    everything = Records(record(settings, tmp_path / "all"))
    some = Records(record(settings, tmp_path / "some", used(asked)))
    assert asked == [[""] * 30]
    assert len(some) == len(everything) == 30
    tokens = sum(len(some[index].input_ids_T) for index in CHOSEN)
    assert 1 < len(some.parts) <= tokens / 60 + 2 < len(everything.parts)
    for index in range(30):
        here, there = some[index], everything[index]
        assert here.sample_id == there.sample_id
        assert torch.equal(here.input_ids_T, there.input_ids_T)
        assert len(there.positions_P) == len(there.input_ids_T) - 1
        if index in CHOSEN:
            assert equal(here, there)
        else:
            assert len(here.positions_P) == here.candidates.num_rows == 0
    summary = read_manifest(some.directory, made_by="")["summary"]
    assert (summary["samples"], summary["recorded_samples"]) == (30, 5)
    supervised = [int(everything[index].is_supervised_P.sum()) for index in CHOSEN]
    assert summary["supervised_positions"] == sum(supervised)
    assert "recorded_samples" not in read_manifest(everything.directory, made_by="")["summary"]


def test_the_model_sees_no_other_sample(settings, tmp_path, monkeypatch, capsys):
    seen: list[str] = []

    class Watched(Recorder):
        def __init__(self, **options):
            super().__init__(**options)
            forward = self._recorder._forward

            def counted(rows):
                seen.extend(row["sample_id"] for row in rows)
                return forward(rows)

            self._recorder._forward = counted  # type: ignore[method-assign]

    def watched(prepared, shards, tokenizer_size):
        recorder = Watched(**recorder_options(prepared, tokenizer_size))
        yield from map(recorder.record, shards)

    monkeypatch.setattr(record_run, "run_actors", watched)
    records = Records(record(settings, tmp_path, used()))
    assert sorted(seen) == sorted(records[index].sample_id for index in CHOSEN)
    assert "Recording: 5/5 samples" in capsys.readouterr().err


def test_it_is_another_record_than_that_of_all_and_of_other_samples(settings, tmp_path):
    some = record(settings, tmp_path, used())
    other = record(settings, tmp_path, used(chosen=[0, 3]))
    assert some.name == record_name(settings, used())
    assert other.name != some.name != record_name(settings)
    assert read_manifest(some, made_by="")["identity"]["samples"] == {"places": 5}
    everything = record(settings, tmp_path)
    assert everything.name == record_name(settings)
    assert "samples" not in read_manifest(everything, made_by="")["identity"]


def test_a_record_of_all_serves_and_a_study_keeps_the_record_it_began_with(settings, tmp_path):
    everything = record(settings, tmp_path)
    assert record(settings, tmp_path, used()) == everything
    assert len(list((tmp_path / "records").iterdir())) == 1

    begun = tmp_path / "begun"
    some = record(settings, begun, used())
    assert record(settings, begun) != some
    assert record(settings, begun, used()) == some


def test_samples_are_chosen_once_and_survive_an_interruption(settings, tmp_path):
    asked: list[list[str]] = []
    prepared = prepare(settings, tmp_path, used(asked))
    assert prepared.used is not None
    record(settings, tmp_path, used(asked))
    assert len(asked) == 1


def test_recording_once_more_says_why(settings, tmp_path, caplog):
    record(settings, tmp_path, used())
    caplog.clear()
    prepare(settings, tmp_path)
    assert "candidates of the samples of one search alone" in caplog.text
    assert identity_module.why_again(tmp_path / "elsewhere" / "x", {}) is None


def test_shards_say_which_of_their_samples_are_recorded():
    shards = [{"start": 0, "stop": 4}, {"start": 4, "stop": 6}, {"start": 6, "stop": 9}]
    found = shards_with(shards, {8, 0, 3, 6})
    assert [shard["only"] for shard in found] == [[0, 3], [], [0, 2]]
    assert [(shard["start"], shard["stop"]) for shard in found] == [(0, 4), (4, 6), (6, 9)]


def test_inspect_shows_samples_that_have_candidates(settings, tmp_path):
    records = Records(record(settings, tmp_path, used()))
    shown = list(shown_samples(records, 2, None))
    # Of five, those in the middle of two halves.
    assert [s["sample_id"] for s in shown] == [
        records[CHOSEN[1]].sample_id,
        records[CHOSEN[3]].sample_id,
    ]
    assert all(any("k" in token for token in sample["tokens"]) for sample in shown)
