"""AST's objective: masked weights, the dense model as teacher, masks that follow the weights."""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kick import adapters
from kick.blocks import Decoder
from kick.levels import Pattern
from kick.spec import Spec

from ..training import parallel
from ..training.domains import Domains
from ..training.objective import Objective, cross_entropy, groups_of
from ..training.spec import Training
from .optimizer import DecayingAdamW
from .schedule import Decay, Masks, decay_at, pattern_at
from .slorb import Branch, add_branch
from .sparse import SparseLinear


class Method(Spec):
    """What makes AST of plain sparse training; its baselines are other values of these."""

    masks: Masks = Field(
        default="adaptive",
        description="adaptive: by magnitude again and again, with a straight-through gradient; fixed: those of the "
        "weights as they come; iterative, gradual: magnitude pruning in stages or by the cubic schedule",
    )
    mask_every: int = Field(default=10, ge=1, description="steps between updates of the masks")
    decay: Decay = Field(default="annealing", description="of pruned weights; constant is static SR-STE")
    decay_most: float = Field(default=1e-4, ge=0, description="lambda after its ramp")
    decay_ramp: float = Field(default=0.25, gt=0, le=1, description="share of the steps over which lambda grows")
    second_moment: Literal["gradient", "momentum"] = "gradient"
    decay_into: Literal["momentum", "gradient"] = Field(
        default="momentum", description="gradient: plain AdamW on what is decayed, as the authors' code for LLaMA"
    )
    distillation: float = Field(default=0.67, ge=0, le=1, description="a in a KL(teacher || student) + (1 - a) CE")
    divergence: Literal["forward", "reverse"] = "forward"
    temperature: float = Field(default=1.0, gt=0, description="of the distillation; the authors' code has 2")
    slorb: int = Field(default=0, ge=0, description="block of the low-rank branch (16 in the paper); 0: none")
    slorb_start: Literal["means", "zeros"] = "means"


class SparseTraining(Objective):
    """Trains `model` under masks of `pattern`. `teacher`: the dense model, for distillation.

    domains: whose weights in the mixture follow their losses, every `update_every` steps.
    """

    def __init__(
        self,
        model: Any,
        decoder: Decoder,
        pattern: Pattern,
        method: Method,
        teacher: Any = None,
        domains: Domains | None = None,
        update_every: int = 0,
    ) -> None:
        super().__init__(model.requires_grad_(True))
        self.pattern, self.method = pattern, method
        self.domains, self.update_every = domains, update_every
        self._teacher = [teacher]  # in a list: not a part of what is trained, saved or shared out
        begin = pattern_at(0, 10**9, pattern, method.masks)
        self.linears = [SparseLinear(linear, begin, method.masks == "adaptive") for linear in decoder.linears]
        self._hooks: list[Any] = []
        if method.slorb:
            for linear in self.linears:
                linear.module.add_module("slorb", Branch(linear, method.slorb, method.slorb_start))
                self._hooks.append(linear.module.register_forward_hook(add_branch))
        self.weights = sum(linear.dense.numel() for linear in self.linears)
        self._optimizer: DecayingAdamW | None = None

    def forward(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.logits(tokens)
        teacher, share = self._teacher[0], self.method.distillation
        if teacher is None or not share or not self.training:
            return {"loss": cross_entropy(logits, labels)}
        with torch.no_grad():
            wanted = teacher(tokens, use_cache=False).logits
        ce, kl = distillation(wanted, logits, labels, self.method.temperature, self.method.divergence == "reverse")
        return {"loss": share * kl + (1 - share) * ce, "cross_entropy": ce, "divergence": kl}

    def optimizer(self, spec: Training) -> torch.optim.Optimizer:
        masks = {linear.dense: linear for linear in self.linears}

        def mask_of(parameter: Tensor) -> Tensor | None:
            linear = masks.get(parameter)  # type: ignore[call-overload]
            return parallel.own_part(linear.mask, parameter) if linear else None

        self._optimizer = DecayingAdamW(
            groups_of(self, spec),
            spec.learning_rate,
            spec.betas,
            spec.eps,
            mask_of,
            self.method.second_moment,
            self.method.decay_into,
        )
        return self._optimizer

    def companions(self) -> list[nn.Module]:
        return [teacher for teacher in self._teacher if teacher is not None]

    def begin_step(self, step: int, spec: Training) -> None:
        method = self.method
        if self._optimizer is not None:
            self._optimizer.decay = decay_at(step, spec.steps, method.decay_most, method.decay, method.decay_ramp)

    def end_step(self, step: int, spec: Training) -> dict[str, Any]:
        """The masks are taken anew every `mask_every` steps: |m_t - m_(t-1)| and |m_t - m_0| over all weights."""
        assert self._optimizer is not None
        told: dict[str, Any] = {"decay": self._optimizer.decay}
        if self.domains is not None and (step + 1) % self.update_every == 0:
            told |= self.domains.update(self)
        if self.method.masks == "fixed" or (step + 1) % self.method.mask_every:
            return told
        pattern = pattern_at(step + 1, spec.steps, self.pattern, self.method.masks)
        flips = [linear.update(pattern) for linear in self.linears]
        now, since = (sum(count) / self.weights for count in zip(*flips, strict=True))
        return {**told, "flip_rate": now, "initial_flip_rate": since}

    def finish(self) -> None:
        """The model becomes an ordinary one: N of M, with the branch as an adapter."""
        found = {}
        for hook in self._hooks:
            hook.remove()
        for linear in self.linears:
            if self.method.masks in ("iterative", "gradual"):
                linear.update(self.pattern)  # a short run may end before its last stage
            linear.freeze()
            if self.method.slorb:
                found[linear.name] = linear.module.slorb.adapter()  # type: ignore[operator, union-attr]
                del linear.module.slorb
        adapters.attach(self.model, found)


def distillation(
    teacher: Tensor, student: Tensor, labels: Tensor, temperature: float, reverse: bool
) -> tuple[Tensor, Tensor]:
    """(cross-entropy, KL(teacher || student), or the other way round): means over the labelled predictions.

    Logits [sequences, length, vocabulary]. At a temperature T the divergence is T^2 KL (Hinton et al., 1503.02531).
    """
    counted = labels[:, 1:].flatten() != -100
    wanted, given = (logits[:, :-1].flatten(0, 1)[counted].float() for logits in (teacher, student))
    log_q = given.log_softmax(dim=-1)
    ce = nn.functional.nll_loss(log_q, labels[:, 1:].flatten()[counted])
    if temperature != 1:
        log_q = (given / temperature).log_softmax(dim=-1)
    log_p = (wanted / temperature).log_softmax(dim=-1)
    first, second = (log_q, log_p) if reverse else (log_p, log_q)
    return ce, temperature**2 * (first.exp() * (first - second)).sum(dim=-1).mean()
