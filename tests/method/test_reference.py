"""The reference itself, against values worked by hand and against the definitions."""

import numpy as np
import pytest

from tests.support import reference as ref

LN2 = np.log(2.0)


def random_rows(seed: int, *, tau: float, num_rows: int = 20, vocabulary: int = 50):
    rng = np.random.default_rng(seed)
    logits_NV = rng.normal(scale=2.0, size=(num_rows, vocabulary))
    gold_N = rng.integers(vocabulary, size=num_rows)
    return logits_NV, gold_N, ref.select_candidates(logits_NV, gold_N, tau=tau)


def test_round_down_float16_is_the_largest_not_above():
    x = np.concatenate([-np.logspace(-9, 6, 4000), [0.0, -1.0, -65504.0, 70000.0]])
    rounded = ref.round_down_float16(x)
    assert rounded.dtype == np.float16
    assert (rounded <= x).all()
    with np.errstate(over="ignore"):
        above = np.nextafter(rounded, np.float16(np.inf))
    assert (above.astype(np.float64) > x).all()


def test_candidates_by_hand():
    # Stored: log 0.5 -> -0.69336 (0.49989), log 0.25 -> -1.38672 (0.24989): 0.5 takes two tokens.
    logits_NV = np.log([[0.25, 0.5, 0.125, 0.125]])
    rows = [ref.select_candidates(logits_NV, [2], tau=tau)[0] for tau in (0.4998, 0.5, 0.75, 1.0)]
    assert [row.token_ids.tolist() for row in rows] == [[1, 2], [1, 0, 2], [1, 0, 2], [1, 0, 2, 3]]
    assert rows[1].logprobs.tolist() == pytest.approx([-0.693359375, -1.38671875, -2.080078125])
    capped = ref.select_candidates(logits_NV, [3], tau=1.0, k_max=1)[0]
    assert capped.token_ids.tolist() == [1, 3]
    widened = ref.select_candidates(logits_NV, [1], tau=0.1, k_min=3)[0]
    assert widened.token_ids.tolist() == [1, 0, 2]


@pytest.mark.parametrize("k_max", [1, 5, 1024])
@pytest.mark.parametrize("k_min", [1, 2])
def test_cut_equals_recording_at_the_smaller_tau(k_min, k_max):
    logits_NV, gold_N, _ = random_rows(0, tau=0.5)
    k_min = min(k_min, k_max)
    recorded = ref.select_candidates(logits_NV, gold_N, tau=0.97, k_min=k_min, k_max=k_max)
    for tau in (0.01, 0.3, 0.6, 0.9, 0.97):
        again = ref.select_candidates(logits_NV, gold_N, tau=tau, k_min=k_min, k_max=k_max)
        for a, b in zip(ref.cut(recorded, tau, k_min=k_min), again, strict=True):
            assert a.token_ids.tolist() == b.token_ids.tolist()
            assert a.logprobs.tolist() == b.logprobs.tolist()
            assert a.gold_id == b.gold_id


def test_losses_by_hand():
    logits_NV = np.array([[3.0, 3.0, -1.0]])
    pair = [ref.Row(np.array([0, 1]), ref.round_down_float16([-LN2, -LN2]), 1)]
    assert ref.restricted_loss(logits_NV, pair) == pytest.approx(LN2)
    gradient_NV = ref.restricted_loss_gradient(logits_NV, pair)
    assert gradient_NV == pytest.approx(np.array([[0.5, -0.5, 0]]))
    assert ref.soft_loss(logits_NV, pair) == pytest.approx(0.0, abs=1e-15)
    # Model 3/4 and 1/4 against a base of 1/2 and 1/2: 1/2 log(2/3) + 1/2 log 2.
    skewed_NV = np.log([[3.0, 1.0, 9.0]])
    assert ref.soft_loss(skewed_NV, pair) == pytest.approx(0.5 * np.log(4 / 3))
    # Token 2 at weight 1/3 adds 3 to the normalizer 4, token 0 is in S: log(7 / 1).
    assert ref.tail_loss(skewed_NV, pair, [0, 2], [5.0, 1 / 3]) == pytest.approx(np.log(7))


