"""SLoRB: a low-rank branch beside a sparse weight, begun so that it gives back what the mask took (section 3.4).

    y = (W * m) x + S (X x)      X [in/k, in]: ones on block i;  S [out, in/k]: S_ij = mean over block j of W * (1 - m)

An input that is constant on each block of k gets the dense output exactly. The branch can't be merged without breaking
the N:M pattern: it is stored as a low-rank adapter, A = X and B = S.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kick.adapters import LowRank
from kick.blocks import Linear
from kick.errors import LevelError

from .sparse import SparseLinear


def block_sums(inputs: Tensor, block: int) -> Tensor:
    """X x: inputs [..., in] -> their sums over blocks [..., in/block]."""
    return inputs.unflatten(-1, (-1, block)).sum(dim=-1)


def block_means(weight: Tensor, block: int) -> Tensor:
    """weight [out, in] -> its means over blocks along `in` [out, in/block]."""
    return weight.unflatten(-1, (-1, block)).mean(dim=-1)


def indicator(in_features: int, block: int) -> Tensor:
    """X [in/block, in]."""
    return torch.eye(in_features // block).repeat_interleave(block, dim=1)


def check_blocks(linears: Iterable[Linear], block: int) -> None:
    """Raise LevelError for linears whose inputs do not fall into blocks of that size."""
    for linear in linears:
        inputs = linear.weight.shape[1]
        if inputs % block:
            raise LevelError(
                f"{linear.name}: {block} does not divide its {inputs} inputs.", "Choose another slorb block."
            )


class Branch(nn.Module):
    """The branch of one linear: added to its output by a hook. `start`: means (the paper's) or zeros."""

    def __init__(self, linear: SparseLinear, block: int, start: str) -> None:
        super().__init__()
        weight, mask = linear.dense.data, linear.mask
        if linear.transposed:
            weight, mask = weight.T, mask.T
        self.block = block
        lost = block_means(weight * ~mask, block)
        self.scale = nn.Parameter(lost if start == "means" else torch.zeros_like(lost))  # S [out, in/block]

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(block_sums(inputs, self.block), self.scale)

    def adapter(self) -> LowRank:
        in_features = self.scale.shape[1] * self.block
        scale = self.scale.detach()
        return LowRank(indicator(in_features, self.block).to(scale), scale.clone())


def add_branch(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """The forward hook."""
    return output + module.slorb(args[0])  # type: ignore[operator]
