import json
import logging
import os
import pickle
import random
import shutil
import zipfile
from typing import Any

import pytest
import torch

from lrmc_ray.errors import DataError
from lrmc_ray.files.artifacts import MANIFEST, file_digest
from lrmc_ray.train.checkpoints import STATE, list_checkpoints, load_newest, save_checkpoint
from tests.support.faults import DAMAGES, flip_a_bit

torch.set_num_threads(1)


def state_of(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {
        "step": step,
        "records": "c2119a7f496c",
        "weights": {"w": torch.randn(40, 30, generator=generator)},
        "moments": [torch.randn(7, generator=generator, dtype=torch.float64), None],
        "half": torch.randn(5, generator=generator).bfloat16(),
    }


def same(left, right) -> bool:
    """Equal bit for bit, tensors with their dtypes."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


@pytest.fixture
def saved(tmp_path):
    for step in (10, 20):
        save_checkpoint(tmp_path, step, state_of(step))
    return tmp_path


def test_the_newest_checkpoint_comes_back_bit_for_bit(saved):
    assert same(load_newest(saved), state_of(20))


def test_none_only_where_there_never_was_a_checkpoint(tmp_path):
    assert load_newest(tmp_path) is None
    assert load_newest(tmp_path / "none") is None


@pytest.mark.parametrize(("keep", "left"), [(1, [40]), (2, [30, 40]), (3, [20, 30, 40])])
def test_only_the_newest_are_kept(tmp_path, keep, left):
    for step in (10, 20, 30, 40):
        path = save_checkpoint(tmp_path, step, state_of(step), keep=keep)
        assert path.name == f"step_{step:08d}"
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step_{s:08d}" for s in left]
    assert sorted(os.listdir(tmp_path)) == [f"step_{s:08d}" for s in left]


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (9, 10, 100):
        save_checkpoint(tmp_path, step, {"step": step}, keep=5)
    assert load_newest(tmp_path) == {"step": 100}


def test_saving_a_step_again_replaces_it(saved):
    save_checkpoint(saved, 20, state_of(21))
    assert same(load_newest(saved), state_of(21))
    assert len(list_checkpoints(saved)) == 2


def check_fallback(directory, caplog):
    with caplog.at_level(logging.WARNING, logger="lrmc_ray"):
        caplog.clear()
        assert same(load_newest(directory), state_of(10))
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "step_00000020" in message
    assert "the one before" in message


@pytest.mark.parametrize("name", [STATE, MANIFEST])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(saved, name, damage, caplog):
    damage(saved / "step_00000020" / name, None)
    check_fallback(saved, caplog)


@pytest.mark.parametrize("name", [STATE, MANIFEST])
def test_every_flipped_bit_is_noticed(saved, name, caplog):
    path = saved / "step_00000020" / name
    good = path.read_bytes()
    for seed in range(60):
        flip_a_bit(path, random.Random(seed))
        check_fallback(saved, caplog)
        path.write_bytes(good)
    assert same(load_newest(saved), state_of(20))


def test_a_checkpoint_under_another_step_is_not_taken(saved, caplog):
    shutil.rmtree(saved / "step_00000020")
    shutil.copytree(saved / "step_00000010", saved / "step_00000020")
    check_fallback(saved, caplog)


@pytest.mark.parametrize("damage", [*DAMAGES, flip_a_bit])
def test_all_damaged_is_an_error_and_never_a_new_start(saved, damage):
    for number, name in enumerate((STATE, MANIFEST)):
        damage(list_checkpoints(saved)[number] / name, random.Random(number))
    with pytest.raises(DataError) as caught:
        load_newest(saved)
    assert caught.value.exit_code == 4
    message = str(caught.value)
    assert message.startswith(f"all 2 checkpoints in {saved} are damaged")
    assert "restore one" in message


def test_what_is_still_being_written_is_ignored(saved):
    shutil.copytree(saved / "step_00000010", saved / "step_00000030.partial")
    (saved / "step_00000040.partial").mkdir()
    (saved / "step_notes").mkdir()
    assert same(load_newest(saved), state_of(20))
    assert len(list_checkpoints(saved)) == 2


def test_leftovers_of_a_killed_save_do_not_stop_the_next(saved):
    (saved / "step_00000030.partial").mkdir()
    (saved / "step_00000030.partial" / STATE).write_bytes(b"torn")
    save_checkpoint(saved, 30, state_of(30))
    assert same(load_newest(saved), state_of(30))
    assert sorted(os.listdir(saved)) == ["step_00000020", "step_00000030"]


def test_a_failed_save_keeps_the_ones_before(saved, monkeypatch):
    def full(_number):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(saved, 30, state_of(30))
    assert same(load_newest(saved), state_of(20))


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("form", ["pickle", "torch", "torch_legacy", "zip"])
def test_no_code_runs_from_a_planted_state(saved, tmp_path_factory, form, caplog):
    """Also where the manifest was made to fit."""
    canary = tmp_path_factory.mktemp("canary") / "fired"
    directory = saved / "step_00000020"
    state = {"step": 20, "payload": Payload(canary)}
    if form == "pickle":
        (directory / STATE).write_bytes(pickle.dumps(state, protocol=2))
    elif form == "zip":
        with zipfile.ZipFile(directory / STATE, "w") as file:
            file.writestr("state/data.pkl", pickle.dumps(state, protocol=2))
            file.writestr("state/version", "3\n")
    else:
        zipped = form == "torch"
        torch.save(state, directory / STATE, _use_new_zipfile_serialization=zipped)
    manifest = {"kind": "checkpoint", "step": 20, "sha256": file_digest(directory / STATE)}
    (directory / MANIFEST).write_text(json.dumps(manifest))
    check_fallback(saved, caplog)
    assert not canary.exists()
    # The payload is live: the unsafe way of loading fires it.
    if form == "torch":
        torch.load(directory / STATE, weights_only=False)
        assert canary.exists()