def test_bias_against_full_cross_entropy_is_twice_the_outside_mass():
    logits_NV, gold_N, rows = random_rows(1, tau=0.8)
    p_NV = np.exp(ref.log_softmax(logits_NV))
    gradient_NV = ref.restricted_loss_gradient(logits_NV, rows)
    rho_N = np.array([1 - p[row.token_ids].sum() for p, row in zip(p_NV, rows, strict=True)])
    assert 0.05 < rho_N.max() <= 0.2
    bias_NV = gradient_NV - (p_NV - np.eye(50)[gold_N])
    assert np.abs(bias_NV).sum(axis=1) == pytest.approx(2 * rho_N)
    gap = ref.full_cross_entropy(logits_NV, gold_N) - ref.restricted_loss(logits_NV, rows)
    assert gap == pytest.approx(-np.log1p(-rho_N).sum())
    for at in [(0, rows[0].gold_id), (3, int(rows[3].token_ids[0]))]:
        nudge = np.zeros_like(logits_NV)
        nudge[at] = 1e-6
        up, down = (ref.restricted_loss(logits_NV + sign * nudge, rows) for sign in (1, -1))
        assert (up - down) / 2e-6 == pytest.approx(gradient_NV[at], abs=1e-8)


def test_whole_vocabulary_as_tail_is_full_cross_entropy():
    logits_NV, gold_N, rows = random_rows(2, tau=0.7)
    full = ref.full_cross_entropy(logits_NV, gold_N)
    assert ref.tail_loss(logits_NV, rows, np.arange(50), np.ones(50)) == pytest.approx(full)


def test_anchor_by_hand():
    row = ref.Row(np.array([0, 1]), np.array([-1.0, -2.0], dtype=np.float16), 0)
    logits_NV = np.log([[2.0, 1.0, 1.0, 7.0]])
    base = np.array([np.exp(-1), np.exp(-2), 1 - np.exp(-1) - np.exp(-2)])
    # Token 2 at weight 5 stands for a mass of 5 outside; token 1 is recorded, so it does not count.
    expected = (base * np.log(base / (np.array([2.0, 1.0, 5.0]) / 8))).sum()
    assert ref.anchor_kl(logits_NV, [row], [2, 1], [5.0, 5.0]) == pytest.approx(expected)
    base, model = base[:2] / base[:2].sum(), np.array([2 / 3, 1 / 3])
    renormalized = (base * np.log(base / model)).sum()
    assert ref.anchor_kl(logits_NV, [row]) == pytest.approx(renormalized)
    assert ref.anchor_kl(logits_NV, [row], [1], [5.0]) == pytest.approx(renormalized)


def cap(gradient, momentum, clip, delta_max, beta1=0.5):
    g, m = np.array(gradient, dtype=float), np.array(momentum, dtype=float)
    return ref.cap_gradient(g, m, beta1=beta1, delta_max=delta_max, clip=clip)


@pytest.mark.parametrize(
    ("clip", "delta_max", "expected"),
    [
        ("none", 30, [0, 2]),
        ("scale", 30, [0, 2 / 3]),
        ("momentum", 30, [0, 1 / np.sqrt(3)]),  # 0.5 (1, 0.577) is 30 degrees from (1, 0)
        ("project", 30, [np.sqrt(3) / 2, 1 / 2]),
        ("rotate", 30, [np.sqrt(3), 1]),
        *[(clip, 90, [0, 2]) for clip in ("scale", "momentum", "project", "rotate")],
    ],
)
def test_cap_by_hand_at_a_right_angle(clip, delta_max, expected):
    assert cap([0, 2], [1, 0], clip, delta_max) == pytest.approx(np.array(expected))


