"""How a model is trained: steps, batches, learning rate, precision. What every compressor that trains takes."""

import math
from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from kick.compressor import Cost
from kick.spec import Spec


class Training(Spec):
    """One stretch of training. A step sees `batch_size` sequences over all processes together."""

    steps: int = Field(default=300, ge=1)
    batch_size: int = Field(default=8, ge=1, description="sequences a step, over all processes")
    micro_batch: int = Field(default=0, ge=0, description="sequences at once on one device; 0: all of its share")
    sequence_length: int = Field(default=256, ge=8, description="tokens")
    learning_rate: float = Field(default=1e-4, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(default=0.03, ge=0, lt=1, description="share of the steps, linear from zero")
    final: float = Field(default=0.1, ge=0, le=1, description="share of the learning rate at the last step")
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0, description="norm of all gradients together")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="of the products; weights and sums stay float32. auto: bfloat16 on CUDA"
    )
    gradient_checkpointing: bool = Field(default=False, description="computes blocks twice to keep less of them")
    sharding: Literal["ddp", "fsdp"] = Field(default="ddp", description="how several processes share the model")
    checkpoint_every: int = Field(default=100, ge=1, description="steps between states to resume from")

    @model_validator(mode="after")
    def _divides(self) -> "Training":
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise ValueError(f"micro_batch {self.micro_batch} does not divide batch_size {self.batch_size}")
        return self

    @property
    def tokens(self) -> int:
        """Tokens that the whole stretch sees; fewer where some of them are padding (instruction pairs)."""
        return self.steps * self.batch_size * self.sequence_length

    def rate(self, step: int) -> float:
        """The share of the learning rate at `step`, counted from 0: up over the warm-up, then down to `final`.

        >>> Training(steps=100, warmup=0.1, final=0.1).rate(4), Training(schedule="constant", warmup=0).rate(299)
        (0.5, 1.0)
        """
        warmup = round(self.warmup * self.steps)
        if step < warmup:
            return (step + 1) / warmup
        if self.schedule == "constant":
            return 1.0
        done = (step - warmup) / max(1, self.steps - 1 - warmup)
        shape = (1 + math.cos(math.pi * done)) / 2 if self.schedule == "cosine" else 1 - done
        return self.final + (1 - self.final) * shape

    def remarks(self) -> Iterator[str]:
        """What is allowed in a sweep, and hardly meant."""
        if self.sharding == "fsdp":
            yield (
                "sharding: fsdp shares the model among processes of torchrun (docs/train.md); a sweep trains in one, "
                "which needs the memory of all"
            )

    def bfloat16(self, device: str) -> bool:
        return self.precision == "bfloat16" or (self.precision == "auto" and device.startswith("cuda"))

    def cost(self, parameters: int, trained: int | None = None, teacher: int = 0) -> Cost:
        """Of training `parameters`, all or `trained` of them, beside a `teacher` that only runs forward.

        6 operations for each parameter and token, 2 of them forwards (Kaplan et al., arXiv 2001.08361); 2 of the other
        4 are saved where a parameter is not trained; gradient checkpointing runs forward once more. 4 bytes for each
        of weight, gradient and AdamW's two moments.
        """
        learned = parameters if trained is None else trained
        again = 2.0 * parameters if self.gradient_checkpointing else 0.0
        operations = self.tokens * (4.0 * parameters + 2.0 * learned + 2.0 * teacher + again)
        return Cost(self.tokens, operations, 4 * (parameters + teacher) + 12 * learned)
