"""Grids: what codes mean, and whether a weight is on its grid."""

import pytest
import torch

from kick.quantization import Grid, fit, from_tensors, group_columns, nearest, to_tensors


def test_asymmetric_grid_by_hand():
    # range [-1, 2] with 2 bits: scale 1, zero point 1, values -1 0 1 2
    scale, zero = fit(torch.tensor([[-1.0, 0.3, 2.0]]), 2, symmetric=False)
    assert (scale.item(), zero.item()) == (1.0, 1.0)
    assert nearest(torch.tensor([[-1.4, -0.2, 0.6, 5.0]]), scale, zero, 2).tolist() == [[-1.0, 0.0, 1.0, 2.0]]


def test_symmetric_grid_by_hand():
    # largest magnitude 3.5 with 3 bits: scale 2 * 3.5 / 7 = 1, zero point 4, values -4 .. 3
    scale, zero = fit(torch.tensor([[-3.5, 1.0]]), 3, symmetric=True)
    assert (scale.item(), zero.item()) == (1.0, 4.0)
    assert nearest(torch.tensor([[-9.0, 9.0, 0.2]]), scale, zero, 3).tolist() == [[-4.0, 3.0, 0.0]]


@pytest.mark.parametrize("values", [[1.0, 2.0], [-2.0, -1.0], [0.0, 0.0], [3e-7, -1e-7]])
@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_is_on_every_grid_and_scales_are_float16(values, symmetric):
    scale, zero = fit(torch.tensor([values]), 4, symmetric)
    assert nearest(torch.zeros(1, 1), scale, zero, 4).item() == 0.0
    assert torch.equal(scale.half().float(), scale)
    assert 0 <= zero.item() <= 15


def test_a_weight_off_its_grid_is_counted():
    grid = Grid(2, torch.tensor([[0.5, 1.0]]), torch.tensor([[1.0, 2.0]]), group_columns(4, 2))
    weight = torch.tensor([[-0.5, 1.0, -2.0, 1.0]])  # codes 0 3 | 0 3
    assert grid.codes(weight).tolist() == [[0, 3, 0, 3]]
    assert grid.violations(weight) == 0
    assert grid.violations(weight + torch.tensor([[0.0, 0.1, 0.0, 1.0]])) == 2  # between two codes; beyond the last
    assert grid.storage_bits(4) == 2 + 2 * (16 + 2) / 4


def test_a_grid_holds_in_the_precision_of_the_weights():
    scale, zero = fit(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), 4, symmetric=False)
    grid = Grid(4, scale, zero, group_columns(8, -1))
    weight = grid.values(torch.randint(0, 16, (3, 8), generator=torch.Generator().manual_seed(0)))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert grid.violations(weight.to(dtype)) == 0


def test_stored_grids_come_back():
    grids = {
        f"model.layers.{i}.q_proj": Grid(
            4, torch.rand(3, 2).half().float(), torch.tensor([[8.0, 0.0]] * 3), group_columns(6, 3)
        )
        for i in range(2)
    }
    back = from_tensors(to_tensors(grids))
    assert back.keys() == grids.keys()
    for name, grid in grids.items():
        assert torch.equal(back[name].scale, grid.scale)
        assert torch.equal(back[name].zero, grid.zero)
        assert torch.equal(back[name].group_of, grid.group_of)
        assert back[name].bits == 4


def test_group_columns():
    assert group_columns(5, 2).tolist() == [0, 0, 1, 1, 2]
    assert group_columns(3, -1).tolist() == [0, 0, 0]