@pytest.mark.parametrize(
    ("clip", "expected"),
    [("scale", [-3, 0]), ("momentum", [-1, 0]), ("project", [0, 0]), ("rotate", [0, 0])],
)
def test_cap_of_an_opposite_gradient(clip, expected):
    assert cap([-4, 0], [1, 0], clip, 135) == pytest.approx(np.array(expected))
    one_element = [-4] if clip in ("project", "rotate") else expected[:1]
    assert cap([-4], [1], clip, 135) == pytest.approx(np.array(one_element))
    assert cap([-4, 0], [1, 0], clip, 180).tolist() == [-4, 0]
    assert cap([-4, 1], [0, 0], clip, 10).tolist() == [-4, 1]
    assert cap([0, 0], [1, 0], clip, 10).tolist() == [0, 0]


def test_projection_drops_what_is_over_90_degrees_beyond_the_cone():
    g = [np.cos(np.radians(140)), np.sin(np.radians(140))]
    assert cap(g, [1, 0], "project", 49).tolist() == [0, 0]
    assert np.linalg.norm(cap(g, [1, 0], "project", 51)) == pytest.approx(np.cos(np.radians(89)))


@pytest.mark.parametrize("delta_max", [5, 30, 60, 89, 90, 91, 120, 150, 175])
def test_momentum_reading_is_the_largest_scale_of_its_definition(delta_max):
    rng = np.random.default_rng(delta_max)
    num_bound = 0
    for _ in range(200):
        m = rng.normal(size=3)
        opposite = rng.random() * -m * rng.choice([1, 10, 100])
        g = opposite + rng.normal(size=3) * rng.choice([0.01, 0.3, 3])
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            turned = ref.angle_deg(0.9 * m + 0.1 * middle * g, m)
            low, high = (middle, high) if turned <= delta_max else (low, middle)
        num_bound += high < 1
        assert cap(g, m, "momentum", delta_max, beta1=0.9) == pytest.approx(low * g, rel=1e-9)
    assert num_bound >= 20


def test_moclip_two_steps_by_hand():
    settings = {"lr": 0.1, "betas": (0.5, 0.75), "weight_decay": 0.5, "delta_max": 30.0}
    settings["atan2_scale"] = 1.27
    gradients = [[3.0, 0.0], [0.0, 4.0]]
    # Step 1: both averages are g and g^2 after correction, so the first element turns 45 degrees.
    first = 2.0 * 0.95 - 0.1 * 1.27 * np.pi / 4
    # Step 2: theta = 90, so "scale" takes a third: m = (0.75, 2/3), v = (27/16, 4).
    m, v = np.array([0.75, 2 / 3]), np.array([27 / 16, 4.0])
    direction = np.arctan2(m / 0.75, np.sqrt(v / (7 / 16)))
    expected = np.array([first, -0.95]) * 0.95 - 0.127 * direction
    result = ref.moclip([2.0, -1.0], gradients, **settings)
    assert result.exp_avg == pytest.approx(m)
    assert result.exp_avg_sq == pytest.approx(v)
    assert result.param == pytest.approx(expected)
    capped = ref.moclip([2.0, -1.0], gradients, second_moment="capped", **settings)
    assert capped.exp_avg_sq == pytest.approx(np.array([27 / 16, 4 / 9]))


def test_global_angle_is_taken_over_all_tensors():
    # Alone, the second tensor turns by 180 degrees; together (3, 4) and (3, -4) are 106.26 apart.
    gradients = [[[[3.0]], [4.0]], [[[3.0]], [-4.0]]]
    parts = ref.moclip_global([[[0.0]], [0.0]], gradients, lr=0.1, betas=(0.5, 0.5))
    factor = 45 / np.degrees(2 * np.arctan2(4, 3))
    assert parts[0].param.shape == (1, 1)
    assert parts[0].exp_avg == pytest.approx(np.array([[0.75 + 1.5 * factor]]))
    assert parts[1].exp_avg == pytest.approx(np.array([1.0 - 2.0 * factor]))
