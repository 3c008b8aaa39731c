"""MoClip's steps by the kernels of a GPU against the plain ones; without a GPU, interpreted."""

import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from lrmc_ray.method.angle_cap import cap_angle
from lrmc_ray.method.fast import chunk_table, moclip_kernel, moclip_launch, moclip_update
from lrmc_ray.method.fast.moclip_kernel import StepScalars
from lrmc_ray.method.fast.moclip_update import FastMoClip, foreach_dot_products, foreach_update_
from lrmc_ray.method.moclip import MoClip
from lrmc_ray.method.stochastic_rounding import FIRST, GOLDEN, SECOND, round_to_bf16
from tests.support.moclip_paths import CAPS, CLIPS, leaning_gradients, random
from tests.support.operators import Launches

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl: Any = pytest.importorskip("triton.language")
moclip_triton: Any = pytest.importorskip("lrmc_ray.method.fast.moclip_triton")

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's

from lrmc_ray.method.fast.moclip_triton import arccosine, capped_gradient  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(50, 101), (5, 3), (1,), (), (0, 4), (1024,)]
FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def _by_kernels(monkeypatch):
    """Short chunks, so that some tensors have several; and nothing left to torch's operators."""
    monkeypatch.setattr(chunk_table, "CHUNK", 2048)
    monkeypatch.setattr(moclip_launch, "runs_on", lambda device: True)

    def refuse(*args):
        raise AssertionError("a tensor went through torch's operators")

    monkeypatch.setattr(moclip_update, "foreach_update_", refuse)
    monkeypatch.setattr(moclip_update, "foreach_dot_products", refuse)


def steps(kind, dtype, device, *, num=4, groups=1, **options) -> MoClip:
    """The third gradient of every tensor is an outlier, on which every reading of the cap binds."""
    params = [
        torch.nn.Parameter(random(*shape, seed=i).to(dtype).to(device))
        for i, shape in enumerate(SHAPES)
    ]
    parts: list[dict[str, Any]] = [{"params": params[place::groups]} for place in range(groups)]
    parts[-1]["lr"] = 0.02
    options = {"weight_decay": 0.1, "delta_max": 60.0, **options}
    optimizer = kind(parts, lr=0.01, **options)
    gradients = [leaning_gradients(*s, num=num, seed=i) for i, s in enumerate(SHAPES)]
    for step in range(num):
        for place, (param, of_tensor) in enumerate(zip(params, gradients, strict=True)):
            gradient = of_tensor[step] * (-30 if step == 2 else 1)
            # One tensor has its first gradient later than the others.
            param.grad = None
            if place != 1 or step:
                param.grad = gradient.reshape(param.shape).to(dtype).to(device)
        optimizer.step()
    return optimizer


def values_of(optimizer) -> list[Tensor]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = [optimizer.state[p][name] for p in params for name in ("exp_avg", "exp_avg_sq")]
    return [x.detach().cpu() for x in (*params, *states)]


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("angle", ["tensor", "global"])
def test_steps_are_the_plain_ones_in_float64_up_to_rounding(clip, angle):
    options = {"clip": clip, "angle": angle, "groups": 2}
    options["second_moment"] = "capped" if clip in ("rotate", "cautious") else "raw"
    ours = steps(FastMoClip, FLOAT, DEVICE, **options)
    theirs = steps(MoClip, torch.float64, "cpu", **options)
    for our, their in zip(values_of(ours), values_of(theirs), strict=True):
        assert our.dtype == FLOAT
        # Of the outlier's momentum, a sum of large terms that cancel, the error is absolute.
        largest = float(their.abs().max()) if their.numel() else 0.0
        torch.testing.assert_close(our.double(), their, rtol=4e-6, atol=4e-7 * largest)
    counted, expected = ours.angle_statistics(), theirs.angle_statistics()
    assert counted.histogram == expected.histogram
    assert counted.clipped_share == expected.clipped_share or clip == "none"
    assert clip == "none" or counted.clipped_share > 0


