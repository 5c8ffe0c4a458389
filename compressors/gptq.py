"""GPTQ: round column by column and let the remaining weights make up for each rounding.

    kick compress MODEL gptq@4 --out DIR        --param group_size=64 --param symmetric=true --param act_order=static

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323.
The grid of a group of columns is fitted to the weights as they stand when the solver reaches the group. Weights that
are zero stay exactly zero (`keep_zeros`), so that a pruned model keeps its mask.
"""

from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch import Tensor

from kick.levels import Bits
from kick.quantization import Quantized

from .obs import Rounding, inverse_factor, solve
from .rounding import Quantizer
from .second_order import SecondOrderCompressor, stack, unstack
from .statistics import Hessian


class GPTQ(SecondOrderCompressor, Quantizer):
    name = "gptq"

    class Params(SecondOrderCompressor.Params, Quantizer.Params):
        act_order: Literal["none", "static", "group"] = Field(
            default="none",
            description="static, group: columns with the largest inputs are rounded first; static: their grids are "
            "those of neighbours, fitted beforehand; group: groups are made in the order of rounding",
        )
        keep_zeros: bool = Field(default=True, description="weights that are zero stay zero")

    def solve_group(self, weights: list[Tensor], statistic: Hessian, level: Bits) -> list[Tensor | Quantized]:
        """Matrices [out, in] that share an input, in one solver call: their rows never meet."""
        factor = self.factor(statistic)
        rounding = Rounding(level.width, self.params.symmetric, self.params.group_size)
        weight = stack(weights, factor.dead)
        keep = weight != 0 if self.params.keep_zeros and bool((weight == 0).any()) else None
        if self.params.act_order == "none":
            return unstack(solve(weight, factor.upper, keep=keep, rounding=rounding), rounding, weights)
        matrix = statistic.matrix
        order = matrix.diagonal().argsort(descending=True, stable=True)
        if self.params.act_order == "static":
            grid = self.round(weight, level).grid
            rounding = replace(rounding, fixed=replace(grid, group_of=grid.group_of[order]))
        reordered = inverse_factor(matrix[order][:, order], self.params.damping)
        self.check_damping(reordered)
        solution = solve(
            weight[:, order], reordered.upper, keep=None if keep is None else keep[:, order], rounding=rounding
        )
        return [_reordered(part, order.argsort()) for part in unstack(solution, rounding, weights)]


def _reordered(part: Tensor | Quantized, back: Tensor) -> Quantized:
    """Columns, and the groups they belong to, in the order of the model."""
    assert isinstance(part, Quantized)
    return Quantized(part.weight[:, back], replace(part.grid, group_of=part.grid.group_of[back]))
