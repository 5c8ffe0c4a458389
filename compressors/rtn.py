"""Round to nearest: each weight goes to the nearest value of its grid. The baseline of quantisers.

    kick compress MODEL rtn@4 --out DIR         --param group_size=64 --param symmetric=true

The grid of each group of neighbouring columns spans the group's range in each row. Needs no calibration. Zero is on
every grid, so a pruned model keeps its mask.
"""

from torch import Tensor

from kick.levels import Bits
from kick.quantization import Quantized

from .rounding import Quantizer


class RTN(Quantizer):
    name = "rtn"

    def solve(self, weight: Tensor, statistic: None, level: Bits) -> Quantized:
        """weight [out, in] -> the nearest weight on its grid."""
        return self.round(weight.float(), level)
