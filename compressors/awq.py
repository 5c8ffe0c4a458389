"""AWQ: before rounding, make the columns that large activations meet larger, and so their rounding errors smaller.

    kick compress MODEL awq@4 --out DIR         --param group_size=64

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", arXiv 2306.00978. For each
group of linears that share an input, s = mean|X|^alpha with the alpha out of 20 that gives the smallest output error
||(Q(W s) / s - W) X||; 1/s goes into the norm or the linear before them. Where nothing can take it, s is 1.
Zeros stay zero, so a pruned model keeps its mask.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kick.blocks import Block, Group
from kick.folding import Fold, find_fold, multiply_adapter
from kick.levels import Bits
from kick.quantization import Quantized
from kick.walk import BlockWalk

from .rounding import Quantizer
from .statistics import Hessian

_ALPHAS = 20


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
        if fold is None or len(weights) != len(self.group.linears):
            self._unscaled.append(self._at)
            return [self.round(weight, level) for weight in whole]
        scale = self._search(torch.cat(whole), statistic, level)
        quantized = [self.round(weight * scale, level) for weight in whole]
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

    def _search(self, weight: Tensor, statistic: Activations, level: Bits) -> Tensor:
        """The best scale [in] for weight [out, in]."""
        matrix = statistic.matrix
        magnitude = statistic.mean_magnitude.clamp(min=1e-4)
        best, smallest = torch.ones_like(magnitude), float("inf")
        for step in range(_ALPHAS):
            scale = magnitude ** (step / _ALPHAS)
            scale = scale / (scale.max() * scale.min()).sqrt()
            change = self.round(weight * scale, level).weight / scale - weight
            error = float(((change @ matrix) * change).sum())
            if error < smallest:
                best, smallest = scale, error
        return best
