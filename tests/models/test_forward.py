"""The forward pass of padded rows, against that of transformers."""

import torch

from benchmarks.tiny_models import make
from lrmc_ray.models.forward import hidden_states
from lrmc_ray.models.loading import (
    load_model,
)
from tests.support.operators import NoHostSync


def test_padding_on_the_right_needs_no_mask():
    model = make("llama")
    generator = torch.Generator().manual_seed(2)
    ids_BT = torch.randint(128, (4, 17), generator=generator)
    mask_BT = torch.arange(17) < torch.tensor([[17], [3], [9], [1]])
    with torch.no_grad():
        expected_BTD = model.base_model(
            input_ids=ids_BT, attention_mask=mask_BT.long()
        ).last_hidden_state
        actual_BTD = hidden_states(model, torch.where(mask_BT, ids_BT, 0))
    torch.testing.assert_close(actual_BTD[mask_BT], expected_BTD[mask_BT])


def test_padded_rows_run_without_waiting_and_as_transformers_runs_them(tiny_model):
    """Transformers' look at positions for packed sequences is spared here, and here alone."""
    model = load_model(tiny_model).eval()
    ids_BT = torch.randint(3, 500, (3, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with NoHostSync():
            found_BTD = hidden_states(model, ids_BT)
        expected_BTD = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
        assert torch.equal(found_BTD, expected_BTD)
        # Positions that begin anew are two sequences to others, as before.
        positions_BT = torch.cat([torch.arange(9), torch.arange(8)])[None]
        packed_BTD = model.model(
            input_ids=ids_BT[:1], position_ids=positions_BT, use_cache=False
        ).last_hidden_state
        alone_BTD = hidden_states(model, ids_BT[:1, 9:])
    torch.testing.assert_close(packed_BTD[:, 9:], alone_BTD)
