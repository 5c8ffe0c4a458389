"""Sheared LLaMA: learn which parts of a model to keep for a shape chosen before, cut it, and train it on.

    kick compress MODEL sheared@24x384x1024x6 --out DIR --param data=DIR --param validation=DIR

Xia et al., "Sheared LLaMA: Accelerating Language Model Pre-training via Structured Pruning", arXiv 2310.06694. Weights
and hard-concrete masks are trained together under a constraint that brings the number of layers, hidden dimensions,
heads and intermediate dimensions to the target (equations 1 and 2); text comes from the domains that lag (algorithm 1).
The result is a plain model of exactly the target's shape.
"""

from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from pydantic import Field
from torch import Tensor, nn

from kick.calibration import Calibration
from kick.compressor import Compressor, Cost, Knob, Progress, no_progress
from kick.errors import ConfigError, LevelError, unknown_name
from kick.levels import Level, Shape
from kick.spec import Spec

from ..training.figures import draw
from ..training.loop import train
from ..training.objective import Objective, cross_entropy, mean_loss
from ..training.spec import Training
from ..training.text import Mixture, TextData
from .cut import cut
from .domains import LLAMA2_LOSSES, LLAMA2_PARAMETERS, predicted_loss, updated_weights
from .masked import MaskedModel
from .masks import Constraint, Masks
from .shape import ModelShape, find_shape, parse_shape


class Loading(Spec):
    """Dynamic batch loading: how the weights of the domains follow their losses."""

    reference: str | dict[str, float | tuple[float, float, float]] = Field(
        default="source",
        description="losses to reach: source (the dense model's own), llama2 (a scaling law through 7B, 13B and 70B), "
        "or for each domain a number, or the losses of three models of `sizes`",
    )
    sizes: tuple[float, float, float] = Field(default=LLAMA2_PARAMETERS, description="parameters of those models")
    held_out: int = Field(default=16, ge=1, description="sequences a domain, for its loss")
    validation: str | dict[str, str] | None = Field(
        default=None, description="where those are from, in the form of `data`; else kept back from it"
    )
    dynamic: bool = Field(default=True, description="false: the weights stay, losses are logged all the same")
    pruning_every: int = Field(default=50, ge=1, description="steps between updates while pruning")
    continuing_every: int = Field(default=400, ge=1, description="and while training on")
    clamp: bool = Field(default=True, description="false: losses below their reference lower a weight (authors' code)")
    floor: float = Field(default=0.0, ge=0, lt=1, description="share of a uniform mixture; 1e-4 in the authors' code")
    cap: float = Field(default=1.0, gt=0, le=1, description="the most that one domain gets")