@pytest.mark.parametrize("dtype", [BRAIN, HALF], ids=str)
@pytest.mark.parametrize("clip", ["cautious", "project"])
def test_half_precision_weights_have_float32_moments_and_are_rounded_once(clip, dtype):
    ours = steps(FastMoClip, dtype, DEVICE, clip=clip)
    theirs = steps(MoClip, dtype, "cpu", clip=clip)
    number = len(SHAPES)
    for place, (our, their) in enumerate(zip(values_of(ours), values_of(theirs), strict=True)):
        assert our.dtype == their.dtype == (dtype if place < number else FLOAT)
        if place < number:
            # Beside a border of rounding the last bit of few weights may differ.
            assert (our != their).sum() <= our.numel() // 200
            limit = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
            torch.testing.assert_close(our.float(), their.float(), **limit)
        else:
            largest = float(their.abs().max()) if their.numel() else 0.0
            torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("clip", ["cautious", "project"])
def test_bf16_moments_are_rounded_by_the_same_bits_as_the_plain_ones(clip):
    options = {"clip": clip, "state_dtype": BRAIN, "num": 3}
    ours = values_of(steps(FastMoClip, FLOAT, DEVICE, **options))
    theirs = values_of(steps(MoClip, FLOAT, "cpu", **options))
    for place, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        if place < len(SHAPES):
            torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-4)
        else:
            assert our.dtype == their.dtype == BRAIN
            # One moment in some thousand lies beside the border that its bits set.
            assert (our != their).sum() <= our.numel() // 500


