"""The routers of a mixture of experts: their load-balancing loss, and what is logged of them."""

from typing import Any

import torch
from torch import Tensor, nn

from lrmc_ray.errors import ConfigError
from lrmc_ray.method.load_balance import balance_loss, busiest_load, expert_counts
from lrmc_ray.method.microbatch import MicroBatch
from lrmc_ray.method.workers import WorkerGroup
from lrmc_ray.models.parts import body_of


class Routers:
    """Sees what the routers of a model say in the last forward pass; nothing without experts."""

    def __init__(self, model: Any, weight: float) -> None:
        """Watch ``model``.

        Args:
            model: a causal LM.
            weight: of the load-balancing loss, 0 for none.

        Raises:
            ConfigError: there is a weight, and no router that transformers knows as one.
        """
        self.weight = weight
        found = routers_of(model)
        config = model.config.get_text_config()
        self._top_k = int(getattr(config, "num_experts_per_tok", None) or 1)
        self._logits: list[Tensor] = []
        self._chosen: list[Tensor | None] = []
        self._is_watching = False
        self.is_mixture = bool(found)
        """Whether the model has routers."""
        self._counts: list[Tensor] = []
        """Of each layer since the last report, float32 [E]."""
        if weight and not found:
            raise ConfigError(
                f"train.router_loss must be 0 for a {model.config.model_type} model, which has no "
                f"experts whose routers transformers shows, got {weight}; set it to 0"
            )
        if found:
            body_of(model).register_forward_pre_hook(self._begin)
        for router, index in found:
            router.register_forward_hook(
                lambda _module, _args, output, index=index: self._see(output, index)
            )

    def loss(self, batch: MicroBatch) -> Tensor | None:
        """The weighted loss of the forward pass over ``batch``, which must be the last one.

        None without a weight. What the routers chose is counted.

        Raises:
            ConfigError: there is a weight, and the batch was not run in one pass.
        """
        logits, chosen = self._logits, self._chosen
        self._logits, self._chosen, self._is_watching = [], [], False
        if not logits:
            return None
        is_token_X = batch.is_token_BT.reshape(-1)
        if len(logits[0]) != len(is_token_X):  # rows of both sides of a rotary border ran apart
            if self.weight:
                raise ConfigError(
                    "train.router_loss must be 0 where samples of one batch are on both sides of "
                    f"the length at which the model's rotary frequencies change, got {self.weight}"
                )
            return None
        with torch.no_grad():
            self._count(logits, chosen, is_token_X)
        if not self.weight:
            return None
        return self.weight * balance_loss(logits, is_token_X, top_k=self._top_k)

    def report(self, group: WorkerGroup) -> dict[str, float]:
        """Load of the busiest experts since the last report, over all workers, under its name."""
        if not self.is_mixture:
            return {}
        own = torch.stack(self._counts) if self._counts else None
        shapes = group.gather(None if own is None else (tuple(own.shape), str(own.device)))
        shape = next((found[0] for found in shapes if found is not None), None)
        if shape is None:
            return {}
        if own is None:
            own = torch.zeros(shape)
        own = own.cpu()
        together = torch.stack(group.gather(own)).sum(0) if group.world_size > 1 else own
        self._counts = []
        return {"train/busiest_expert": busiest_load(together)}

    def _begin(self, *_: Any) -> None:
        self._logits, self._chosen, self._is_watching = [], [], True

    def _see(self, output: Any, index: int) -> None:
        if not self._is_watching:
            return  # a layer that is computed again
        parts = output if isinstance(output, (tuple, list)) else (output,)
        logits = parts[index]
        self._logits.append(logits.reshape(-1, logits.shape[-1]))
        whole = [
            p for p in parts if isinstance(p, Tensor) and p.dtype in (torch.int32, torch.int64)
        ]
        self._chosen.append(whole[0].reshape(-1, whole[0].shape[-1]) if whole else None)

    def _count(self, logits: list[Tensor], chosen: list[Tensor | None], is_token_X: Tensor) -> None:
        counts = []
        for logits_XU, own in zip(logits, chosen, strict=True):
            chosen_XK = logits_XU.topk(self._top_k, dim=-1).indices if own is None else own
            counts.append(expert_counts(chosen_XK, logits_XU.shape[-1], is_token_X))
        if self._counts:
            counts = [one + other for one, other in zip(self._counts, counts, strict=True)]
        self._counts = counts


def routers_of(model: Any) -> list[tuple[nn.Module, int]]:
    """The modules whose outputs transformers calls router logits, and where in the output."""
    recorders = []
    for part in model.modules():
        recorder = (getattr(part, "_can_record_outputs", None) or {}).get("router_logits")
        if recorder is not None and hasattr(recorder, "target_class"):
            recorders.append(recorder)
    found: dict[int, tuple[nn.Module, int]] = {}
    for name, module in model.named_modules():
        for recorder in recorders:
            if isinstance(module, recorder.target_class) and (
                not recorder.layer_name or recorder.layer_name in name
            ):
                found[id(module)] = (module, recorder.index)
    return list(found.values())
