"""Whether a loaded model is causal, tried on a few tokens, before any work is done with it."""

from typing import Any

from lrmc_ray.errors import DataError
from lrmc_ray.models.borders import attention_borders

_TOKENS = 24
_WIDEST_CHUNK = 128
"""Chunks of more tokens are not reached by the trial."""


def differs(model: Any, expected: Any, actual: Any) -> float | None:
    """How much two tensors of logits differ, in units of their spread; None if it is noise.

    In float32 it is the largest difference. In a shorter format rounding sends a token to another
    expert now and then, so it is that of the typical position.

    Args:
        model: that made them; its number format says how much noise there is.
        expected: logits [N, V].
        actual: logits [N, V].
    """
    expected, actual = expected.float(), actual.float()
    scaled_NV = (expected - actual) / expected.std().clamp_min(1e-12)
    if model.dtype.itemsize >= 4:
        difference, tolerance = float(scaled_NV.abs().max()), 3e-3
    else:
        difference, tolerance = float(scaled_NV.square().mean(-1).sqrt().median()), 0.1
    return None if difference <= tolerance else difference


def described(model: Any) -> str:
    """The class and the type of a model, as messages name it."""
    return f"{type(model).__name__} (model_type {model.config.model_type})"


def check_causal(model: Any) -> None:
    """Compare the logits of a sequence with those of its beginning alone.

    Recording, training and scoring all pad on the right and read the logits of every position, so
    that nothing may depend on what follows.

    Raises:
        DataError: earlier logits see later tokens, or the model needs more than token ids.
    """
    import torch

    name = described(model)
    length, beginning = _TOKENS, 2 * _TOKENS // 3
    chunks = [size for size in attention_borders(model.config).chunks if size <= _WIDEST_CHUNK]
    if chunks:  # what a chunk holds may depend on how many there are
        length, beginning = 2 * max(chunks) + _TOKENS, max(chunks) - 4
    found = None
    was_training = model.training
    model.eval()  # dropout would make two forward passes differ
    try:
        # Once in a while rounding sends a token to another expert; not twice.
        for seed in range(2):
            alone_TV, whole_TV = _trial(model, length, beginning, seed=seed)
            if not bool(torch.isfinite(alone_TV).all()):
                raise DataError(
                    f"{name} gives logits that are not finite in {model.dtype}; load it in another "
                    "precision, or choose another model"
                )
            if (found := differs(model, alone_TV, whole_TV)) is None:
                return
    except DataError:
        raise
    except Exception as error:  # whatever an architecture raises that needs more than token ids
        reason = next(iter(str(error).strip().splitlines()), "")
        raise DataError(
            f"{name} does not give logits for token ids alone in {model.dtype} "
            f"({type(error).__name__}: {reason[:200]}); choose a causal language model of text, "
            "or fp32 in place of bf16"
        ) from error
    finally:
        model.train(was_training)
    raise DataError(
        f"{name} is not causal: with more tokens behind them its logits move by {found:.2g} of "
        "their spread; choose a model whose logits see earlier tokens only (of an encoder, "
        "is_decoder = true in its config.json)"
    )


def _trial(model: Any, length: int, beginning: int, *, seed: int) -> tuple[Any, Any]:
    """Logits of a sequence's beginning: alone, and with the rest behind it."""
    import torch

    vocabulary_size = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(vocabulary_size, (1, length), generator=generator).to(model.device)
    with torch.no_grad():
        whole_TV = model(input_ids=ids_BT, use_cache=False).logits[0, :beginning]
        alone_TV = model(input_ids=ids_BT[:, :beginning], use_cache=False).logits[0]
    return alone_TV, whole_TV