class Sheared(Compressor):
    name = "sheared"
    knob = Knob.SHAPE

    class Params(TextData, Loading):
        pruning: Training = Training(steps=3200, batch_size=32, sequence_length=4096, warmup=0.1)
        continuing: Training | None = Field(default=None, description="null: the model is left as it was cut")
        masks: Literal["learned", "random"] = Field(
            default="learned", description="random: what learned ones must beat; nothing is trained while pruning"
        )
        heads: Literal["groups", "within"] = Field(
            default="groups", description="key heads go with their query heads, or query heads go from every group"
        )
        constraint: Constraint = Field(default="shares", description="counts: as the paper prints it, see docs")
        beta: float = Field(
            default=0.83, gt=0, description="temperature of the hard concrete; 2/3 in the authors' code"
        )
        mask_learning_rate: float = Field(default=1.0, gt=0)
        lambda_learning_rate: float = Field(default=1.0, gt=0)
        target_warmup: float = Field(default=0.2, gt=0, le=1, description="share of steps until the target holds")

    def inputs(self) -> dict[str, str]:
        return {"data": self.params.fingerprint()}

    def check_level(self, level: Level) -> None:
        assert isinstance(level, Shape)
        parse_shape(level.name)

    def cost(self, level: Level | None, skeleton: nn.Module) -> Cost:
        assert isinstance(level, Shape)
        full: Any = skeleton
        source = ModelShape.of(full.config)
        target = find_shape(level.name, source, self.params.heads == "within")
        small = count_parameters(type(full), target.configuration(full.config))
        nothing = Cost(0, 0.0, 0)
        learned = self.params.masks == "learned"
        pruning = self.params.pruning.cost(sum(p.numel() for p in full.parameters())) if learned else nothing
        continuing = self.params.continuing.cost(small) if self.params.continuing else nothing
        return Cost(
            pruning.tokens + continuing.tokens,
            pruning.operations + continuing.operations,
            max(pruning.memory_bytes, continuing.memory_bytes),
        )

    def compress(
        self,
        model: nn.Module,
        level: Level | None,
        calibration: Calibration | None,
        *,
        progress: Progress = no_progress,
    ) -> nn.Module:
        if not isinstance(level, Shape):
            raise LevelError(f"sheared at level '{level}'.", "Expected a target shape, for example 24x384x1024x6.")
        params = self.params
        within = params.heads == "within"
        full: Any = model
        source = ModelShape.of(full.config)
        target = find_shape(level.name, source, within)
        if params.continuing and params.continuing.sequence_length != params.pruning.sequence_length:
            raise ConfigError("pruning and continuing with sequences of different lengths.", "They read the same text.")
        dtype, device = full.dtype, str(full.device)
        full = full.float()
        small = target.configuration(full.config)
        parameters = count_parameters(type(full), small)
        mixture = params.open(
            self.tokenizer,
            params.pruning.sequence_length,
            self.seed,
            held_out=params.held_out,
            validation=params.validation,
        )
        losses = Domains(mixture, params, device)
        losses.reference = self._reference(full, losses, parameters)
        self.facts = {"target": str(target), "reference_losses": losses.reference}
        with self.work_folder() as folder:
            if params.masks == "learned":
                masks = Masks(source, target, params.beta, self.seed, within).to(device)
                objective = Shearing(full, masks, params, losses, self.seed)
                history = train(
                    objective,
                    mixture,
                    params.pruning,
                    folder / "pruning",
                    seed=self.seed,
                    device=device,
                    progress=progress,
                    what="sheared, pruning",
                    more_follows=True,
                )
                self.facts["pruning"] = history.totals() | masks.record()
                draw(history, folder / "kept" / "pruning")
                objective.masked.remove()
                z = masks.final()
            else:
                z = random_masks(source, target, within, self.seed)
            self.facts["layers_kept"] = z["layer"][0].nonzero().flatten().tolist()
            result = cut(full, {name: value.to(device) for name, value in z.items()}, target, within)
            if params.continuing:
                continued = Continuing(result, losses, params.continuing_every)
                history = train(
                    continued,
                    mixture,
                    params.continuing,
                    folder / "continuing",
                    seed=self.seed + 1,
                    device=device,
                    progress=progress,
                    what="sheared, training on",
                )
                self.facts["continuing"] = history.totals()
                draw(history, folder / "kept" / "continuing")
        stages = [self.facts[stage] for stage in ("pruning", "continuing") if stage in self.facts]
        self.facts["training"] = {key: sum(stage[key] for stage in stages) for key in ("steps", "tokens", "hours")}
        self.facts["domain_weights"] = mixture.weights
        self.expected_parameters = parameters
        return result.requires_grad_(False).to(dtype).eval()

    def _reference(self, model: Any, losses: "Domains", parameters: int) -> dict[str, float]:
        """Of each domain the loss that a model of the target's size should have."""
        given = self.params.reference
        if given == "source":
            return losses.measure(Objective(model))
        if isinstance(given, str):
            if given != "llama2":
                raise ConfigError(f"reference '{given}'.", "Expected source, llama2, or losses by domain.")
            given = {name: tuple(values) for name, values in LLAMA2_LOSSES.items()}
        found = {}
        for name in losses.mixture.streams:
            if name not in given:
                raise unknown_name("reference loss for the domain", name, given)
            values = given[name]
            sizes = self.params.sizes
            found[name] = predicted_loss(sizes, values, parameters) if isinstance(values, tuple) else values
        return found


