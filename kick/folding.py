"""Where the inputs of a group of linears can be rescaled for free: in the norm or the linear just before them.

If channel j of the inputs is divided by s_j and column j of the linears multiplied by it, nothing changes; dividing is
free where another weight already scales that channel. Which one does is found by trying, not by names.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from kick import adapters
from kick.blocks import Block, Group, Linear

_TOLERANCE = 0.01  # of what scaling alone changes: a wrong fold undoes some of it, the right one all but rounding
_ROUNDING = 1e-5  # of the block's own outputs
_MATTERS = 1e-3  # likewise: what changes less may be lost in rounding


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
            if (adapter := adapters.of(self.linear.module)) is not None:
                adapter.up.div_(scale[:, None].to(adapter.up))
        else:
            weight: Tensor = self.module.weight.data  # type: ignore[assignment]
            plus = 1.0 if self.kind == "norm_plus_one" else 0.0
            weight.copy_((weight.float() + plus) / scale - plus)
        bias = getattr(self.module, "bias", None)
        if isinstance(bias, Tensor):
            bias.data.div_(scale.to(bias.dtype))


@torch.no_grad()
def find_fold(block: Block, group: Group, run: Callable[[], Tensor]) -> Fold | None:
    """A fold for the inputs of `group`, or None. The block is in float32.

    run: what the block adds to some fixed inputs, [n, s, h]. Every token is looked at by itself, since a few with huge
    activations would hide the others. Of several that undo the scaling the one that does so best is taken: where a
    gate's activations are small, it is nearly linear.
    """
    channels = group.linears[0].weight.shape[1]
    device = group.linears[0].weight.device
    scale = torch.rand(channels, generator=torch.Generator().manual_seed(0)).to(device) * 1.5 + 0.5
    before = run()
    outputs = before.norm(dim=-1)
    alone = (_tried(group, scale, None, run) - before).norm(dim=-1)
    if bool((alone <= _MATTERS * outputs).all()):
        return None  # these inputs do not matter to the block's output (an expert without tokens): nothing can be told
    allowed = _TOLERANCE * alone + _ROUNDING * outputs
    best, smallest = None, 1.0
    for fold in _candidates(block, group, channels):
        left = (_tried(group, scale, fold, run) - before).norm(dim=-1)
        worst = float(torch.where(left == 0, 0.0, left / allowed).max())
        if worst < smallest:  # not so where it is not a number
            best, smallest = fold, worst
    return best


def _tried(group: Group, scale: Tensor, fold: Fold | None, run: Callable[[], Tensor]) -> Tensor:
    """What the block gives with the group's columns multiplied and `fold` divided; then all is as it was."""
    modules = [linear.module for linear in group.linears] + ([fold.module] if fold is not None else [])
    parameters = [parameter for module in modules for parameter in module.parameters()]
    held = [adapter for module in modules if (adapter := adapters.of(module)) is not None]
    kept = [parameter.data.clone() for parameter in parameters]
    kept_adapters = [(adapter.down.clone(), adapter.up.clone()) for adapter in held]
    multiply_columns(group, scale)
    if fold is not None:
        fold.divide(scale)
    found = run()
    for parameter, own in zip(parameters, kept, strict=True):
        parameter.data.copy_(own)
    for adapter, (down, up) in zip(held, kept_adapters, strict=True):
        adapter.down.copy_(down)
        adapter.up.copy_(up)
    return found


def multiply_columns(group: Group, scale: Tensor) -> None:
    """Make up for inputs that were divided by scale [in]."""
    for linear in group.linears:
        linear.weight.mul_(scale.to(linear.weight.dtype))
        multiply_adapter(linear, scale)


def multiply_adapter(linear: Linear, scale: Tensor) -> None:
    """The same for what an adapter makes of the inputs."""
    if (adapter := adapters.of(linear.module)) is not None:
        adapter.down.mul_(scale.to(adapter.down))


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
