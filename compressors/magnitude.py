"""Magnitude pruning: the smallest weights of each matrix become zero.

    kick compress MODEL magnitude@0.5 --out DIR        kick compress MODEL magnitude@2:4 --out DIR

One threshold for each matrix; a pattern compares M neighbours along the input dimension. Needs no calibration.
"""

from torch import Tensor

from kick.compressor import Knob, LayerwiseCompressor
from kick.levels import Level

from .masks import keep_largest


class Magnitude(LayerwiseCompressor):
    name = "magnitude"
    knob = Knob.SPARSITY | Knob.PATTERN

    def solve(self, weight: Tensor, statistic: None, level: Level) -> Tensor:
        """weight [out, in] -> pruned weight [out, in]; compares weights within the whole matrix."""
        return weight * keep_largest(weight.abs(), level, dim="matrix")
