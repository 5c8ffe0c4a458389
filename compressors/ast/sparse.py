"""Linears whose weight is masked while it trains: y = (W * m) x, with a gradient that reaches pruned entries too.

Shapes: weight and mask as the module holds its weight, [out, in] or, for GPT-2's Conv1D, [in, out].
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kick.blocks import Linear
from kick.levels import Pattern

from ..masks import keep_largest
from ..training import parallel


class _StraightThrough(torch.autograd.Function):
    """W * m forwards; backwards the gradient at W * m is taken for that of W, all of it (Bengio et al., 1308.3432)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Masked(nn.Module):
    """A parametrisation of a weight. Without `through` the gradient of pruned entries is zero."""

    mask: Tensor

    def __init__(self, mask: Tensor, through: bool) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.through = through

    def forward(self, weight: Tensor) -> Tensor:
        return _StraightThrough.apply(weight, self.mask) if self.through else weight * self.mask


class SparseLinear:
    """A linear of the blocks while its weight is masked."""

    def __init__(self, linear: Linear, pattern: Pattern, through: bool) -> None:
        self.name, self.module, self.transposed = linear.name, linear.module, linear.transposed
        masked = Masked(self._layout(best_mask(linear.weight, pattern)), through)
        parametrize.register_parametrization(self.module, "weight", masked)
        masked.register_buffer("initial", masked.mask.clone())

    @property
    def _parametrizations(self) -> Any:
        held: Any = self.module.parametrizations
        return held["weight"]

    @property
    def masked(self) -> Any:
        return self._parametrizations[0]

    @property
    def dense(self) -> nn.Parameter:
        """All entries, those under the mask included, in the module's own layout."""
        return self._parametrizations.original

    @property
    def mask(self) -> Tensor:
        return self.masked.mask

    @torch.no_grad()
    def update(self, pattern: Pattern) -> tuple[int, int]:
        """A new mask by magnitude, which the paper finds best here: (flips since the last, flips since the first)."""
        dense = parallel.local(self.dense.data)
        if not self.masked.through:  # what was pruned does not come back by what its momentum made of it
            dense.mul_(parallel.local(parallel.own_part(self.mask, self.dense.data)))
        own = self._layout(best_mask(dense.T if self.transposed else dense, pattern))
        mask = parallel.whole_of(own, self.dense.data)
        flips = int((mask != self.mask).sum()), int((mask != self.masked.initial).sum())
        self.mask.copy_(mask)
        return flips

    def freeze(self) -> None:
        """The weight becomes W * m, as any linear holds it."""
        parametrize.remove_parametrizations(self.module, "weight", leave_parametrized=True)

    def _layout(self, mask: Tensor) -> Tensor:
        return mask.T.contiguous() if self.transposed else mask


def best_mask(weight: Tensor, pattern: Pattern) -> Tensor:
    """[out, in] -> True for the largest by magnitude of each M neighbours along `in`; M:M keeps all."""
    if pattern.keep == pattern.of:
        return torch.ones_like(weight, dtype=torch.bool)
    return keep_largest(weight.abs(), pattern, dim="row")
