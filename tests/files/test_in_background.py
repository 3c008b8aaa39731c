"""One piece of work beside another: its end, its error, and giving it up."""

import threading
import time

import pytest

from lrmc_ray.files.in_background import GivenUpError, InBackground


@pytest.fixture
def background():
    return InBackground()


def test_what_is_started_runs_beside_and_the_next_one_waits_for_it(background):
    may_end, order = threading.Event(), []

    def first():
        may_end.wait(10)
        time.sleep(0.05)
        order.append("first")

    background.start(first)
    assert background.is_busy
    assert order == []
    background.check()  # it has not ended, so there is nothing to say
    assert order == []
    may_end.set()
    background.start(lambda: order.append("second"))
    background.wait()
    assert order == ["first", "second"]
    assert not background.is_busy


@pytest.mark.parametrize("ask", ["wait", "check", "start"])
def test_an_error_is_raised_once_by_whatever_comes_next(background, ask):
    def fail():
        raise OSError(28, "No space left on device")

    background.start(fail)
    while background.is_busy:
        time.sleep(0.001)
    with pytest.raises(OSError, match="No space left"):
        getattr(background, ask)(*([fail] if ask == "start" else []))
    background.wait()


def test_what_was_given_up_commits_nothing(background):
    done, may_go_on = [], threading.Event()

    def work():
        may_go_on.wait(10)
        background.commit(lambda: done.append("committed"))

    background.start(work)
    background.give_up()
    may_go_on.set()
    with pytest.raises(GivenUpError):
        background.wait()
    assert done == []


def test_giving_up_waits_for_what_is_being_committed(background):
    order, is_committing = [], threading.Event()

    def last():
        is_committing.set()
        time.sleep(0.1)
        order.append("committed")

    background.start(lambda: background.commit(last))
    assert is_committing.wait(10)
    background.give_up()
    order.append("given up")
    background.wait()
    assert order == ["committed", "given up"]
