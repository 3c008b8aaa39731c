r"""The operator under the losses: logits of the candidates alone, gradients of the rows they touch.

With hidden states H [N, D], the head's weight W [V, D] and the candidate sets as a CSR pattern::

    z[e] = H[row(e)] . W[token(e)]             a sampled dense-dense product, E dot products
    dH   = sum over a row's entries  of dz[e] W[token(e)]
    dW   = sum over a token's entries of dz[e] H[row(e)]

Neither the logits [N, V] nor a dense gradient [V, D] is made. Time and memory follow E, the
number of entries, instead of N V. Both sums are bags of weighted rows, which
``torch.nn.functional.embedding_bag`` computes; for dW the entries are sorted by token first, and
the finished rows are added to the weight's gradient block by block.

**The weight's gradient goes straight into** ``weight.grad`` (made once, of zeros, where it is
None) when ``backward()`` accumulates into a leaf weight that has no hooks. Every other case gets
an ordinary dense gradient through autograd: a weight computed from others (merged LoRA factors, a
slice), hooks registered on the weight, ``torch.autograd.grad`` and gradcheck. Tied weights work:
the embedding adds its part to the same ``grad``. DistributedDataParallel works as well, since it
reads ``grad`` once all parts have arrived. There is no double backward.
"""

from __future__ import annotations

import itertools
import warnings
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrmc_ray.method.candidate_sets import CandidateSets
from lrmc_ray.method.fast.backend_choice import LossSize, logits_backend
from lrmc_ray.method.fast.dense_product import is_taken_on, picked_products
from lrmc_ray.method.fast.loss_plan import TokenOrder
from lrmc_ray.method.fast.weight_gradient import gradient_target
from lrmc_ray.method.head import OutputHead, head_logits
from lrmc_ray.method.names import LogitsBackend, check_choice

BLOCK_ELEMENTS = 2**19
"""Of a block of weight rows' gradients: 2 MiB in float32, which fits a cache."""

with warnings.catch_warnings():
    # Torch says once per process that CSR tensors are in beta; have it said here, unheard.
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0], [], [], size=(0, 0))


def candidate_logits(
    hidden_ND: Tensor,
    head: OutputHead,
    candidates: CandidateSets,
    *,
    backend: LogitsBackend | Literal["auto"] = "auto",
) -> Tensor:
    """Logits of every candidate.

    Args:
        hidden_ND: [N, D] last hidden states, one row per row of ``candidates``.
        head: The output head; its weight may be tied to the embedding.
        candidates: N candidate sets, on the same device.
        backend: ``"sparse"``: the operator of this module. ``"gather"``: the same by a gathered
            [E, D] copy of the weight, the plain reference. ``"dense"``: all [N, V] logits, then
            the candidates' are picked out; on a GPU see ``dense_product``. ``"auto"``: see
            ``backend_choice``.

    Returns:
        [E], float32 (float64 if an input is float64), in the order of ``candidates.token_ids``.

    Raises:
        ValueError: Unknown backend, or hidden states and candidate sets of different number.
    """
    check_choice("backend", backend, Literal["auto", LogitsBackend])
    if len(hidden_ND) != candidates.num_rows:
        raise ValueError(
            "hidden_ND must have one row per candidate set, got "
            f"{len(hidden_ND)} rows and {candidates.num_rows} sets"
        )
    if backend == "auto":
        size = loss_size(hidden_ND, head, candidates)
        backend = logits_backend(hidden_ND.device.type, size)
    dtype = _compute_dtype(hidden_ND, head.weight_VD)
    logits_E: Tensor
    if backend == "dense" and is_taken_on(hidden_ND.device):
        logits_E = picked_products(
            hidden_ND, head.weight_VD, candidates.row_ids, candidates.token_ids
        )
    elif backend == "dense":
        # Bias, scale and bound come below, as for the others: to the candidates alone.
        products_NV = head_logits(hidden_ND, OutputHead(head.weight_VD), dtype=dtype)
        logits_E = products_NV[candidates.row_ids, candidates.token_ids]
    elif backend == "sparse":
        logits_E = _SampledProduct.apply(  # type: ignore[no-untyped-call]
            hidden_ND, head.weight_VD, candidates
        )
    else:
        hidden_ED = hidden_ND[candidates.row_ids].to(dtype)
        logits_E = (hidden_ED * head.weight_VD[candidates.token_ids].to(dtype)).sum(-1)
    if head.bias_V is not None:
        logits_E = logits_E + head.bias_V[candidates.token_ids]
    return head.shape_logits(logits_E)


def token_logits(hidden_ND: Tensor, head: OutputHead, token_ids_R: Tensor) -> Tensor:
    """[N, R] logits of the same R tokens at every position; else as above.

    Of equal tokens, one at most may have a gradient: on a GPU their rows' sums have no order.
    """
    dtype = _compute_dtype(hidden_ND, head.weight_VD)
    rows_RD = take_rows(head.weight_VD, token_ids_R)
    logits_NR = hidden_ND.to(dtype) @ rows_RD.to(dtype).T
    if head.bias_V is not None:
        logits_NR = logits_NR + head.bias_V[token_ids_R]
    return head.shape_logits(logits_NR)


