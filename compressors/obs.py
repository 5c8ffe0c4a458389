"""The solver that SparseGPT and GPTQ share: change a weight column by column, let the later columns make up for it.

Layer objective: min over W' of ||(W' - W) X||^2 = tr((W' - W) H (W' - W)^T) with H = X X^T. Once column j is fixed, the
columns after it take the optimal brain surgeon's update. All its inverse Hessians are rows of one triangular matrix:
U upper with U^T U = H^-1 (Frantar et al., GPTQ, arXiv 2210.17323, algorithm 1; SparseGPT, arXiv 2301.00774, eq. 4-6).
Rows of W never meet: linears that share an input are solved in one call, their rows one below the other.

Shapes: weight [out, in], H and U [in, in]. Inside, everything is transposed, so that a column of W is contiguous.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from kick.errors import KickError
from kick.quantization import Grid, fit, nearest

_BLOCK = 128  # columns between two updates of all the columns that follow
_INNER = 32  # columns between two updates inside a block
_RAISE = 10.0  # by which the damping grows when a Cholesky factorisation fails
_ATTEMPTS = 4


@dataclass(frozen=True)
class Factor:
    """U [in, in] with U^T U = (H + damping mean(diag H) I)^-1. dead [in]: inputs that were always zero."""

    upper: Tensor
    dead: Tensor
    damping: float


def check_finite(diagonal: Tensor) -> None:
    """Raise KickError for the diagonal of a Hessian whose inputs overflowed."""
    if not bool(diagonal.isfinite().all()):
        raise KickError(
            "the Hessian is not finite: the activations overflow.", "Use float32, or other calibration text."
        )


def inverse_factor(hessian: Tensor, damping: float) -> Factor:
    """The factor of H [in, in] + damping * mean(diag H) * I.

    Where the factorisation fails, the damping is raised tenfold, at most three times. Raises KickError after that.

    With J the reversal of order and J H J = L L^T, R = J L J is upper triangular, H = R R^T and so U = R^-1: one
    factorisation and one triangular inverse, and H^-1 itself is never formed.
    """
    diagonal = hessian.diagonal()
    check_finite(diagonal)
    dead = diagonal == 0
    mean = float(diagonal.double().mean()) or 1.0
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    share = damping
    for _ in range(_ATTEMPTS):
        damped = hessian.flip(0, 1)
        damped.diagonal().add_(share * mean + dead.flip(0).to(hessian.dtype) * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) == 0:
            upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            if bool(upper.isfinite().all()):
                return Factor(upper, dead, share)
        share = max(share, 1e-3) * _RAISE
    raise KickError(
        f"the Hessian has no Cholesky factor even with a damping of {share / _RAISE:g} times its mean diagonal.",
        "More calibration text, or a larger `damping`.",
    )


class Chooser(Protocol):
    """Decides which weights stay. `width`: how many neighbouring columns it decides on at once; None: a block."""

    width: int | None

    def __call__(self, score: Tensor, start: int) -> Tensor:
        """score [columns, out] of the columns from `start` on -> [columns, out], True where the weight stays."""
        ...


@dataclass(frozen=True)
class Rounding:
    """Onto which grids columns are rounded: one for each row and each `group_size` columns (-1: all of them).

    A grid spans its columns as they stand when the first of them is reached, unless it is `fixed`.
    """

    bits: int
    symmetric: bool
    group_size: int
    fixed: Grid | None = None  # grids that are known beforehand, its group_of in the order of the columns


@dataclass(frozen=True)
class Solution:
    """weight [out, in]; losses [out], each row's part of the objective; scale and zero [out, groups] if rounded."""

    weight: Tensor
    losses: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None


def solve(
    weight: Tensor,
    upper: Tensor,
    *,
    choose: Chooser | None = None,
    keep: Tensor | None = None,
    rounding: Rounding | None = None,
) -> Solution:
    """Zero what `choose`, or the fixed mask `keep` [out, in], does not let stay; round what stays.

    Columns are treated in the order in which they stand; `upper` [in, in] must stand in the same. A block's scores are
    w^2 / U_jj^2 with the weights as every column before the block, or before the neighbours, has left them.
    """
    rest = weight.float().T.contiguous()  # [in, out]: what is still to be treated holds its updated values
    columns, rows = rest.shape
    pivots = upper.diagonal()
    width = choose.width if choose else None
    group = columns if rounding is None or rounding.group_size == -1 else rounding.group_size
    if rounding and width and group % width:
        raise KickError(
            f"groups of {group} columns hold no whole number of {width} neighbours.",
            "Take a group_size that the pattern divides.",
        )
    losses = torch.zeros(rows, device=weight.device)
    scales: list[Tensor] = []
    zeros: list[Tensor] = []
    for begin, end in _cut(0, columns, _BLOCK, group if rounding else None, width):
        errors = torch.empty(end - begin, rows, device=weight.device)
        stay = torch.ones(end - begin, rows, dtype=torch.bool, device=weight.device) if choose else None
        if keep is not None:
            stay = keep[:, begin:end].T
        if choose and width is None:
            stay = choose(rest[begin:end].square() / pivots[begin:end, None].square(), begin)
        for first, last in _cut(begin, end, min(_INNER, group), group if rounding else None, width):
            if rounding and rounding.fixed is None and first % group == 0:
                scale, zero = fit(rest[first : first + group].T, rounding.bits, rounding.symmetric)
                scales.append(scale)
                zeros.append(zero)
            for j in range(first, last):
                if choose and width and j % width == 0:
                    score = rest[j : j + width].square() / pivots[j : j + width, None].square()
                    stay[j - begin : j - begin + width] = choose(score, j)  # type: ignore[index]
                old = rest[j]
                new = old
                if rounding and rounding.fixed:
                    place = rounding.fixed.group_of[j]
                    new = nearest(old, rounding.fixed.scale[:, place], rounding.fixed.zero[:, place], rounding.bits)
                elif rounding:
                    new = nearest(old, scales[-1][:, 0], zeros[-1][:, 0], rounding.bits)
                if stay is not None:
                    new = new * stay[j - begin]
                error = torch.sub(old, new, out=errors[j - begin]).div_(pivots[j])
                rest[j] = new
                if j + 1 < last:
                    rest[j + 1 : last].addr_(upper[j, j + 1 : last], error, alpha=-1)
            if last < end:
                rest[last:end].addmm_(upper[first:last, last:end].T, errors[first - begin : last - begin], alpha=-1)
        if end < columns:
            rest[end:].addmm_(upper[begin:end, end:].T, errors, alpha=-1)
        losses += errors.square().sum(dim=0)
    if not scales:
        return Solution(rest.T, losses)
    return Solution(rest.T, losses, torch.cat(scales, dim=1), torch.cat(zeros, dim=1))


def _cut(begin: int, end: int, size: int, group: int | None, width: int | None) -> list[tuple[int, int]]:
    """Spans of about `size` columns that tear no neighbours apart, and no group unless it is larger than `size`."""
    unit = group if group and group <= size else (width or 1)
    span = unit * max(1, size // unit)
    cuts = set(range(begin, end, span)) | {end}
    if group and span % group:
        cuts |= {start for start in range(0, end, group) if begin < start}
    ordered = sorted(cuts)
    return list(pairwise(ordered))
