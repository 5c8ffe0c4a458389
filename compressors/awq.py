"""AWQ: before rounding, make the columns that large activations meet larger, and so their rounding errors smaller.

    kick compress MODEL awq@4 --out DIR         --param group_size=64

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", arXiv 2306.00978. For each
group of linears that share an input, s = mean|X|^alpha with the alpha out of 20 that gives the smallest output error
||(Q(W s) / s - W) X||; 1/s goes into the norm or the linear before them. Where nothing can take it, s is 1.
Then the largest weights of each row and group are cut to where the same error is smallest, but for queries and keys,
whose product is not linear in either (section 3.2 and the authors' code). Zeros stay zero: pruned models keep masks.
"""

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from kick.blocks import Block, Group, Linear
from kick.folding import Fold, find_fold, multiply_adapter
from kick.levels import Bits
from kick.quantization import Quantized, group_columns
from kick.walk import BlockWalk

from .rounding import Quantizer
from .statistics import Hessian

_ALPHAS = 20
_CUTS = tuple(1 - 0.05 * step for step in range(10))  # of the largest weight of a row and group, the first is none
_QUERIES_AND_KEYS = ("q_", "k_", "kv_", "query", "key", "qkv", "wqkv", "c_attn")  # how their own names begin


class Activations(Hessian):
    """The Hessian, and the mean magnitude of each input feature."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self.sum_of_magnitudes = torch.zeros(in_features, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor) -> None:
        super().add(inputs)
        self.sum_of_magnitudes += inputs.float().abs().sum(dim=0)

    @property
    def mean_magnitude(self) -> Tensor:
        """[in], float32. Ones if no token came by."""
        if self.tokens == 0:
            return torch.ones(self.in_features, device=self.device)
        return (self.sum_of_magnitudes / self.tokens).float()


@dataclass
class _Scaled:
    """What is to be folded once the block has run: column scales [in], and the weights that go with them."""

    group: Group
    fold: Fold
    scale: Tensor
    quantized: list[Quantized]


class AWQ(Quantizer):
    name = "awq"
    statistic = Activations

    class Params(Quantizer.Params):
        clip: bool = Field(default=True, description="cut the largest weights of each group where that rounds better")

    def compress(self, *args: Any, **kwargs: Any) -> nn.Module:
        self._unscaled: list[str] = []
        model = super().compress(*args, **kwargs)
        if self._unscaled:
            self.warn(
                f"nothing before {len(self._unscaled)} groups of linears can take their scales, so they were rounded "
                f"without: {'; '.join(self._unscaled[:2])}" + ("; ..." if len(self._unscaled) > 2 else ".")
            )
        return model

    def enter_block(self, block: Block, walk: BlockWalk | None) -> None:
        assert walk is not None
        self._scaled: list[_Scaled] = []
        with walk.working(block, torch.float32):
            self._folds = {group: find_fold(block, group, lambda: walk.added(block)) for group in block.groups}

    def solve_group(self, weights: list[Tensor], statistic: Activations, level: Bits) -> list[Tensor | Quantized]:
        """Weights that stand for scale and rounding together, as their errors do; `leave_block` takes them apart."""
        whole = [weight.float() for weight in weights]
        fold = self._folds.get(self.group)  # none for the head: it is in no block
        matrix = statistic.matrix
        if fold is None or len(weights) != len(self.group.linears):
            self._unscaled.append(self._at)
            return [self._round(*pair, matrix, level) for pair in zip(self.linears, whole, strict=True)]
        scale = self._search(torch.cat(whole), matrix, statistic.mean_magnitude, level)
        matrix = matrix.div_(scale).div_(scale[:, None])  # of the inputs that the scaled weights meet
        quantized = [
            self._round(linear, weight * scale, matrix, level)
            for linear, weight in zip(self.linears, whole, strict=True)
        ]
        self._scaled.append(_Scaled(self.group, fold, scale, quantized))
        return [part.weight / scale for part in quantized]

    def leave_block(self, block: Block) -> None:
        for scaled in self._scaled:
            for linear, part in zip(scaled.group.linears, scaled.quantized, strict=True):
                linear.weight.copy_(part.weight)
                multiply_adapter(linear, scaled.scale)
                self.grids[linear.name] = part.grid
        for scaled in self._scaled:  # only now: a linear may both be quantised and take the scale of a later group
            taker = scaled.fold.linear
            grid = self.grids.get(taker.name) if taker else None
            codes = grid.codes(taker.weight) if taker and grid else None
            scaled.fold.divide(scaled.scale)
            if taker and grid and codes is not None:
                self.grids[taker.name] = grid.rescaled(1 / scaled.scale)
                taker.weight.copy_(self.grids[taker.name].values(codes))

    def _search(self, weight: Tensor, matrix: Tensor, magnitude: Tensor, level: Bits) -> Tensor:
        """The best scale [in] for weight [out, in]. matrix [in, in], magnitude [in]: of its inputs."""
        magnitude = magnitude.clamp(min=1e-4 * float(magnitude.max()))
        best, smallest = torch.ones_like(magnitude), float("inf")
        for step in range(_ALPHAS):
            scale = magnitude ** (step / _ALPHAS)
            scale = scale / (scale.max() * scale.min()).sqrt()
            change = self.round(weight * scale, level).weight / scale - weight
            error = float(((change @ matrix) * change).sum())
            if error < smallest:
                best, smallest = scale, error
        return best

    def _round(self, linear: Linear, weight: Tensor, matrix: Tensor, level: Bits) -> Quantized:
        """The weight [out, in] of `linear` on its grids. matrix [in, in]: second moments of its inputs."""
        name = linear.name.rpartition(".")[2].lower()
        if self.params.clip and not name.startswith(_QUERIES_AND_KEYS):
            weight = self._clip(weight, matrix, level)
        return self.round(weight, level)

    def _clip(self, weight: Tensor, matrix: Tensor, level: Bits) -> Tensor:
        """weight [out, in], in each row and group cut to the size whose rounding changes the outputs least."""
        size = weight.shape[1] if self.params.group_size == -1 else self.params.group_size
        groups = [slice(start, start + size) for start in range(0, weight.shape[1], size)]
        group_of = group_columns(weight.shape[1], self.params.group_size, weight.device)
        largest = torch.stack([weight[:, own].abs().amax(dim=1) for own in groups], dim=1)  # [out, groups]
        limit, smallest = largest, torch.full_like(largest, float("inf"))

        def cut(limit: Tensor) -> Tensor:
            return weight.clamp(-limit[:, group_of], limit[:, group_of])

        for share in _CUTS:
            change = self.round(cut(share * largest), level).weight - weight
            errors = [((change[:, own] @ matrix[own, own]) * change[:, own]).sum(dim=1) for own in groups]
            error = torch.stack(errors, dim=1)
            limit = torch.where(error < smallest, share * largest, limit)
            smallest = torch.minimum(error, smallest)
        return cut(limit)
