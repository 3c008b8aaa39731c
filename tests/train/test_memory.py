"""The forecast of memory: against closed formulas, and against what autograd keeps of real tensors.

What a whole process takes is measured by ``benchmarks/memory_forecast.py``.
"""

import pytest
import torch

from benchmarks.tiny_models import make, make_config
from lrmc_ray.config import TrainSettings
from lrmc_ray.errors import DataError
from lrmc_ray.models.parts import body_of
from lrmc_ray.train.live_bytes import LiveBytes, counting
from lrmc_ray.train.memory import TrainingMemory, loss_bytes, training_memory
from lrmc_ray.train.recompute import recomputes_layers
from tests.support.cases import rest_is_slow

torch.set_num_threads(1)

LENGTH = 64
ROWS = 2
WIDTH, INNER, HEADS, KEYS, HEAD_WIDTH, LAYERS, VOCABULARY = 64, 160, 4, 2, 16, 3, 512
LLAMA = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEYS,
    "head_dim": HEAD_WIDTH,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
}
QUERIES = HEADS * HEAD_WIDTH
BESIDE = 2 * KEYS * HEAD_WIDTH
LAYER = WIDTH * (QUERIES + BESIDE) + QUERIES * WIDTH + 3 * WIDTH * INNER + 2 * WIDTH
BODY = LAYERS * LAYER + WIDTH