def take_rows(weight_VD: Tensor, token_ids_R: Tensor) -> Tensor:
    """Rows [R, D] of R tokens as above; their gradient goes where the module says."""
    rows_RD: Tensor = _TakeRows.apply(weight_VD, token_ids_R)  # type: ignore[no-untyped-call]
    return rows_RD


def _compute_dtype(hidden_ND: Tensor, weight_VD: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(hidden_ND.dtype, weight_VD.dtype), torch.float32)


def loss_size(
    hidden_ND: Tensor, head: OutputHead, candidates: CandidateSets, num_tail: int = 0
) -> LossSize:
    """What the choice of a backend depends on; reads no value from a GPU."""
    return LossSize(
        len(hidden_ND),
        hidden_ND.shape[1],
        # Of the whole vocabulary, so that the choice is the same where only some rows are trained.
        head.vocabulary_size,
        candidates.token_ids.numel(),
        head.weight_VD.dtype,
        num_tail,
        None if candidates.plan is None else candidates.plan.longest,
    )


def _bags(rows_XD: Tensor, index: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """One row per bag: ``sum of weights[e] rows[index[e]]`` over the bag's entries."""
    return F.embedding_bag(
        index, rows_XD, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


class _SampledProduct(torch.autograd.Function):
    """``z[e] = hidden[row(e)] . weight[token(e)]`` for the entries e of a CSR pattern."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, sets: CandidateSets) -> Tensor:
        # The leaf itself, beside the saved tensor: checkpointing may unpack a copy of that.
        ctx.weight_VD, ctx.sets, ctx.order = weight_VD, sets, None
        ctx.save_for_backward(hidden_ND, weight_VD)
        dtype = _compute_dtype(hidden_ND, weight_VD)
        rows_XD, columns = _in_dtype(ctx, weight_VD, dtype)
        pattern = torch.sparse_csr_tensor(
            sets.offsets.int(),
            columns,
            torch.zeros(columns.shape, dtype=dtype, device=columns.device),
            size=(len(hidden_ND), len(rows_XD)),
            check_invariants=False,
        )
        product: Tensor = torch.sparse.sampled_addmm(
            pattern, hidden_ND.to(dtype), rows_XD.T, beta=0.0
        )
        return product.values()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_E: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden_ND, weight_VD = ctx.saved_tensors
        gradient_ND = gradient_VD = None
        if ctx.needs_input_grad[0]:
            rows_XD, columns = _in_dtype(ctx, weight_VD, gradient_E.dtype)
            offsets = ctx.sets.offsets.int()
            gradient_ND = _bags(rows_XD, columns, offsets, gradient_E).to(hidden_ND.dtype)
        if ctx.needs_input_grad[1]:
            target_VD, gradient_VD = gradient_target(ctx.weight_VD)
            if target_VD is not None:
                _add_weight_gradient(target_VD, hidden_ND, ctx.sets, _order(ctx), gradient_E)
        return gradient_ND, gradient_VD, None


def _order(ctx: Any) -> TokenOrder:
    """Of the entries by token, made once."""
    if ctx.order is None:
        ctx.order = ctx.sets.token_order()
    found: TokenOrder = ctx.order
    return found


def _in_dtype(ctx: Any, weight_VD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The weight as ``dtype`` and the entries' columns in it; casts no more rows than occur."""
    token_ids = ctx.sets.token_ids
    if weight_VD.dtype == dtype:
        return weight_VD, token_ids
    order = _order(ctx)
    return weight_VD[order.tokens_U(token_ids)].to(dtype), order.columns_E()


def _add_weight_gradient(
    target_VD: Tensor,
    hidden_ND: Tensor,
    sets: CandidateSets,
    order: TokenOrder,
    gradient_E: Tensor,
) -> None:
    """Add ``sum of gradient[e] hidden[row(e)]`` to the rows of the tokens that occur."""
    hidden_ND = hidden_ND.to(gradient_E.dtype)
    gradient_E, tokens_U = gradient_E[order.entries_E], order.tokens_U(sets.token_ids)
    step, bounds_U = max(1, BLOCK_ELEMENTS // hidden_ND.shape[1]), order.bounds_U
    if not hidden_ND.is_cpu:
        step = len(tokens_U)  # the host would wait to learn where a block begins
    edges = [0, len(gradient_E)]
    if step < len(tokens_U):
        edges = [*bounds_U[::step].tolist(), len(gradient_E)]
    for chunk, (first, last) in enumerate(itertools.pairwise(edges)):
        block = slice(chunk * step, (chunk + 1) * step)
        if not len(tokens_U[block]):
            break
        offsets = bounds_U[chunk * step : (chunk + 1) * step + 1] - first
        rows_xD = _bags(hidden_ND, order.positions_E[first:last], offsets, gradient_E[first:last])
        target_VD.index_add_(0, tokens_U[block], rows_xD.to(target_VD.dtype))


class _TakeRows(torch.autograd.Function):
    """``weight[token_ids]``, with the gradient as above."""

    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, token_ids: Tensor) -> Tensor:
        ctx.weight_VD = weight_VD
        ctx.save_for_backward(token_ids)
        return weight_VD[token_ids]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_RD: Tensor) -> tuple[Tensor | None, None]:
        (token_ids,) = ctx.saved_tensors
        target_VD, gradient_VD = gradient_target(ctx.weight_VD)
        if target_VD is not None:
            target_VD.index_add_(0, token_ids, gradient_RD.to(target_VD.dtype))
        return gradient_VD, None
