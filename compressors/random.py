"""Random pruning: weights chosen by lot become zero. The baseline of pruners.

    kick compress MODEL random@0.5 --out DIR        kick compress MODEL random@2:4 --out DIR

Each matrix draws its own lots from the setting's seed.
"""

import torch
from torch import Tensor

from kick.compressor import Knob, LayerwiseCompressor
from kick.levels import Level

from .masks import keep_largest


class Random(LayerwiseCompressor):
    name = "random"
    knob = Knob.SPARSITY | Knob.PATTERN

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self._lots = torch.Generator().manual_seed(self.seed)

    def solve(self, weight: Tensor, statistic: None, level: Level) -> Tensor:
        """weight [out, in] -> pruned weight [out, in]."""
        lots = torch.rand(weight.shape, generator=self._lots).to(weight.device)
        return weight * keep_largest(lots, level, dim="matrix")
