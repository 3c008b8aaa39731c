"""What MoClip owes to torch as an optimizer with two moments, apart from its formula.

The state of a parameter is named as that of torch's Adam: ``step`` (0-d float32, on the host),
``exp_avg`` and ``exp_avg_sq``. The moments of half-precision parameters are float32, or all are
bf16 with stochastic rounding.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lrmc_ray.method.stochastic_rounding import rounding_key


class MomentOptimizer(Optimizer):
    """Keeps the moments; a subclass moves the weights in ``take_step``."""

    state_dtype: torch.dtype | None = None
    """Of new moments: bf16, or None for that of the parameter and at least float32."""
    first_elements: Sequence[int] = ()
    """For shards: place of each parameter's first element in its whole tensor."""

    def take_step(self) -> None:
        """Move all parameters that have a gradient; each of them has its state."""
        raise NotImplementedError

    def rounding_keys(self) -> Iterator[list[int]]:
        """Of each parameter of each group in this step, see ``stochastic_rounding``."""
        place = 0
        for group in self.param_groups:
            keys = []
            for param in group["params"]:
                step = self.state[param]["step"].tolist() if param in self.state else 0
                first = self.first_elements[place] if self.first_elements else 0
                keys.append(rounding_key(place, int(step), first))
                place += 1
            yield keys

    def params(self) -> Iterator[Tensor]:
        """The parameters of all groups, in order."""
        return itertools.chain.from_iterable(group["params"] for group in self.param_groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; returns the result of ``closure``.

        Raises:
            TypeError: A gradient is sparse. Nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for param in self.params():
            if param.grad is not None and param.grad.layout != torch.strided:
                raise TypeError(
                    f"MoClip needs dense gradients, got {param.grad.layout} for a parameter of "
                    f"shape {tuple(param.shape)}; build an nn.Embedding with sparse=False"
                )
        for param in self.params():
            if param.grad is not None and not self.state[param]:
                dtype = self.state_dtype or torch.promote_types(param.dtype, torch.float32)
                self.state[param] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(param, dtype=dtype),
                    "exp_avg_sq": torch.zeros_like(param, dtype=dtype),
                }
        self.take_step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a copy of a state; the moments keep the dtype in which they were saved."""
        super().load_state_dict(state_dict)
        # torch casts the moments to the parameter's dtype, float32 ones to bf16, and shares `step`
        # with the optimizer that saved it.
        saved_ids = itertools.chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        for saved_id, param in zip(saved_ids, self.params(), strict=True):
            if saved := state_dict["state"].get(saved_id):
                state = self.state[param]
                state["step"] = saved["step"].to("cpu", copy=True)
                for name in ("exp_avg", "exp_avg_sq"):
                    moment = torch.empty_like(param, dtype=saved[name].dtype, requires_grad=False)
                    state[name] = moment.copy_(saved[name])
