"""The router loss in training, against transformers' own, and the load that is logged."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.tiny_models import dynamic_ntk, make
from lrmc_ray.errors import ConfigError
from lrmc_ray.method.losses import LanguageModel, LossSettings
from lrmc_ray.method.microbatch import Sample, divide
from lrmc_ray.method.subsets import CandidateSets
from lrmc_ray.method.training_loop import StepOptions, compute_gradients
from lrmc_ray.method.workers import WorkerGroup
from lrmc_ray.models.head import head_of
from lrmc_ray.train.recompute import Recomputation
from lrmc_ray.train.routers import Routers

LOSS = LossSettings("full", 0, 0.0, seed=0)
WEIGHT = 0.3


def samples():
    """Of unequal lengths, every position supervised."""
    rng = torch.Generator().manual_seed(3)
    made = []
    for n in (12, 9, 5):
        ids = torch.randint(5, 120, (n + 1,), generator=rng)
        gold = ids[1:].int()
        sets = CandidateSets(torch.arange(n + 1), gold, torch.zeros(n).half(), gold)
        is_supervised = torch.ones(n, dtype=torch.bool)
        made.append(Sample(str(n), ids, torch.arange(n), is_supervised, sets))
    return made


def ours(model, *, parts=1, cost=float("inf"), which=False, weight=WEIGHT):
    """Gradients of the training loop, and the load of the busiest expert."""
    recomputation = Recomputation(model.train(), which)
    routers = Routers(model, weight)
    options = StepOptions(num_micro_batches=parts, balance_loss=routers.loss)
    batches = divide(samples(), parts, LOSS.activity, attention_cost=cost)
    language_model = LanguageModel(recomputation.forward, head_of(model))
    parameters = [p for p in model.parameters() if p.requires_grad]
    compute_gradients(language_model, parameters, batches, LOSS, options, WorkerGroup(), step=0)
    assert not routers._logits  # nothing of a layer that was computed again is kept
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return gradients, routers.report(WorkerGroup())


def theirs(model, rows):
    """Gradients of cross-entropy, and transformers' loss with the mask of padding."""
    model.train().zero_grad()
    # The last token predicts nothing, and is not computed.
    inputs = [s.input_ids_T[:-1] for s in rows]
    longest = max(map(len, inputs))
    ids_BT = torch.stack([F.pad(ids_T, (0, longest - len(ids_T))) for ids_T in inputs])
    mask_BT = torch.stack([(torch.arange(longest) < len(ids_T)).long() for ids_T in inputs])
    output = model(input_ids=ids_BT, attention_mask=mask_BT, output_router_logits=True)
    gold = torch.cat([s.input_ids_T[1:] for s in rows])
    nll = F.cross_entropy(output.logits[mask_BT.bool()], gold)
    (nll + WEIGHT * output.aux_loss).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_close(one, other):
    largest = max(float(g.abs().max()) for g in other.values() if g is not None)
    for name, gradient in other.items():
        torch.testing.assert_close(one[name], gradient, atol=1e-5 * largest, rtol=1e-3, msg=name)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe"])
def test_gradients_with_the_router_loss_are_those_of_transformers(model_type):
    expected = theirs(make(model_type), samples())
    found, load = ours(make(model_type))
    assert_close(found, expected)
    without, same_load = ours(make(model_type), weight=0.0)
    router = next(name for name in expected if "router.weight" in name or "gate.weight" in name)
    assert not torch.allclose(found[router], without[router])
    assert load == same_load
    assert 1 < load["train/busiest_expert"] <= 2  # of four experts, two are chosen


def test_micro_batches_count_by_their_tokens():
    """The two shorter samples together, 14 tokens, and the one of 12."""
    long, *short = samples()
    parts = [(14 / 26, theirs(make("mixtral"), short)), (12 / 26, theirs(make("mixtral"), [long]))]
    found, _ = ours(make("mixtral"), parts=2)
    assert_close(found, {n: sum(share * g[n] for share, g in parts) for n in parts[0][1]})


def test_recomputed_layers_are_counted_once():
    expected, load = ours(make("qwen3_moe"))
    found, again = ours(make("qwen3_moe"), which="full")
    assert_close(found, expected)
    assert again == load


def test_packed_micro_batches_have_the_same_load():
    """Nothing is shared here, so every token is there once in both layouts."""
    _, padded = ours(make("qwen3_moe"), parts=2)
    _, packed = ours(make("qwen3_moe"), parts=2, cost=1e-9)
    assert packed["train/busiest_expert"] == pytest.approx(padded["train/busiest_expert"])


def test_a_model_without_experts():
    assert Routers(make("llama"), 0.0).report(WorkerGroup()) == {}
    with pytest.raises(ConfigError, match=r"router_loss must be 0 for a llama model.*got 0\.1"):
        Routers(make("llama"), 0.1)


def test_a_batch_that_runs_in_several_passes_has_no_router_loss():
    """Samples of 12 and 9 tokens have other rotary frequencies than that of 5."""
    options = dynamic_ntk(8)
    with pytest.raises(ConfigError, match=r"router_loss must be 0 .* both sides"):
        ours(make("qwen3_moe", **options))
    _, report = ours(make("qwen3_moe", **options), weight=0.0)
    assert report == {}
