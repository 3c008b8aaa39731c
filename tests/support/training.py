"""A record made position by position, and runs of one worker without Ray, on the small model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lrmc_ray.chat.answers import Chat
from lrmc_ray.config import TrainSettings
from lrmc_ray.files.artifacts import file_digest, write_manifest
from lrmc_ray.files.names import MODEL
from lrmc_ray.method.microbatch import Sample
from lrmc_ray.method.subsets import select_candidates
from lrmc_ray.method.workers import WorkerGroup
from lrmc_ray.models.loading import load_model, load_tokenizer
from lrmc_ray.record.encode import encode_row
from lrmc_ray.record.rows import Row
from lrmc_ray.record.schema import write_part
from lrmc_ray.train.loop import TrainingRun
from lrmc_ray.train.run_files import LocalRun
from tests.support.faults import Killed

STEPS = 6


def record_of(model_directory, data, directory, *, domain_of=lambda number: "", k_min=2, tau=0.95):
    """What Stage 0 writes, position by position, without Ray."""
    model, chat = load_model(model_directory), Chat(load_tokenizer(model_directory))
    samples = []
    for number, line in enumerate(data.read_text().splitlines()):
        (example,) = encode_row(Row(f"line {number}", json.loads(line)), chat)
        ids_T = torch.tensor(example.input_ids)
        is_supervised_P = torch.tensor(example.is_target[1:])
        with torch.no_grad():
            logits_TV = model(input_ids=ids_T[None]).logits[0, :-1]
        candidates = select_candidates(
            logits_TV,
            ids_T[1:],
            tau=tau,
            k_min=k_min,
            k_max=torch.where(is_supervised_P, 1024, 64),
        )
        samples.append(
            Sample(
                example.sample_id,
                ids_T,
                torch.arange(len(ids_T) - 1),
                is_supervised_P,
                candidates,
                domain_of(number),
            )
        )
    directory.mkdir()
    provenance = {"lrmc.record": "by-hand"}
    write_part(directory / "part-00000.parquet", samples, provenance)
    write_manifest(
        directory,
        {
            "kind": "records",
            "identity": {"k_max": 1024},
            "provenance": provenance,
            "vocabulary_size": 512,
            "files": [
                {
                    "name": "part-00000.parquet",
                    "rows": len(samples),
                    "sha256": file_digest(directory / "part-00000.parquet"),
                }
            ],
        },
    )
    return directory


def settings_of(**changes):
    """Six steps that save a checkpoint after every second one."""
    values = {
        "steps": STEPS,
        "batch_size": 4,
        "micro_batches": 2,
        "checkpoint_every": 2,
        "lr": 1e-3,
        "tau": 0.9,
        "anchor_weight": 0.5,
        "tail_samples": 16,
    }
    return TrainSettings(**(values | changes))


def run_alone(settings, *, record, model, directory=None, files=None, **options):
    """The run of a single worker on the processor, in ``directory`` or with other ``files``."""
    if files is None:
        directory.mkdir(parents=True, exist_ok=True)
        files = LocalRun(Path(directory))
    return TrainingRun(
        settings,
        record=record,
        model_directory=model,
        files=files,
        group=WorkerGroup(),
        device=torch.device("cpu"),
        **options,
    )


def die_behind(run, step):
    """Let ``run`` die behind its step ``step``, before anything of the next one."""
    samples_of_step = run.fresh.samples_of_step

    def samples_or_death(asked):
        if asked > step:
            raise Killed
        return samples_of_step(asked)

    run.fresh.samples_of_step = samples_or_death


def kill_after(run, step):
    """Run until it dies behind its step ``step``."""
    die_behind(run, step)
    with pytest.raises(Killed):
        run.run()


def model_of(directory):
    """The weights of an exported model."""
    return load_file(directory / MODEL / "model.safetensors")


def assert_same(one, other):
    """Two models are the same to the last bit."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
