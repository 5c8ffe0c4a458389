"""The grids that quantised weights lie on: codes, scales and zero points, and whether a weight is really on its grid.

A weight of `bits` bits is stored as an unsigned code c in 0 .. 2^bits - 1 and means (c - zero) * scale. Scale and zero
belong to one output row and one group of input columns. Scales are numbers that float16 holds exactly, because packed
formats store them so: what is measured here is what a packed file gives back.

Shapes: weight [out, in]; scale and zero [out, groups]; group_of [in], the group of each input column.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SCALE_BITS = 16
_SMALLEST_SCALE = 2.0**-24  # the smallest positive float16


@dataclass(frozen=True)
class Grid:
    """Scales [out, groups] float32, zeros [out, groups] integers in float32, group_of [in] int64."""

    bits: int
    scale: Tensor
    zero: Tensor
    group_of: Tensor

    @property
    def groups(self) -> int:
        return self.scale.shape[1]

    def storage_bits(self, in_features: int) -> float:
        """Bits that one weight takes when packed: its code, and its share of scale and zero point."""
        return self.bits + self.groups * (SCALE_BITS + self.bits) / in_features

    def codes(self, weight: Tensor) -> Tensor:
        """The code of each weight [out, in], as float32: the nearest, or beside it the one that this weight was.

        A weight kept in few bits, such as bfloat16, may lie nearer to a neighbour of the code that it was rounded from.
        """
        scale, zero = self._of_columns(weight.device)
        codes = encode(weight.float(), scale, zero, self.bits)
        if weight.dtype != torch.float32:
            for step in (-1, 1):
                off = self.values(codes).to(weight.dtype) != weight
                beside = (codes + step).clamp(0, 2**self.bits - 1)
                codes = torch.where(off & (self.values(beside).to(weight.dtype) == weight), beside, codes)
        return codes

    def values(self, codes: Tensor) -> Tensor:
        """What codes [out, in] mean: [out, in] float32."""
        scale, zero = self._of_columns(codes.device)
        return (codes.float() - zero) * scale

    def _of_columns(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Scale and zero of each weight [out, in], there: grids that were read from a file stand on the CPU."""
        columns = self.group_of.to(device)
        return self.scale.to(device)[:, columns], self.zero.to(device)[:, columns]

    def violations(self, weight: Tensor) -> int:
        """How many weights [out, in] are not on the grid, in the precision that `weight` is kept in."""
        return int((self.values(self.codes(weight)).to(weight.dtype) != weight).sum())

    def rescaled(self, rows: Tensor) -> "Grid":
        """The grid of weights whose rows were multiplied by `rows` [out]. Scales stay numbers of float16."""
        return Grid(self.bits, storable(self.scale * rows[:, None]), self.zero, self.group_of)


@dataclass(frozen=True)
class Quantized:
    """A weight [out, in] that lies on `grid`."""

    weight: Tensor
    grid: Grid


def fit(weight: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point [rows, 1] that span the range of each row of `weight` [rows, n].

    Zero always has a code. Symmetric: the zero point is the middle code, 2^(bits-1). An all-zero row gets scale 1.
    """
    low, high = weight.amin(dim=1, keepdim=True).clamp(max=0), weight.amax(dim=1, keepdim=True).clamp(min=0)
    top = 2**bits - 1
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    spread = high - low
    scale = storable(torch.where(spread > 0, spread / top, torch.ones_like(spread)))
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-low / scale).round().clamp(0, top)
    return scale, zero


def encode(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Nearest codes of `weight`; scale and zero broadcast against it."""
    return torch.round(weight / scale).add_(zero).clamp_(0, 2**bits - 1)


def nearest(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest values on the grid; scale and zero broadcast against `weight`."""
    return encode(weight, scale, zero, bits).sub_(zero).mul_(scale)


def storable(scale: Tensor) -> Tensor:
    """The nearest positive scales that float16 holds."""
    return scale.clamp(_SMALLEST_SCALE, torch.finfo(torch.float16).max).half().float()


def group_columns(in_features: int, group_size: int, device: torch.device | None = None) -> Tensor:
    """The group of each input column, [in]: neighbours share one. group_size -1: a single group, the whole row."""
    if group_size == -1:
        return torch.zeros(in_features, dtype=torch.int64, device=device)
    return torch.arange(in_features, device=device) // group_size


def to_tensors(grids: dict[str, Grid]) -> dict[str, Tensor]:
    """Tensors to store; `from_tensors` gives the grids back."""
    stored = {}
    for name, grid in grids.items():
        stored[f"{name}.scale"] = grid.scale.half().contiguous()
        stored[f"{name}.zero"] = grid.zero.to(torch.int32).contiguous()
        stored[f"{name}.group_of"] = grid.group_of.to(torch.int32).contiguous()
        stored[f"{name}.bits"] = torch.tensor(grid.bits, dtype=torch.int32)
    return stored


def from_tensors(stored: dict[str, Tensor]) -> dict[str, Grid]:
    names = sorted({key.rpartition(".")[0] for key in stored})
    return {
        name: Grid(
            bits=int(stored[f"{name}.bits"]),
            scale=stored[f"{name}.scale"].float(),
            zero=stored[f"{name}.zero"].float(),
            group_of=stored[f"{name}.group_of"].long(),
        )
        for name in names
    }