@pytest.fixture
def directory(tmp_path):
    def write(model_type="llama", **options):
        make_config(model_type, **options).save_pretrained(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
        return tmp_path

    return write


def forecast(directory, *, length=LENGTH, **options) -> TrainingMemory:
    settings = {"batch_size": ROWS, "micro_batches": 1, **options}
    workers = settings.pop("workers", 1)
    on_gpu = settings.pop("on_gpu", False)
    train = TrainSettings(**settings)
    return training_memory(directory, train, length=length, workers=workers, on_gpu=on_gpu)


def kept_bytes(model, *, way=None, autocast=False) -> int:
    """What autograd keeps of a forward pass over real tensors, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    if way is not None:
        recomputes_layers(model, way)
    ids_BT = torch.randint(1, 100, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        body_of(model.train())(input_ids=ids_BT, use_cache=False)
    return sum(size for size, _ in kept.values())


def test_storages_are_counted_once_and_while_they_live():
    with LiveBytes() as live:
        one = torch.zeros(1000)
        view = one.view(10, 100)[2:]
        other = torch.zeros(500, dtype=torch.float64)
        assert live.now == live.most == 8000
        del one
        assert live.now == 8000
        del view, other
        assert (live.now, live.most) == (0, 8000)
        live.begin()
        torch.zeros(3, dtype=torch.int8)
        assert (live.now, live.most) == (0, 3)


def test_a_model_that_no_machine_holds_is_counted():
    with counting() as live:
        layer = torch.nn.Linear(2**20, 2**20, bias=False)
        assert live.now == 2**42
        layer(torch.zeros(2, 2**20))
    assert live.most == 2**42 + 2 * 2**23  # input and output


@pytest.mark.parametrize("tied", [True, False])
def test_weights_gradients_and_moments_by_formula(directory, tied):
    memory = forecast(directory(**LLAMA, tie_word_embeddings=tied))
    head = VOCABULARY * WIDTH
    expected = BODY + head * (1 if tied else 2)
    assert memory.parameters == memory.trained == expected
    buffers = 2 * 4 * HEAD_WIDTH // 2  # of the rotary embedding, as it is and as it was
    assert memory.weights == 4 * expected + buffers
    assert memory.gradients == 4 * (expected + head)  # the head's is kept apart
    assert memory.moments == 8 * expected
    assert (memory.copies, memory.step) == (0, 0)
    kept = memory.weights + memory.gradients + memory.moments
    assert memory.total == kept + memory.activations + memory.loss


def test_what_settings_add_and_leave_out(directory):
    where = directory(**LLAMA, tie_word_embeddings=True)
    plain = forecast(where)
    weights = 4 * plain.trained
    assert forecast(where, state_dtype="bf16").moments == plain.moments // 2
    assert forecast(where, reduction="fast").gradients == weights
    assert forecast(where, workers=2).gradients == 2 * weights
    assert forecast(where, loss="frozen_tail").copies == plain.weights
    assert forecast(where, l2_sp_weight=0.1).copies == weights
    assert forecast(where, on_gpu=True).step == 5 * 4 * VOCABULARY * WIDTH
    layers = forecast(where, freeze=("model.embed_tokens.*",))
    assert layers.trained == BODY
    assert layers.gradients == 4 * BODY
    rows = forecast(where, batch_size=4, micro_batches=2)
    assert rows.activations == plain.activations


def test_adapters_are_the_only_weights_with_gradients(directory):
    rank = 4
    memory = forecast(directory(**LLAMA), lora_rank=rank)
    shapes = [(WIDTH, QUERIES), (WIDTH, BESIDE // 2), (WIDTH, BESIDE // 2), (QUERIES, WIDTH)]
    shapes += [(WIDTH, INNER), (WIDTH, INNER), (INNER, WIDTH)]
    assert memory.trained == LAYERS * rank * sum(a + b for a, b in shapes)
    assert memory.gradients == 4 * memory.trained
    assert memory.weights > 4 * (BODY + 2 * VOCABULARY * WIDTH)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "gpt2", "qwen3_moe"])
def test_activations_are_what_autograd_keeps_and_a_little_more(directory, model_type):
    where = directory(model_type)
    kept = kept_bytes(make(model_type))
    found = forecast(where).activations
    logits = 4 * ROWS * LENGTH * 32
    assert kept <= found <= 1.15 * kept + 4 * logits, found / kept


@pytest.mark.parametrize("way", rest_is_slow(["selective", "full"], ["full"]))
def test_less_is_kept_where_it_is_computed_again(directory, way):
    where = directory(**LLAMA)
    plain = forecast(where, gradient_checkpointing=False).activations
    again = forecast(where, gradient_checkpointing=way).activations
    assert again < {"selective": 0.85, "full": 0.6}[way] * plain
    many = forecast(where, length=1024, gradient_checkpointing="auto").activations
    assert many == forecast(where, length=1024, gradient_checkpointing="selective").activations


def test_bf16_keeps_less_of_longer_samples_and_copies_of_weights(directory):
    where = directory(**LLAMA)
    kept = kept_bytes(make("llama", **LLAMA), autocast=True)
    assert kept <= forecast(where, precision="bf16").activations <= 1.25 * kept
    plain = forecast(where).activations
    short = forecast(where, precision="bf16").activations
    assert forecast(where, precision="auto").activations == max(plain, short)
    one, two = (
        forecast(where, length=length, gradient_checkpointing=False).activations
        for length in (512, 1024)
    )
    assert two / one == pytest.approx(2, rel=0.02)


def test_the_loss_takes_what_its_positions_need():
    train = TrainSettings()
    one = loss_bytes(train, 100, 64, 50_000)
    assert one == 100 * (8 * 64 + 20 * 1024 + 40 * 150)
    assert loss_bytes(train.model_copy(update={"tail_samples": 0}), 100, 64, 50_000) == 100 * (
        8 * 64 + 40 * 150
    )
    full = train.model_copy(update={"loss": "full"})
    assert loss_bytes(full, 10, 64, 1000) == 10 * 8 * 64 + 8 * 10 * 1000
    assert loss_bytes(full, 10**6, 64, 1000) == 10**6 * 8 * 64 + 8 * 2**24


def test_a_type_that_looks_at_values_is_refused_by_name(directory):
    with pytest.raises(DataError) as caught:
        forecast(directory("dbrx"))
    begin, _, end = str(caught.value).partition(", got ")
    assert begin == (
        "dbrx must be a type whose passes need no values of tensors for its memory to be forecast"
    )
    assert end.endswith("; train it for one step and look")
    assert "\n" not in end


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
@pytest.mark.parametrize("tied", [True, False])
def test_a_shard_is_of_the_first_workers_rows(directory, workers, tied):
    """By hand: every weight is divided by rows, the longer parts first."""
    place = directory("llama", **LLAMA, tie_word_embeddings=tied)
    found = forecast(place, parallel="shard", reduction="fast", precision="fp32", workers=workers)
    whole = forecast(place, reduction="fast", precision="fp32", workers=workers)

    def rows(number):
        return -(-number // workers)

    layer = rows(QUERIES) * WIDTH + rows(WIDTH) * QUERIES
    layer += rows(BESIDE // 2) * WIDTH * 2 + 2 * rows(INNER) * WIDTH + rows(WIDTH) * INNER
    layer += 2 * rows(WIDTH)
    own = LAYERS * layer + rows(WIDTH) + (2 - tied) * rows(VOCABULARY) * WIDTH
    assert found.gradients == 4 * own
    assert found.moments == 8 * own
    buffers = whole.weights - 4 * whole.parameters
    assert found.weights == 4 * own + buffers
    of_vocabulary = 2 * 4 * VOCABULARY * WIDTH
    if not tied:  # of an embedding by itself, what the tokens look up
        of_vocabulary += 2 * 4 * ROWS * LENGTH * WIDTH
    assert found.gathered == 4 * 4 * LAYER + 4 * LAYER // workers + of_vocabulary
    assert whole.gathered == 0
    for term in ("parameters", "trained", "copies", "activations", "loss"):
        assert getattr(found, term) == getattr(whole, term)
    kept = found.weights + found.gradients + found.moments
    assert found.total == kept + found.gathered + found.activations + found.loss


def test_what_is_offloaded_is_counted_apart(directory):
    place = directory("llama", **LLAMA, tie_word_embeddings=True)
    shards = {"parallel": "shard", "reduction": "fast", "workers": 2, "on_gpu": True}
    plain, found = (forecast(place, offload=name, **shards) for name in ("none", "cpu"))
    own = plain.gradients
    buffers = 2 * 4 * HEAD_WIDTH // 2
    assert plain.host == 3 * own  # weights and two moments, for a checkpoint
    assert found.host == 4 * own + 3 * own
    assert (found.weights, found.gradients, found.moments, found.step) == (buffers, 0, 0, 0)
    for term in ("gathered", "activations", "loss"):
        assert getattr(found, term) == getattr(plain, term)
    assert found.total == buffers + found.gathered + found.activations + found.loss
    beside = forecast(place, offload="cpu", l2_sp_weight=0.1, **shards)
    assert (beside.host, beside.copies) == (8 * own, 0)


def test_layers_are_gathered_in_bf16(directory):
    """By hand: the products in 2 bytes, their sums in 4, and the norms of all layers beside."""
    place = directory("llama", **LLAMA, tie_word_embeddings=True)
    shards = {"parallel": "shard", "reduction": "fast", "workers": 2}
    whole, found = (forecast(place, precision=name, **shards) for name in ("fp32", "bf16"))
    products = LAYER - 2 * WIDTH
    norms = BODY - LAYERS * products
    of_vocabulary = 2 * 4 * VOCABULARY * WIDTH
    assert found.gathered == (3 * 2 + 4) * products + 2 * products + 8 * norms + of_vocabulary
    assert (found.weights, found.moments) == (whole.weights, whole.moments)
    # Autocast would keep a copy of every product's weight for the backward pass.
    copied = forecast(place, precision="bf16", reduction="fast").activations
    assert 0.9 * 2 * LAYERS * products < copied - found.activations <= 2.1 * LAYERS * products


@pytest.mark.parametrize("tied", [True, False])
def test_the_base_beside_shards_is_in_shards_but_for_its_vocabulary(directory, tied):
    place = directory("llama", **LLAMA, tie_word_embeddings=tied)
    shards = {"parallel": "shard", "reduction": "fast", "precision": "fp32", "workers": 3}
    full, beside = (forecast(place, loss=loss, **shards) for loss in ("full", "kl_to_base"))
    assert beside.copies == full.weights
    assert beside.gathered - full.gathered == 4 * (2 - tied) * VOCABULARY * WIDTH


def test_only_rows_that_a_step_touches_are_gathered_without_a_look_at_all_tokens(directory):
    place = directory("llama", **{**LLAMA, "vocab_size": 50_000}, tie_word_embeddings=True)
    shards = {"parallel": "shard", "reduction": "fast", "precision": "fp32", "workers": 2}
    few = {"batch_size": 1, "tail_samples": 32}
    found = forecast(place, length=16, probe_every=0, **few, **shards)
    touched = 16 * 151 + 32
    assert found.gathered == 4 * 4 * LAYER + 2 * LAYER + 2 * 4 * touched * WIDTH
    for looks in ({"probe_every": 5}, {"probe_every": 0, "loss": "full"}):
        everything = forecast(place, length=16, **looks, **few, **shards)
        assert everything.gathered - found.gathered == 2 * 4 * (50_000 - touched) * WIDTH
