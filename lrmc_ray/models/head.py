"""The output head of a model: as its configuration has it, and checked against its logits."""

from typing import TYPE_CHECKING, Any

from lrmc_ray.errors import DataError, first_line
from lrmc_ray.models.borders import text_config
from lrmc_ray.models.causal import check_causal, described, differs
from lrmc_ray.models.forward import hidden_states

if TYPE_CHECKING:
    from lrmc_ray.method.head import OutputHead


_SOFT_CAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")
"""Names under which configurations say the bound on the logits."""


def described_head(model: Any) -> "OutputHead":
    """The output head of a model as its configuration has it; :func:`head_of` checks that.

    Raises:
        DataError: the model has none.
    """
    from lrmc_ray.method.head import OutputHead

    config = text_config(model.config)
    layer = model.get_output_embeddings()
    if layer is None or not hasattr(layer, "weight"):
        raise DataError(f"{described(model)} has no output head; a causal LM is needed")
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    caps = [value for cap in _SOFT_CAPS if (value := getattr(config, cap, None)) is not None]
    return OutputHead(
        weight_VD=layer.weight,
        bias_V=getattr(layer, "bias", None),
        logit_scale=scale,
        softcap=float(caps[0]) if caps else None,
    )


def head_of(model: Any) -> "OutputHead":
    """The output head of a causal model, checked against the model's own logits.

    Raises:
        DataError: the model is not causal, or hidden states times head do not give its logits, so
            neither the recorded sets nor the sparse loss would be right.
    """
    import torch

    from lrmc_ray.method.head import head_logits

    name, head = described(model), described_head(model)
    check_causal(model)
    ids_BT = torch.arange(1, 9, device=head.weight_VD.device)[None] % head.vocabulary_size
    was_training = model.training
    model.eval()  # dropout would make two forward passes differ
    try:
        with torch.no_grad():
            expected_TV = model(input_ids=ids_BT, use_cache=False).logits[0]
            hidden_TD = hidden_states(model, ids_BT)[0].to(head.weight_VD.device)
            actual_TV = head_logits(hidden_TD, head)
        difference = differs(model, expected_TV, actual_TV)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"the body of {name} does not give hidden states for its head: {first_line(error)}; "
            "choose another model"
        ) from error
    finally:
        model.train(was_training)
    if difference is not None:
        raise DataError(
            f"the head of {name} is not supported: logits made from its hidden states differ from "
            f"its own by {difference:.2g} of their spread; choose another model"
        )
    return head
