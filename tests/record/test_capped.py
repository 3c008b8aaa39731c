"""Whether tau decides what is recorded, or the cap."""

import pytest

from lrmc_ray.record.capped import MOST_CAPPED, capped_text


@pytest.mark.parametrize("share", [0.0, 0.05, MOST_CAPPED])
def test_a_cap_that_is_rarely_reached_is_not_spoken_of(share):
    assert capped_text(share, 1024) is None


def test_without_a_measurement_twice_as_many_are_advised():
    text = capped_text(0.63, 64)
    assert text.startswith("63 % of the learned positions are cut short")
    assert "record.k_max = 64" in text
    assert "record.k_max=128" in text
    assert "lrmc plan" in text


def test_a_measured_number_is_named():
    text = capped_text(0.63, 64, needed=512)
    assert "record.k_max=512 would do for all but 10 % of them" in text
    assert "128" not in text
