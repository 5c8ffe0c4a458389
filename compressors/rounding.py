"""What every quantiser has in common: the grids it takes, the widths it reaches, and rounding to the nearest value."""

from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from kick.compressor import Compressor, Knob, LayerwiseCompressor
from kick.errors import LevelError
from kick.levels import Bits, Level
from kick.quantization import Grid, Quantized, fit, group_columns

PACKABLE_BITS = (2, 3, 4, 8)


def _group_size(value: int) -> int:
    if value != -1 and value < 1:
        raise ValueError("a group size is a number of columns, or -1 for whole rows")
    return value


GroupSize = Annotated[int, AfterValidator(_group_size)]


class Quantizer(LayerwiseCompressor):
    """A compressor whose levels are bits: it puts each linear on grids of groups of columns."""

    knob = Knob.BITS

    class Params(Compressor.Params):
        group_size: GroupSize = Field(default=128, description="columns that share a scale and a zero point; -1: all")
        symmetric: bool = Field(default=False, description="zero is the middle code")

    def check_level(self, level: Level) -> None:
        assert isinstance(level, Bits)
        check_bits(level)

    def round(self, weight: Tensor, level: Bits) -> Quantized:
        """weight [out, in] float32 -> the nearest weight on its grids."""
        return round_to_nearest(weight, level.width, self.params.group_size, self.params.symmetric)


def check_bits(bits: Bits) -> None:
    """Raise LevelError for a width that no packed format stores."""
    if bits.width not in PACKABLE_BITS:
        raise LevelError(f"{bits.width} bits cannot be packed.", f"Expected {', '.join(map(str, PACKABLE_BITS))}.")


def round_to_nearest(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> Quantized:
    """weight [out, in] float32 on the grids that span each group of `group_size` columns in each row."""
    in_features = weight.shape[1]
    size = in_features if group_size == -1 else group_size
    fitted = [fit(weight[:, start : start + size], bits, symmetric) for start in range(0, in_features, size)]
    scale, zero = (torch.cat(parts, dim=1) for parts in zip(*fitted, strict=True))
    grid = Grid(bits, scale, zero, group_columns(in_features, group_size, weight.device))
    return Quantized(grid.values(grid.codes(weight)), grid)
