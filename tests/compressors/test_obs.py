"""The solver of SparseGPT and GPTQ against a slow exact one: explicit inverses in float64, column by column."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kick_compressors.masks import keep_count, keep_largest
from kick_compressors.obs import Rounding, inverse_factor, solve
from kick_compressors.rounding import round_to_nearest
from kick_compressors.sparsegpt import _Largest

from kick.errors import KickError
from kick.levels import Pattern, Sparsity
from kick.quantization import fit, nearest


def problem(rows, columns, seed=0, tokens=400):
    """Weights, and the second moments of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.5 * torch.eye(columns)
    inputs = torch.randn(tokens, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs / tokens


def exact(weight, hessian, damping, decide, rounding=None, block=128):
    """The optimal brain surgeon, column by column, each step with the inverse of what is left of the Hessian.

    decide(scores, start, width): which of the next columns stay, asked at each block or pattern's start.
    """
    weight, hessian = weight.double().clone(), hessian.double().clone()
    columns = weight.shape[1]
    hessian += damping * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    stay = torch.ones_like(weight, dtype=torch.bool)
    width = decide.width or block
    group = columns if rounding is None or rounding.group_size == -1 else rounding.group_size
    for j in range(columns):
        if j % width == 0:
            span = range(j, min(j + width, columns))
            scores = torch.stack([weight[:, k] ** 2 / inverses[k][0, 0] for k in span])
            stay[:, j : span.stop] = decide(scores.float(), j).T
        if rounding and j % group == 0:
            scale, zero = (
                part[:, 0] for part in fit(weight[:, j : j + group].float(), rounding.bits, rounding.symmetric)
            )
        new = weight[:, j].clone()
        if rounding:
            new = nearest(new.float(), scale, zero, rounding.bits).double()
        new *= stay[:, j]
        error = (weight[:, j] - new) / inverses[j][0, 0]
        weight[:, j:] -= error[:, None] * inverses[j][0][None, :]
        weight[:, j] = new
    return weight


class Everything:
    """Lets every weight stay."""

    width = None

    def __call__(self, score, start):
        return torch.ones_like(score, dtype=torch.bool)


LEVELS = [Sparsity(fraction=0.5), Pattern(keep=2, of=4), Pattern(keep=4, of=8), Pattern(keep=1, of=3)]


@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_pruning_is_the_optimal_brain_surgeon(level):
    weight, hessian = problem(6, 168)  # two blocks, the second short
    chooser = _Largest(level, [4, 2])
    found = solve(weight, inverse_factor(hessian, 0.01).upper, choose=chooser)
    block = 126 if isinstance(level, Pattern) and level.of == 3 else 128
    expected = exact(weight, hessian, 0.01, chooser, block=block)
    assert torch.equal(found.weight == 0, expected == 0)
    assert torch.allclose(found.weight.double(), expected, atol=1e-4)


@pytest.mark.parametrize("group_size", [-1, 24, 32, 64, 150])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_is_the_optimal_brain_surgeon(group_size, symmetric):
    weight, hessian = problem(5, 192, seed=1)
    rounding = Rounding(3, symmetric, group_size)
    found = solve(weight, inverse_factor(hessian, 0.01).upper, rounding=rounding)
    expected = exact(weight, hessian, 0.01, Everything(), rounding)
    assert torch.allclose(found.weight.double(), expected, atol=1e-4)


@pytest.mark.parametrize("level", [Sparsity(fraction=0.5), Pattern(keep=2, of=4)], ids=str)
def test_pruning_and_rounding_at_once_gives_mask_and_grid_exactly(level):
    weight, hessian = problem(5, 192, seed=2)
    rounding, chooser = Rounding(4, False, 64), _Largest(level, [5])
    found = solve(weight, inverse_factor(hessian, 0.01).upper, choose=chooser, rounding=rounding)
    assert torch.allclose(found.weight.double(), exact(weight, hessian, 0.01, chooser, rounding), atol=1e-4)
    codes = found.weight.reshape(5, 3, 64) / found.scale[..., None] + found.zero[..., None]
    assert torch.allclose(codes, codes.round(), atol=1e-4)
    assert codes.min() >= -1e-4
    assert codes.max() <= 15 + 1e-4
    if isinstance(level, Pattern):
        assert ((found.weight.reshape(5, -1, 4) != 0).sum(dim=-1) <= 2).all()
    else:
        assert (found.weight == 0).sum() >= 5 * 192 // 2


def test_zeros_of_a_fixed_mask_stay_zero():
    weight, hessian = problem(5, 140, seed=3)
    keep = torch.rand(5, 140, generator=torch.Generator().manual_seed(0)) > 0.4
    found = solve(weight * keep, inverse_factor(hessian, 0.01).upper, keep=keep, rounding=Rounding(4, True, 32))
    assert (found.weight[~keep] == 0).all()


def test_the_losses_are_the_objective():
    weight, hessian = problem(4, 150, seed=4)
    factor = inverse_factor(hessian, 0.05)
    found = solve(weight, factor.upper, choose=_Largest(Sparsity(fraction=0.6), [4]))
    damped = (hessian + 0.05 * hessian.diagonal().mean() * torch.eye(150)).double()
    change = (found.weight - weight).double()
    assert torch.allclose(found.losses.double(), ((change @ damped) * change).sum(dim=1), rtol=1e-4)


def test_rows_never_meet():
    weight, hessian = problem(7, 160, seed=5)
    upper = inverse_factor(hessian, 0.01).upper
    together = solve(weight, upper, choose=_Largest(Sparsity(fraction=0.5), [3, 4]))
    first, second = (
        solve(part, upper, choose=_Largest(Sparsity(fraction=0.5), [len(part)])) for part in weight.split([3, 4])
    )
    assert torch.allclose(together.weight, torch.cat([first.weight, second.weight]), atol=1e-6)


def test_each_matrix_loses_exactly_what_was_asked():
    weight, hessian = problem(7, 300, seed=6)
    found = solve(weight, inverse_factor(hessian, 0.01).upper, choose=_Largest(Sparsity(fraction=0.37), [3, 4]))
    assert [(part == 0).sum().item() for part in found.weight.split([3, 4])] == [333, 444]  # 0.37 * 900, 0.37 * 1200


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), bits=st.sampled_from([2, 3, 4]), symmetric=st.booleans())
def test_rounding_with_the_hessian_is_never_worse_than_to_nearest(seed, bits, symmetric):
    weight, hessian = problem(8, 64, seed)

    def error(found):
        change = (found - weight).double()
        return float(((change @ hessian.double()) * change).sum())

    ours = solve(weight, inverse_factor(hessian, 0.01).upper, rounding=Rounding(bits, symmetric, 32)).weight
    assert error(ours) <= error(round_to_nearest(weight, bits, 32, symmetric).weight)


