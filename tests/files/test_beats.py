"""Signs of life: when they are given, and where."""

import os

import torch

from lrmc_ray.files import beats
from lrmc_ray.files.beats import PROGRESS, Pauses, beat, beat_with, beating, file_writer
from lrmc_ray.models.loading import load_model


def test_signs_differ_and_are_not_written_more_often_than_asked(monkeypatch):
    now = [100.0]
    written: list[str] = []
    monkeypatch.setattr(beats.time, "monotonic", lambda: now[0])
    beat()  # nobody listens
    with beating(written.append, every=5.0):
        assert len(written) == 1
        for seconds in (1.0, 3.9, 0.2, 0.1, 5.0):
            now[0] += seconds
            beat()
    beat()
    assert len(written) == len(set(written)) == 3
    assert all(sign.split()[0] == str(os.getpid()) for sign in written)


def test_a_sign_that_cannot_be_written_does_not_stop_the_work(tmp_path):
    with beating(file_writer(tmp_path / "gone" / PROGRESS)):
        beat()
    outer, inner = tmp_path / "outer", tmp_path / "inner"
    with beating(file_writer(outer)):
        with beating(file_writer(inner)):
            assert inner.is_file()
        before = outer.read_text()
        beats._beats.next = 0.0
        beat()
        assert outer.read_text() != before


def test_every_forward_pass_is_a_sign(tiny_model):
    model = load_model(tiny_model)
    written: list[str] = []
    beat_with(model)
    ids = torch.tensor([[1, 2, 3]])
    with beating(written.append, every=0.0):
        model(ids)
        model.base_model(ids)
        model.generate(ids, max_new_tokens=3, do_sample=False)
    assert len(written) >= 1 + 1 + 1 + 3


def test_a_pause_that_ended_allows_longer_ones():
    now = [0.0]
    pauses = Pauses(time=beats.OwnTime(lambda: now[0]))
    assert pauses.limit("a") == 1800.0
    pauses.look("a", 1)
    for sign in range(2, 20):
        for _ in range(9):
            now[0] += 10.0
            pauses.look("a", sign)
    assert pauses.limit("a") == 900.0
    assert pauses.limit("b") == 1800.0
    pauses.forget("a")
    assert pauses.limit("a") == 1800.0
