"""What a training did, said from its settings: which loss, which optimizer, which additions."""

from collections.abc import Mapping
from typing import Any

from lrmc_ray.method.names import Loss, OptimizerName

PAPER = "[arXiv 2510.09152](https://arxiv.org/abs/2510.09152)"

_LOSSES: dict[Loss, str] = {
    "restricted": "Logits Replay",
    "full": "the cross-entropy over the whole vocabulary",
    "soft": "the base model's candidates as soft targets",
    "active_only": "the cross-entropy at positions where the base model was not sure",
    "dft": "DFT, the cross-entropy weighted by the model's own probability",
    "kl_to_base": "the cross-entropy and a divergence from the base model",
    "asft": "ASFT, DFT and a divergence from the base model",
    "eaft": "EAFT, the cross-entropy weighted by the model's entropy",
    "flow": "FLOW, the cross-entropy with samples weighted by the base model's loss",
    "frozen_tail": "Logits Replay with the base model's mass outside the candidates",
}
_OPTIMIZERS: dict[OptimizerName, str] = {
    "moclip": "MoClip",
    "adam_atan2": "Adam-atan2",
    "adamw": "AdamW",
    "c_adamw": "C-AdamW",
    "mofo": "MoFO",
    "magma": "Magma",
}


def method_text(train: Mapping[str, Any]) -> str:
    """The method in words: ``Logits Replay and MoClip, with an anchor to the base model``.

    Args:
        train: settings of ``train``, all of them.
    """
    loss, optimizer = _LOSSES[train["loss"]], _OPTIMIZERS[train["optimizer"]]
    additions = []
    if train["loss"] == "restricted" and train.get("tail_samples"):
        additions.append("a sampled tail")
    if train.get("anchor_weight"):
        additions.append("an anchor to the base model")
    if train.get("stm_perplexity"):
        additions.append("tokens left out that surprised the base model")
    if train.get("l2_sp_weight"):
        additions.append("a penalty on the distance from the base's weights")
    if train.get("lora_rank"):
        additions.append(f"adapters of rank {train['lora_rank']}")
    text = f"{loss} and {optimizer}"
    return f"{text}, with {_listed(additions)}" if additions else text


def method_tags(train: Mapping[str, Any]) -> list[str]:
    """Tags of a model that was trained so, as the Hub has them."""
    is_restricted = train["loss"] in ("restricted", "frozen_tail")
    tags = ["logits-replay"] if is_restricted else []
    tags += {"moclip": ["moclip"]}.get(train["optimizer"], [])
    return tags


def is_of_paper(train: Mapping[str, Any]) -> bool:
    """Whether a part of the paper was used."""
    return bool(method_tags(train))


def _listed(parts: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