def test_the_factor_is_a_root_of_the_inverse():
    _, hessian = problem(1, 90)
    factor = inverse_factor(hessian, 0.02)
    damped = hessian + 0.02 * hessian.diagonal().mean() * torch.eye(90)
    assert torch.allclose(
        (factor.upper.T @ factor.upper).double(), torch.linalg.inv(damped.double()), rtol=1e-3, atol=1e-4
    )
    assert torch.equal(factor.upper, factor.upper.triu())
    assert factor.damping == 0.02


def test_a_failing_factorisation_raises_the_damping():
    hessian = torch.eye(4)
    hessian[0, 1] = hessian[1, 0] = 1.05  # eigenvalues 2.05, 1, 1, -0.05: positive definite only from 0.05 on
    factor = inverse_factor(hessian, 0.01)
    assert factor.damping == pytest.approx(0.1)


def test_a_hessian_beyond_repair_is_an_error_and_not_an_identity():
    hessian = torch.eye(4)
    hessian[0, 1] = hessian[1, 0] = 1e6
    with pytest.raises(KickError, match="no Cholesky factor even with a damping of 10 times"):
        inverse_factor(hessian, 0.01)
    with pytest.raises(KickError, match="not finite"):
        inverse_factor(torch.full((3, 3), float("nan")), 0.01)


def test_inputs_that_are_always_zero_are_dead():
    _, hessian = problem(1, 20)
    hessian[3], hessian[:, 3] = 0, 0
    factor = inverse_factor(hessian, 0.01)
    assert factor.dead.nonzero().flatten().tolist() == [3]
    assert factor.upper.isfinite().all()


def test_a_group_that_tears_neighbours_apart_is_refused():
    weight, hessian = problem(2, 60)
    with pytest.raises(KickError, match="groups of 30 columns hold no whole number of 4 neighbours"):
        solve(
            weight,
            inverse_factor(hessian, 0.01).upper,
            choose=_Largest(Pattern(keep=2, of=4), [2]),
            rounding=Rounding(4, True, 30),
        )


def test_keep_count_and_keep_largest_agree():
    score = torch.rand(3, 10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(keep_count(score, 6), keep_largest(score, Sparsity(fraction=0.4), dim="row"))
