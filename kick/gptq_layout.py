"""The packed layout of GPTQ checkpoints: codes of a few bits in 32-bit words, as AutoGPTQ and GPTQModel store them.

For a linear [out, in] with groups of input columns:

    qweight  int32 [in * bits / 32, out]       codes, one below the other along `in`, lowest bits first
    qzeros   int32 [groups, out * bits / 32]   zero points along `out`; in the first format, zero point minus one
    scales   float16 [groups, out]
    g_idx    int32 [in]                        the group of each input column

A code may lie across two words (3 bits: 32 codes in three words). A weight is (code - zero) * scale.
"""

import numpy as np
import torch
from torch import Tensor

from kick.errors import CheckpointError
from kick.quantization import Grid, group_columns

_WORD = 32


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes [n, m], 0 .. 2^bits - 1, packed along n: int32 [n * bits / 32, m]. n * bits must be a multiple of 32."""
    count, width = codes.shape
    if count * bits % _WORD:
        raise CheckpointError(
            f"{count} codes of {bits} bits do not fill 32-bit words.", "Their number must be a multiple of 32."
        )
    values = codes.to(torch.int64).numpy().astype(np.uint8)
    spread = np.unpackbits(values[:, None, :], axis=1, count=bits, bitorder="little")  # [n, bits, m]
    words = spread.reshape(count * bits // _WORD, _WORD, width)
    packed = np.packbits(words, axis=1, bitorder="little")  # [words, 4, m]
    return torch.from_numpy(np.ascontiguousarray(packed.transpose(0, 2, 1)).view("<i4")[..., 0].copy())


def unpack(packed: Tensor, bits: int) -> Tensor:
    """int32 [n * bits / 32, m] -> codes [n, m], int64: the inverse of `pack`."""
    rows, width = packed.shape
    parts = packed.contiguous().numpy().astype("<i4").view(np.uint8).reshape(rows, width, 4)
    spread = np.unpackbits(parts.transpose(0, 2, 1), axis=1, bitorder="little")  # [rows, 32, m]
    codes = np.packbits(spread.reshape(rows * _WORD // bits, bits, width), axis=1, bitorder="little")[:, 0]
    return torch.from_numpy(codes.astype(np.int64))


def pack_linear(weight: Tensor, grid: Grid, minus_one: bool) -> dict[str, Tensor]:
    """The four tensors of a weight [out, in] that lies on `grid`. `minus_one`: zero points in the first format."""
    zero = (grid.zero.to(torch.int64) - int(minus_one)) % 2**grid.bits
    return {
        "qweight": pack(grid.codes(weight).T.cpu(), grid.bits),
        "qzeros": pack(zero.cpu(), grid.bits).T.contiguous(),  # along `out`: its transpose is packed along rows
        "scales": grid.scale.T.half().contiguous().cpu(),
        "g_idx": grid.group_of.to(torch.int32).cpu(),
    }


def unpack_linear(stored: dict[str, Tensor], bits: int, minus_one: bool, group_size: int = -1) -> tuple[Tensor, Grid]:
    """The weight [out, in] in float32 and its grid, from the four tensors.

    Without g_idx, groups are `group_size` neighbours (-1: all), the last one what is left; where the number of scales
    says otherwise, equal parts. Raises ValueError where it fits neither.
    """
    codes = unpack(stored["qweight"], bits).T
    zero = (unpack(stored["qzeros"].T.contiguous(), bits) + int(minus_one)) % 2**bits
    groups, in_features = stored["scales"].shape[0], codes.shape[1]
    group_of = stored.get("g_idx")
    if group_of is None:
        group_of = group_columns(in_features, group_size)
        if int(group_of[-1]) + 1 != groups:
            if in_features % groups:
                raise ValueError(f"{groups} groups of scales for {in_features} inputs in groups of {group_size}")
            group_of = group_columns(in_features, in_features // groups)
    grid = Grid(bits, stored["scales"].T.float().contiguous(), zero.float(), group_of.long())
    return grid.values(codes), grid