class Domains:
    """The held-out loss of each domain, and what it makes of the mixture's weights."""

    def __init__(self, mixture: Mixture, params: Loading, device: str) -> None:
        self.mixture, self.params = mixture, params
        self.held = {
            name: torch.from_numpy(stream.held.astype(np.int64)).to(device) for name, stream in mixture.streams.items()
        }
        self.reference: dict[str, float] = {}

    def measure(self, objective: Objective) -> dict[str, float]:
        was_training = objective.training
        objective.eval()
        losses = {name: mean_loss(objective, held) for name, held in self.held.items()}
        objective.train(was_training)
        return losses

    def update(self, objective: Objective) -> dict[str, Any]:
        """Measure, set new weights; what the history should tell of it. All processes take the first one's losses."""
        losses = broadcast_object_list([self.measure(objective)])[0]
        if self.params.dynamic:
            self.mixture.weights = updated_weights(
                self.mixture.weights,
                losses,
                self.reference,
                clamp=self.params.clamp,
                floor=self.params.floor,
                cap=self.params.cap,
            )
        return {"domain_loss": losses, "domain_weight": self.mixture.weights}


class Shearing(Objective):
    """Cross-entropy of the masked model, and the constraint: small in weights and masks, large in the multipliers."""

    def __init__(self, model: Any, masks: Masks, params: Any, losses: Domains, seed: int) -> None:
        super().__init__(model.requires_grad_(True))
        self.masks, self.params, self.losses, self.seed = masks, params, losses, seed
        self.masked = MaskedModel(model, masks.within)
        self.step, self.progress = 0, 0.0

    def begin_step(self, step: int, spec: Training) -> None:
        self.masks.clamp()
        self.step, self.progress = step, step / max(1.0, self.params.target_warmup * spec.steps)

    def forward(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if self.training:  # else it runs under what was set
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)  # one z a step, everywhere
            self.masked.z = self.masks.sample(generator)
        ce = cross_entropy(self.logits(tokens), labels)
        constraint = self.masks.lagrangian(self.progress, self.params.constraint)
        return {"loss": ce + constraint, "cross_entropy": ce, "constraint": constraint}

    def unshared(self) -> list[nn.Parameter]:
        return list(self.masks.parameters())

    def clipped(self) -> list[nn.Parameter]:
        """The weights: the constraint's gradient would drown theirs."""
        return list(self.model.parameters())

    def optimizer(self, spec: Training) -> torch.optim.Optimizer:
        plain = super().optimizer(spec)
        own = {id(parameter) for parameter in self.masks.parameters()}
        groups: list[dict[str, Any]] = [
            {"params": kept, "weight_decay": group["weight_decay"]}
            for group in plain.param_groups
            if (kept := [parameter for parameter in group["params"] if id(parameter) not in own])
        ]
        alphas, lambdas = list(self.masks.log_alphas.values()), list(self.masks.lambdas.values())
        groups += [
            {"params": alphas, "lr": self.params.mask_learning_rate, "weight_decay": 0.0},
            {"params": lambdas, "lr": self.params.lambda_learning_rate, "weight_decay": 0.0, "maximize": True},
        ]
        return torch.optim.AdamW(groups, spec.learning_rate, spec.betas, spec.eps)

    def end_step(self, step: int, spec: Training) -> dict[str, Any]:
        told = self.masks.record()
        if (step + 1) % self.params.pruning_every == 0 or step + 1 == spec.steps:
            counts = {name: round(float(open_.detach().mean())) for name, open_ in self.masks.expected_open().items()}
            self.masked.z = self.masks.final({name: max(1, count) for name, count in counts.items()})
            told |= self.losses.update(self)
        return told


class Continuing(Objective):
    """Continued pre-training of the cut model on text that follows the domains' losses."""

    def __init__(self, model: Any, losses: Domains, every: int) -> None:
        super().__init__(model.requires_grad_(True))
        self.losses, self.every = losses, every

    def end_step(self, step: int, spec: Training) -> dict[str, Any]:
        if (step + 1) % self.every == 0 or step + 1 == spec.steps:
            return self.losses.update(self)
        return {}


def random_masks(source: ModelShape, target: ModelShape, within: bool, seed: int) -> dict[str, Tensor]:
    """z of 0 and 1 in the target's numbers, by lot."""
    masks = Masks(source, target, 0.83, seed, within)
    generator = torch.Generator().manual_seed(seed)
    for log_alpha in masks.log_alphas.values():
        log_alpha.data = torch.rand(log_alpha.shape, generator=generator)
    return {name: (z > 0).float() for name, z in masks.final().items()}


def count_parameters(kind: Any, config: Any) -> int:
    """Parameters of a model with this configuration; no memory is taken for them."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        model = kind(config)
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())
