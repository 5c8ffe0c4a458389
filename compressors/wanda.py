"""Wanda: prune the weights whose magnitude times input norm is smallest, within each output row.

    kick compress MODEL wanda@0.5 --out DIR        kick compress MODEL wanda@2:4 --out DIR

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695, eq. 1:
S_ij = |W_ij| * ||X_j||_2, the norm taken over all calibration tokens.
"""

from torch import Tensor

from kick.compressor import Knob, LayerwiseCompressor
from kick.levels import Level

from .masks import keep_largest
from .statistics import InputNorm


class Wanda(LayerwiseCompressor):
    name = "wanda"
    knob = Knob.SPARSITY | Knob.PATTERN
    statistic = InputNorm  # gathered once for all linears that share an input

    def solve(self, weight: Tensor, statistic: InputNorm, level: Level) -> Tensor:
        """weight [out, in] -> pruned weight [out, in]; compares weights within each row."""
        score = weight.abs().float() * statistic.l2  # [out, in] * [in]
        return weight * keep_largest(score, level, dim="row")
