"""Round to nearest: each weight goes to the nearest value of its grid. The baseline of quantisers.

    kick compress MODEL rtn@4 --out DIR         --param group_size=64 --param symmetric=true

The grid of each group of neighbouring columns spans the group's range in each row. Needs no calibration. Zero is on
every grid, so a pruned model keeps its mask.
"""

import torch
from pydantic import Field
from torch import Tensor

from kick.compressor import Compressor, Knob, LayerwiseCompressor
from kick.levels import Bits, Level
from kick.quantization import Grid, Quantized, fit, group_columns

from .second_order import GroupSize, check_bits


class RTN(LayerwiseCompressor):
    name = "rtn"
    knob = Knob.BITS

    class Params(Compressor.Params):
        group_size: GroupSize = Field(default=128, description="columns that share a scale and a zero point; -1: all")
        symmetric: bool = Field(default=False, description="zero is the middle code")

    def check_level(self, level: Level) -> None:
        assert isinstance(level, Bits)
        check_bits(level)

    def solve(self, weight: Tensor, statistic: None, level: Bits) -> Quantized:
        """weight [out, in] -> the nearest weight on its grid."""
        return round_to_nearest(weight.float(), level.width, self.params.group_size, self.params.symmetric)


def round_to_nearest(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> Quantized:
    """weight [out, in] float32 on the grids that span each group of `group_size` columns in each row."""
    in_features = weight.shape[1]
    size = in_features if group_size == -1 else group_size
    fitted = [fit(weight[:, start : start + size], bits, symmetric) for start in range(0, in_features, size)]
    scale, zero = (torch.cat(parts, dim=1) for parts in zip(*fitted, strict=True))
    grid = Grid(bits, scale, zero, group_columns(in_features, group_size, weight.device))
    return Quantized(grid.values(grid.codes(weight)), grid)