def test_two_runs_give_the_same_bits():
    first, second = (values_of(steps(FastMoClip, FLOAT, DEVICE, num=3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("is_global", [False, True])
def test_sums_are_exact_to_float64_and_few(is_global, monkeypatch):
    monkeypatch.setattr(moclip_launch, "MOST_SPANS", 5)
    monkeypatch.setattr(moclip_launch, "TOGETHER", 2)
    sizes = (5, 1, 2048, 2049, 70_000)
    updates, expected = [], []
    for row, n in enumerate(sizes):
        grad, momentum = (random(n, seed=n + i, dtype=FLOAT).to(DEVICE) for i in (0, 1))
        if n == 1:
            grad = grad.bfloat16()
        scalars = StepScalars(*[0.5] * 6)
        tensors = (momentum, grad, momentum, momentum)
        updates.append(
            moclip_launch.Update(
                row, tensors, scalars, 0, "scale", 1.0, 0.9, is_global, False, False
            )
        )
        g, m = grad.double().cpu(), momentum.double().cpu()
        expected.append(torch.stack((g.dot(g), g.dot(m), m.dot(m), torch.tensor(n).double())))
    launches = moclip_launch.Launches()
    found = launches._partial(updates, DEVICE, is_reduced=False)
    numbers = [end - begin for _, (begin, end) in sorted(found.bounds.items())]
    assert numbers == ([6] * 5 if is_global else [1, 1, 1, 2, 5])  # the one of bf16 is apart
    for update, of_tensor in zip(updates, expected, strict=True):
        begin, end = found.bounds[update.row]
        total = sum(expected) if is_global else of_tensor
        scale = float((total[0] * total[2]).sqrt())
        our = found.sums_P4[begin:end].cpu().sum(0)
        torch.testing.assert_close(our, total, rtol=1e-13, atol=1e-14 * scale)
    if not is_global:
        sums: list[Tensor] = []
        reduced = launches._reduced(updates, found, 7, 0, lambda dots: sums.append(dots.clone()))
        assert reduced.is_reduced
        assert not sums[0][5:].any()
        for our, of_tensor in zip(sums[0].cpu(), expected, strict=False):
            scale = float((of_tensor[0] * of_tensor[2]).sqrt())
            torch.testing.assert_close(our, of_tensor, rtol=1e-13, atol=1e-14 * scale)


@pytest.mark.parametrize("angle", ["tensor", "global"])
@pytest.mark.parametrize("clip", CLIPS)
def test_a_step_is_two_launches_and_nothing_of_torch(clip, angle, monkeypatch):
    """Of two groups; one launch without a cap, a third where workers add up between."""
    for name in ("chunk_dots", "add_spans", "chunk_update"):
        monkeypatch.setattr(moclip_triton, name, Launches.kernel(name))
    params = [torch.nn.Parameter(torch.ones(n, device=DEVICE)) for n in (4, 3000, 5)]
    parts = [{"params": params[:1], "lr": 0.2, "betas": (0.5, 0.9)}, {"params": params[1:]}]
    optimizer = FastMoClip(parts, lr=0.1, clip=clip, angle=angle)
    cap = {} if clip == "none" else {"chunk_dots": 1}
    host = {"add_": len(params), "lift_fresh": 1}  # counts of steps, and the numbers of this one
    for step in range(3):
        for param in params:
            param.grad = torch.full_like(param, 1.0 + step)
        with Launches() as found:
            optimizer.step()
    calls = {name: n for name, n in found.calls.items() if name not in host}
    assert calls == {**cap, "chunk_update": 1}
    assert found.calls["add_"] == len(params)
    optimizer.reduce_dots = lambda dots: None
    for _ in range(2):  # the first one makes its tables
        with Launches() as found:
            optimizer.step()
    calls = {name: n for name, n in found.calls.items() if name not in host}
    between = {} if clip == "none" else {"add_spans": 1, "zeros": 1}
    assert calls == {**cap, **between, "chunk_update": 1}


@triton.jit
def _arccosine(source, target):
    places = tl.arange(0, 4096)
    tl.store(target + places, arccosine(tl.load(source + places)))


@triton.jit
def _capped(sums, numbers, found, CLIP: tl.constexpr):
    row = tl.program_id(0)
    p, q, theta = capped_gradient(tl.load(sums + row * 4 + tl.arange(0, 4)), numbers, CLIP)
    tl.store(found + row * 3, p)
    tl.store(found + row * 3 + 1, q)
    tl.store(found + row * 3 + 2, theta)


def test_the_arc_cosine_is_torchs():
    generator = torch.Generator().manual_seed(0)
    near_1 = 1 - 10 ** (-16 * torch.rand(1024, dtype=torch.float64, generator=generator))
    inside = 2 * torch.rand(2040, dtype=torch.float64, generator=generator) - 1
    special = torch.tensor([0.0, 1.0, -1.0, 0.5, -0.5, 1e-300, 0.499999, -0.50001]).double()
    values = torch.cat((near_1, -near_1, inside, special)).to(DEVICE)
    found = torch.empty_like(values)
    _arccosine[(1,)](values, found)
    torch.testing.assert_close(found.cpu(), values.cpu().acos(), rtol=4e-16, atol=0)
    assert found[-6] == math.pi
    assert found[-8] == math.pi / 2
    assert found[-7] == 0


@pytest.mark.parametrize("delta_max", [1.0, 60.0, 90.0, 180.0])
@pytest.mark.parametrize("clip", CAPS)
def test_the_cap_is_that_of_torch_in_float64(clip, delta_max):
    """Angles of all sizes, long and short vectors, and where there is none: zeros, NaN, infinity;
    180 degrees exactly; one element."""
    rows = []
    for seed in range(24):
        lengths = 10.0 ** (3 * random(2, seed=seed))
        cosine = float(torch.tanh(2 * random(1, seed=seed + 100)))
        g, m = map(float, lengths)
        rows.append([g * g, g * m * cosine, m * m, 1.0 + seed % 3])
    opposed = [[4.0, -6.0, 9.0, 2.0], [4.0, -6.0, 9.0, 1.0], [4.0, 6.0, 9.0, 5.0]]
    none = [[0.0, 0.0, 9.0, 4.0], [4.0, 0.0, 0.0, 4.0], [0.0] * 4]
    broken = [
        [math.nan, 1.0, 1.0, 4.0],
        [math.inf, math.nan, 1.0, 4.0],
        [math.inf, -math.inf, 1.0, 4.0],
    ]
    right = [[4.0, 0.0, 9.0, 7.0]]
    sums = torch.tensor(rows + opposed + none + broken + right, dtype=torch.float64)
    truth = cap_angle(sums[:, :3], sums[:, 3], delta_max=delta_max, clip=clip, beta1=0.9)
    update = moclip_launch.Update(
        0, (sums,) * 4, StepScalars(*[0.5] * 6), 3, clip, math.radians(delta_max), 0.9,
        False, False, False,
    )  # fmt: skip
    assert len(update.numbers) == moclip_launch.NUMBERS
    numbers = torch.tensor(update.numbers[7:], dtype=torch.float64, device=DEVICE)
    found = torch.empty(len(sums), 3, dtype=torch.float64, device=DEVICE)
    _capped[(len(sums),)](sums.to(DEVICE), numbers, found, clip)
    p_G, q_G, theta_G = found.cpu().unbind(1)
    torch.testing.assert_close(theta_G, truth.theta_G, rtol=1e-15, atol=0, equal_nan=True)
    # Beside the cap a sine is a difference, in torch of angles, here of products.
    torch.testing.assert_close(p_G, truth.p_G, rtol=1e-11, atol=1e-14)
    their_q_G = torch.zeros_like(p_G) if truth.q_G is None else truth.q_G
    torch.testing.assert_close(q_G, their_q_G, rtol=1e-11, atol=1e-14)
    is_changed_G = (p_G != 1) | (q_G != 0)
    assert torch.equal(is_changed_G, truth.is_changed())
    if delta_max == 180:
        assert not is_changed_G.any()
    elif delta_max < 120:
        assert is_changed_G.any()


@pytest.mark.parametrize("clip", CAPS)
def test_180_degrees_are_no_cap_to_the_last_bit(clip):
    ours = steps(FastMoClip, FLOAT, DEVICE, clip=clip, delta_max=180.0, num=2)
    theirs = steps(FastMoClip, FLOAT, DEVICE, clip="none", num=2)
    assert all(torch.equal(a, b) for a, b in zip(values_of(ours), values_of(theirs), strict=True))
    counted = ours.angle_statistics()
    assert counted.num_angles > 0
    assert counted.clipped_share == 0


@pytest.mark.parametrize("angle", ["tensor", "global"])
def test_angles_are_counted_as_the_plain_way_counts_them(angle):
    """Over steps, with two reports, and tensors that come later or have no elements."""
    reports = []
    for kind, dtype, device in ((FastMoClip, FLOAT, DEVICE), (MoClip, torch.float64, "cpu")):
        optimizer = steps(kind, dtype, device, angle=angle, groups=2)
        first = optimizer.angle_statistics()
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.ones_like(param)
        optimizer.step()
        reports.append((first, optimizer.angle_statistics(), optimizer.angle_statistics()))
    for our, their in zip(*reports, strict=True):
        assert our.num_angles == their.num_angles
        assert our.histogram == their.histogram
        assert our.mean_deg == pytest.approx(their.mean_deg, rel=1e-6, nan_ok=True)
        assert our.clipped_share == pytest.approx(their.clipped_share, nan_ok=True)
        assert our.clipped_element_share == pytest.approx(their.clipped_element_share, nan_ok=True)
    assert reports[0][0].num_angles > 0
    assert reports[0][2].num_angles == 0


def test_counts_outlive_a_group_more():
    first, second = (torch.nn.Parameter(torch.ones(3, device=DEVICE)) for _ in range(2))
    optimizer = FastMoClip([first], lr=0.1)
    for _ in range(3):
        first.grad = torch.ones_like(first)
        optimizer.step()
    optimizer.add_param_group({"params": [second]})
    second.grad = torch.ones_like(second)
    optimizer.step()
    assert optimizer.angle_statistics().num_angles == 3  # the first steps have no angle


def test_all_go_by_operators_where_one_has_to(monkeypatch):
    """A transposed parameter; the steps are those of all that do."""
    monkeypatch.setattr(moclip_update, "foreach_update_", foreach_update_)
    monkeypatch.setattr(moclip_update, "foreach_dot_products", foreach_dot_products)
    monkeypatch.setattr(moclip_launch.Launches, "step", None)
    monkeypatch.setattr(moclip_kernel, "can_take", lambda *tensors: False)
    param = torch.nn.Parameter(torch.ones(4, 3, device=DEVICE).T)
    other = torch.nn.Parameter(torch.ones(4, device=DEVICE))
    optimizer = FastMoClip([param, other], lr=0.1)
    for x in (param, other):
        x.grad = torch.ones_like(x)
    optimizer.step()
    assert (param < 1).all()
    assert (other < 1).all()


def test_shards_step_as_the_whole_tensor_does():
    """Two shards of one tensor, each with an optimizer whose dot products are summed."""
    start, gradients = random(3000, seed=1, dtype=FLOAT), leaning_gradients(3000, dtype=FLOAT)
    options = {"lr": 0.01, "delta_max": 45.0, "clip": "project"}
    whole = torch.nn.Parameter(start.to(DEVICE))
    reference = FastMoClip([whole], **options)
    places = (slice(0, 1001), slice(1001, 3000))
    params = [torch.nn.Parameter(start[place].clone().to(DEVICE)) for place in places]
    sums: list[Tensor] = []

    def reduce(dots: Tensor) -> None:
        """Both shards' dot products from their gradients and momenta of now."""
        dots.copy_(sums[0])

    optimizers = [FastMoClip([param], **options, reduce_dots=reduce) for param in params]
    for gradient in gradients[:4]:
        whole.grad = gradient.to(DEVICE)
        m = reference.state[whole].get("exp_avg", torch.zeros(3000)).double().cpu()
        g = gradient.double()
        row = torch.stack((g.dot(g), g.dot(m), m.dot(m), torch.tensor(3000.0).double()))
        sums[:] = [row[None].to(DEVICE)]
        reference.step()
        for param, optimizer, place in zip(params, optimizers, places, strict=True):
            param.grad = gradient[place].clone().to(DEVICE)
            optimizer.step()
    torch.testing.assert_close(torch.cat([p.detach() for p in params]), whole.detach())
    assert reference.angle_statistics().clipped_share > 0


def test_local_shards_step_as_the_whole_tensors_do():
    """Uneven shards of three workers, one of them empty: each has its dot products by the kernels,
    the sum over workers comes between both launches. Local tensors of DTensors are such shards."""
    starts = [random(90, 40, seed=1, dtype=FLOAT), random(7, seed=2, dtype=FLOAT)]
    gradients = [leaning_gradients(*x.shape, seed=i, dtype=FLOAT) for i, x in enumerate(starts)]
    bounds = [(0, 61, 61, 90), (0, 4, 6, 7)]
    options = {"lr": 0.01, "delta_max": 45.0, "clip": "project", "weight_decay": 0.1}
    whole = [torch.nn.Parameter(x.clone().to(DEVICE)) for x in starts]
    reference = FastMoClip(whole, **options)
    dots: dict[int, Tensor] = {}
    barrier, turn = threading.Barrier(3), threading.Lock()
    local: dict[int, list[torch.nn.Parameter]] = {}

    def work(rank: int) -> None:
        def reduce(own: Tensor) -> None:
            dots[rank] = own.clone()
            turn.release()
            barrier.wait()
            turn.acquire()
            own.copy_(dots[0] + dots[1] + dots[2])

        rows = [slice(b[rank], b[rank + 1]) for b in bounds]
        params = [
            torch.nn.Parameter(x[r].clone().to(DEVICE)) for x, r in zip(starts, rows, strict=True)
        ]
        optimizer = FastMoClip(params, **options, reduce_dots=reduce)
        for step in range(4):
            for param, of_tensor, r in zip(params, gradients, rows, strict=True):
                param.grad = of_tensor[step][r].clone().to(DEVICE)
            with turn:  # the interpreter runs one kernel at a time
                optimizer.step()
            barrier.wait()
        local[rank] = params

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    for step in range(4):
        for param, of_tensor in zip(whole, gradients, strict=True):
            param.grad = of_tensor[step].to(DEVICE)
        reference.step()
    assert reference.angle_statistics().clipped_share > 0
    for place, param in enumerate(whole):
        together = torch.cat([local[rank][place].detach() for rank in range(3)])
        torch.testing.assert_close(together, param.detach(), rtol=1e-6, atol=1e-8)


def test_tensors_that_move_are_found_again():
    """The table of pointers is kept only while every tensor stays where it is."""
    param = torch.nn.Parameter(torch.zeros(300, device=DEVICE))
    optimizer = FastMoClip([param], lr=0.1)
    kept = []
    for step in range(3):
        param.grad = torch.full((300,), 1.0 + step, device=DEVICE)
        kept.append(param.grad)  # the next gradient lies elsewhere
        param.data = param.data.clone()
        kept.append(param.data)
        before = param.detach().clone()
        optimizer.step()
        assert (param.detach() < before).all()
    expected = 0.1 * (0.1 * (0.9 * (0.9 + 2.0) + 3.0))
    torch.testing.assert_close(
        optimizer.state[param]["exp_avg"], torch.full((300,), expected * 10, device=DEVICE)
    )


def test_tensors_of_no_whole_vectors_are_taken_as_well():
    """A parameter that begins in the middle of a buffer, not at a multiple of 16 bytes."""
    values = random(700, seed=0, dtype=FLOAT)
    results = []
    for offset in (0, 1):
        buffer = torch.zeros(702, device=DEVICE)
        buffer[offset : offset + 700] = values.to(DEVICE)
        param = torch.nn.Parameter(buffer[offset : offset + 700])
        optimizer = FastMoClip([param], lr=0.1, clip="scale")
        for seed in range(3):
            param.grad = random(700, seed=seed, dtype=FLOAT).to(DEVICE)
            optimizer.step()
        assert buffer[700 + offset :].abs().max() == 0
        results.append(param.detach().clone())
    assert torch.equal(*results)


def test_elements_beyond_2_to_the_31_are_found():
    """The last chunk of tensors whose memory is not taken but for that one."""
    start, rest = 2**31, 1500
    size = start + rest
    grad, m, v, w = (torch.empty(size, dtype=BRAIN, device=DEVICE) for _ in range(4))
    parts = [tensor[start:] for tensor in (grad, m, v, w)]
    for seed, part in enumerate(parts):
        part.copy_(random(rest, seed=seed, dtype=FLOAT).abs())
    g, m_part, v_part, w_part = (part.clone() for part in parts)

    def ints(*numbers: int) -> Tensor:
        return torch.tensor(numbers, device=DEVICE)

    dots = torch.empty(1, 4, dtype=torch.float64, device=DEVICE)
    where = (ints(size), ints(0), ints(start))
    kinds = {"CHUNK": 2048, "BLOCK": 1024, "num_warps": 4, "ALIGNED": True}
    moclip_triton.chunk_dots[(1,)](
        ints(grad.data_ptr(), m.data_ptr()), *where, ints(0, 1), dots, *[tl.bfloat16] * 2, **kinds
    )
    expected = torch.stack([(a.double() * b.double()).sum() for a, b in
                            ((g, g), (g, m_part), (m_part, m_part))])  # fmt: skip
    torch.testing.assert_close(dots[0, :3], expected)
    assert dots[0, 3] == rest
    scalars = StepScalars(0.1, 0.01, 1.0, 1.0, 1.0, 0.5)
    update = moclip_launch.Update(
        0, (w, grad, m, v), scalars, 7, "none", 1.0, 0.9, False, False, False
    )
    numbers = torch.tensor(update.numbers, dtype=torch.float64, device=DEVICE)
    moclip_triton.chunk_update[(1,)](
        ints(w.data_ptr(), grad.data_ptr(), m.data_ptr(), v.data_ptr()), *where, ints(0),
        ints(0, 0), dots, numbers, dots, *[tl.bfloat16] * 3, CLIP="none", SEES_CAPPED=False,
        IS_CAUTIOUS=False, IS_REDUCED=False, TOGETHER=16, NUMBERS=moclip_launch.NUMBERS, BINS=36,
        **kinds,
    )  # fmt: skip
    m_new = torch.lerp(m_part.float(), g.float(), 0.1)
    v_new = torch.lerp(v_part.float(), g.float().square(), 0.01)
    w_new = w_part.float() - 0.5 * torch.atan2(m_new, v_new.sqrt())
    torch.testing.assert_close(w[start:], w_new.bfloat16(), rtol=1e-2, atol=1e-4)
    places = torch.arange(start, size, device=DEVICE)
    bits = (places * GOLDEN + 7) & 0xFFFFFFFF
    bits = ((bits ^ (bits >> 16)) * FIRST) & 0xFFFFFFFF
    bits = ((bits ^ (bits >> 13)) * SECOND) & 0xFFFFFFFF
    bits ^= bits >> 16
    for ours, exact, r in ((m, m_new, bits & 0xFFFF), (v, v_new, bits >> 16)):
        assert (ours[start:] != round_to_bf16(exact, r)).sum() <= rest // 200


def test_what_is_on_a_gpu_already_is_not_put_into_pinned_memory():
    """A stand-in for a tensor there: only one of the host can be pinned."""

    class OnGpu:
        device = torch.device("cuda", 0)

        def to(self, device: torch.device) -> tuple[str, torch.device]:
            return "moved", device

    other = torch.device("cuda", 1)
    assert chunk_table.to_device(OnGpu(), other) == ("moved", other)
    assert chunk_table.to_device(torch.ones(2), torch.device("cpu")).tolist() == [1, 1]


def test_a_copy_of_an_optimizer_has_tables_of_its_own():
    param = torch.nn.Parameter(torch.ones(4, device=DEVICE))
    optimizer = FastMoClip([param], lr=0.1)
    param.grad = torch.ones_like(param)
    optimizer.step()
    other = copy.deepcopy(optimizer)
    twin = other.param_groups[0]["params"][0]
    twin.grad = torch.ones_like(twin)
    before = param.detach().clone()
    other.step()
    assert torch.equal(param.detach(), before)
    assert (twin.detach() < before).all()


@triton.jit
def _round(source, target):
    places = tl.arange(0, 4096)
    values = tl.load(source + places)
    tl.store(target + places, narrowed(values, target.dtype.element_ty))


from lrmc_ray.method.fast.rounding_triton import narrowed  # noqa: E402  after the check for Triton


@pytest.mark.parametrize("dtype", [BRAIN, HALF, FLOAT], ids=str)
def test_rounding_is_torchs(dtype):
    """Ties, numbers below the smallest normal one, overflow, both zeros, infinities and NaN."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=generator).int()
    bits[:1024] &= -0x8000  # half of these are ties
    values = bits.view(FLOAT)
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.4e38, -3.4e38, 1e-40]
    values[: len(special)] = torch.tensor(special)
    rounded = torch.empty(4096, dtype=dtype, device=DEVICE)
    _round[(1,)](values.to(DEVICE), rounded)
    rounded, expected = rounded.cpu(), values.to(dtype)
    assert torch.equal(rounded.isnan(), expected.isnan())
    is_number = ~expected.isnan()
    kind = torch.int16 if dtype.itemsize == 2 else torch.int32
    assert torch.equal(rounded[is_number].view(kind), expected[is_number].view(kind))
