"""Where the inputs of a group of linears can be rescaled for free: in the norm or the linear just before them.

If channel j of the inputs is divided by s_j and column j of the linears multiplied by it, nothing changes; dividing is
free where another weight already scales that channel. Which one does is found by trying, not by names.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from kick.blocks import Block, Group, Linear

_TOLERANCE = 1e-3  # relative, in float32: a wrong fold is off by a tenth and more


@dataclass(frozen=True)
class Fold:
    """`module` scales the channels: a norm by its weight, one by 1 + weight (Gemma's), or a linear by its rows."""

    name: str  # inside the block
    module: nn.Module
    kind: Literal["norm", "norm_plus_one", "linear"]
    linear: Linear | None = None

    def divide(self, scale: Tensor) -> None:
        """Divide what reaches the channels by scale [channels]."""
        if self.linear is not None:
            self.linear.weight.div_(scale[:, None].to(self.linear.weight.dtype))
        else:
            weight: Tensor = self.module.weight.data  # type: ignore[assignment]
            plus = 1.0 if self.kind == "norm_plus_one" else 0.0
            weight.copy_((weight.float() + plus) / scale - plus)
        bias = getattr(self.module, "bias", None)
        if isinstance(bias, Tensor):
            bias.data.div_(scale.to(bias.dtype))


@torch.no_grad()
def find_fold(block: Block, group: Group, run: Callable[[], Tensor]) -> Fold | None:
    """A fold for the inputs of `group`, or None. `run` gives what the block adds to some fixed inputs, in float32."""
    channels = group.linears[0].weight.shape[1]
    device = group.linears[0].weight.device
    scale = torch.rand(channels, generator=torch.Generator().manual_seed(0)).to(device) * 1.5 + 0.5
    before = run()
    for fold in _candidates(block, group, channels):
        parameters = [*fold.module.parameters(), *(p for linear in group.linears for p in linear.module.parameters())]
        kept = [parameter.data.clone() for parameter in parameters]
        multiply_columns(group, scale)
        fold.divide(scale)
        after = run()
        for parameter, own in zip(parameters, kept, strict=True):
            parameter.data.copy_(own)
        if float((after - before).norm()) <= _TOLERANCE * float(before.norm()):
            return fold
    return None


def multiply_columns(group: Group, scale: Tensor) -> None:
    """Make up for inputs that were divided by scale [in]."""
    for linear in group.linears:
        linear.weight.mul_(scale.to(linear.weight.dtype))


def _candidates(block: Block, group: Group, channels: int) -> Iterator[Fold]:
    """Everything in the block with a scale for each channel: norms first."""
    own = {linear.module for linear in group.linears}
    linears = {linear.module: linear for linear in block.linears}
    for name, module in block.module.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 1 and len(weight) == channels:
            yield Fold(name, module, "norm")
            yield Fold(name, module, "norm_plus_one")
    for name, module in block.module.named_modules():
        if module in linears and module not in own and linears[module].weight.shape[0] == channels:
            yield Fold(name, module, "linear", linears[module])
