"""What is trained: a model with the loss that it is to make small, and what happens between the steps."""

from typing import Any

import torch
from torch import Tensor, nn

from .spec import Training


class Objective(nn.Module):
    """Plain continued training: next-token cross-entropy under AdamW. Methods override what they do otherwise.

    Everything that a step changes is a parameter or buffer of this module: that is what a run resumes from.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Means over the predictions of a micro-batch [sequences, length]; `loss` is what is made small."""
        return {"loss": cross_entropy(self.logits(tokens), labels)}

    def logits(self, tokens: Tensor) -> Tensor:
        """[sequences, length, vocabulary]"""
        return self.model(tokens, use_cache=False).logits

    def optimizer(self, spec: Training) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups_of(self, spec), spec.learning_rate, spec.betas, spec.eps)

    def companions(self) -> list[nn.Module]:
        """Models that only run beside the one that is trained, a teacher: processes may share them out too."""
        return []

    def unshared(self) -> list[nn.Parameter]:
        """Parameters that stay whole on every process: few, and looked at between the steps."""
        return []

    def clipped(self) -> list[nn.Parameter]:
        """The parameters whose gradients are clipped together."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def begin_step(self, step: int, spec: Training) -> None:
        """Before the forward passes of `step`, counted from 0."""

    def end_step(self, step: int, spec: Training) -> dict[str, Any]:
        """After the optimizer's step: what the history should tell of it."""
        return {}


def groups_of(module: nn.Module, spec: Training) -> list[dict[str, Any]]:
    """The parameters of `module` that learn, as an optimizer takes them: the weight decay is for matrices alone."""
    learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in learned if p.ndim >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in learned if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labelled predictions; logits [sequences, length, vocabulary] predict the token after theirs."""
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100, reduction="mean"
    )


@torch.no_grad()
def mean_loss(objective: Objective, sequences: Tensor, batch_size: int = 8) -> float:
    """Next-token loss over `sequences` [n, length], as `objective` computes it now."""
    total = 0.0
    for part in sequences.split(batch_size):
        losses = objective(part, part)
        total += float(losses.get("cross_entropy", losses["loss"])) * len(part)
    return total / len(sequences)
