"""Hidden states to logits, against the formula written out in float64."""

import pytest
import torch

from lrmc_ray.method.head import OutputHead, head_logits
from tests.support.method_inputs import head_problem, leaves

torch.set_num_threads(1)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("logit_scale", "softcap"), [(1.0, None), (0.3, None), (1.7, 2.0)])
def test_logits_and_their_gradients_follow_the_formula(has_bias, logit_scale, softcap):
    *tensors, _ = head_problem()
    ours, theirs = leaves(*tensors), leaves(*tensors)
    head = OutputHead(ours[1], ours[2] if has_bias else None, logit_scale, softcap)
    logits_NV = head_logits(ours[0], head)
    expected_NV = torch.stack([theirs[1] @ hidden_D for hidden_D in theirs[0]])
    if has_bias:
        expected_NV = expected_NV + theirs[2]
    expected_NV = logit_scale * expected_NV
    if softcap is not None:
        expected_NV = softcap * torch.tanh(expected_NV / softcap)
        assert logits_NV.abs().max() < softcap
    torch.testing.assert_close(logits_NV, expected_NV)
    with torch.no_grad():  # in place there
        assert torch.equal(head_logits(ours[0], head), logits_NV)
    logits_NV.square().sum().backward()
    expected_NV.square().sum().backward()
    for our, their in zip(ours[: 2 + has_bias], theirs, strict=False):
        torch.testing.assert_close(our.grad, their.grad)


@pytest.mark.parametrize(
    ("hidden_type", "weight_type", "product_type", "expected"),
    [
        (torch.float32, torch.float32, None, torch.float32),
        (torch.bfloat16, torch.float32, None, torch.float32),
        (torch.bfloat16, torch.bfloat16, None, torch.float32),
        (torch.float32, torch.float64, None, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float64, torch.float64),
    ],
)
def test_the_type_is_that_of_the_product_and_at_least_float32(
    hidden_type, weight_type, product_type, expected
):
    hidden_ND, weight_VD, bias_V, _ = head_problem()
    hidden_ND, weight_VD = hidden_ND.to(hidden_type), weight_VD.to(weight_type)
    head = OutputHead(weight_VD, bias_V.to(weight_type), 0.7, 3.0)
    logits_NV = head_logits(hidden_ND, head, dtype=product_type)
    assert logits_NV.dtype == expected
    exact_NV = head_logits(hidden_ND, head, dtype=torch.float64)
    error = float((logits_NV - exact_NV).abs().max())
    is_rounded_to_bf16 = weight_type == torch.bfloat16 and product_type is None
    assert (1e-3 < error < 5e-2) if is_rounded_to_bf16 else error < 1e-5


def test_a_bf16_product_is_shaped_in_float32():
    """Bias, scale and bound come after the product has been widened, and add no rounding."""
    hidden_ND, weight_VD, bias_V, _ = (
        x.bfloat16() if isinstance(x, torch.Tensor) else x for x in head_problem()
    )
    raw_NV = (hidden_ND @ weight_VD.T).double()
    expected_NV = 3.0 * torch.tanh(0.7 * (raw_NV + bias_V.double()) / 3.0)
    logits_NV = head_logits(hidden_ND, OutputHead(weight_VD, bias_V, 0.7, 3.0))
    torch.testing.assert_close(logits_NV.double(), expected_NV, rtol=1e-6, atol=1e-6)


def test_the_vocabulary_is_the_rows_of_the_weight():
    assert OutputHead(torch.zeros(40, 5)).vocabulary_size == 40
