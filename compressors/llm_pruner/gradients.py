"""Gradients on calibration text: their mean g, and where asked the mean of their squares F, in float32.

Only `modules` get any, and a sample's gradient is added up and let go as soon as it is there: with a few blocks at once
the memory is that of the model and of these blocks' sums.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kick.errors import KickError

from ..training.objective import cross_entropy


def collect(
    model: Any, modules: Sequence[nn.Module], tokens: Tensor, squares: bool
) -> dict[nn.Module, tuple[Tensor, Tensor | None]]:
    """Of each module's weight: (g, F or None). tokens [samples, length].

    Raises KickError if they are not finite.
    """
    found: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}
    hooks = []
    asked = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    for module in modules:
        weight: Any = module.weight
        mean = torch.zeros_like(weight, dtype=torch.float32)
        square = torch.zeros_like(mean) if squares else None
        found[module] = (mean, square)
        weight.requires_grad_(True)
        hooks.append(weight.register_post_accumulate_grad_hook(_adder(mean, square, len(tokens))))
    try:
        with torch.enable_grad():
            for sample in tokens.to(model.device):
                loss = cross_entropy(model(sample[None], use_cache=False).logits, sample[None])
                loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, wanted in zip(model.parameters(), asked, strict=True):
            parameter.requires_grad_(wanted)
    for sums in found.values():
        if not all(bool(total.isfinite().all()) for total in sums if total is not None):
            raise KickError("the gradients are not finite.", "Is the model? Are the calibration's tokens its own?")
    return found


def _adder(mean: Tensor, square: Tensor | None, samples: int) -> Any:
    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        mean.add_(gradient, alpha=1 / samples)
        if square is not None:
            square.addcmul_(gradient, gradient, value=1 / samples)
        parameter.grad = None

    return add
