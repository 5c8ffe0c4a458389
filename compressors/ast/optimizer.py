"""AdamW whose pruned entries decay: the paper's variant (arXiv 2407.20584, appendix 6.6); plain where none is pruned.

    u_t = b1 u_(t-1) + (1 - b1) g_t                          stored without decay
    u~  = u_t + lambda (1 - m) W                             the decay enters after the momentum
    v_t = b2 v_(t-1) + (1 - b2) (g_t + lambda (1 - m) W)^2   or, as the paper prints it, (u~)^2
    W  -= lr / (1 - b1^t)  u~ / (sqrt(v_t / (1 - b2^t)) + eps)

With decay_into="gradient" it is plain AdamW on g_t + lambda (1 - m) W, as in the authors' code for LLaMA.

With (u~)^2 the optimizer at lambda = 0 would not be AdamW, which the paper says that it is; so the default takes the
gradient, and `second_moment="momentum"` the printed form. Weight decay is decoupled, as in AdamW.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor


class DecayingAdamW(torch.optim.Optimizer):
    """`masks`: of a parameter, its mask (True: kept), or None where it is dense. `decay` is lambda of the next step."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        masks: Callable[[Tensor], Tensor | None],
        second_moment: Literal["gradient", "momentum"] = "gradient",
        decay_into: Literal["momentum", "gradient"] = "momentum",
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.masks, self.second_moment, self.decay_into = masks, second_moment, decay_into
        self.decay = 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)

    def _update(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        (b1, b2), rate, eps = group["betas"], group["lr"], group["eps"]
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros(())
            state["momentum"], state["square"] = torch.zeros_like(weight), torch.zeros_like(weight)
        state["step"] += 1
        step = int(state["step"])
        momentum, square = state["momentum"], state["square"]
        mask = self.masks(weight) if self.decay else None
        pull = None if mask is None else (weight * ~mask).mul_(self.decay)
        if pull is not None and self.decay_into == "gradient":
            gradient, pull = gradient.add(pull), None
        momentum.lerp_(gradient, 1 - b1)
        decayed = momentum if pull is None else momentum + pull
        pulled = gradient if pull is None else gradient.add(pull)
        squared = decayed if self.second_moment == "momentum" else pulled
        square.mul_(b2).addcmul_(squared, squared, value=1 - b2)
        denominator = square.div(1 - b2**step).sqrt_().add_(eps)
        weight.mul_(1 - rate * group["weight_decay"])
        weight.addcdiv_(decayed, denominator, value=-rate / (1 - b1**step))
