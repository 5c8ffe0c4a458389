"""What SparseGPT and GPTQ have in common: the Hessian of a linear's inputs, its damping, and reports of both."""

import math
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from kick.compressor import Compressor, LayerwiseCompressor
from kick.quantization import Grid, Quantized, group_columns

from .obs import Factor, Rounding, Solution
from .statistics import Hessian


class SecondOrderCompressor(LayerwiseCompressor):
    """A compressor that solves with the Hessian of a linear's inputs."""

    statistic = Hessian

    class Params(Compressor.Params):
        damping: float = Field(default=0.01, gt=0, description="added to the Hessian's diagonal, a share of its mean")

    def factor(self, statistic: Hessian) -> Factor:
        """The statistic's factor; what it took to get it is recorded."""
        factor = statistic.factor(self.params.damping)
        self.check_damping(factor)
        if dead := int(factor.dead.sum()):
            self.notes["dead_inputs"] = dead
            self.warn(f"{dead} of its {len(factor.dead)} inputs were always zero; their weights became zero.")
        return factor

    def check_damping(self, factor: Factor) -> None:
        if factor.damping > self.params.damping:
            self.notes["damping"] = factor.damping
            steps = round(math.log10(factor.damping / self.params.damping)) or 1
            self.warn(
                f"its Hessian had no Cholesky factor; the damping was raised {steps} times, to {factor.damping:g}."
            )


def stack(weights: list[Tensor], dead: Tensor) -> Tensor:
    """Rows of several weights [out, in] one below the other, float32; columns of dead inputs are zero."""
    return torch.cat([weight.float() for weight in weights]).masked_fill_(dead, 0.0)


def unstack(solution: Solution, rounding: Rounding | None, weights: list[Tensor]) -> list[Tensor | Quantized]:
    """The parts of a solution that belong to each of `weights`."""
    rows = [len(weight) for weight in weights]
    parts = solution.weight.split(rows)
    if rounding is None:
        return list(parts)
    grid = rounding.fixed
    if grid is None:
        assert solution.scale is not None
        assert solution.zero is not None
        group_of = group_columns(solution.weight.shape[1], rounding.group_size, solution.weight.device)
        grid = Grid(rounding.bits, solution.scale, solution.zero, group_of)
    return [
        Quantized(part, replace(grid, scale=scale, zero=zero))
        for part, scale, zero in zip(parts, grid.scale.split(rows), grid.zero.split(rows), strict=True)
    ]
