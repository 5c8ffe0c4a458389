"""Sheared LLaMA: learn which parts of a model to keep for a shape chosen before, cut it, and train it on.

    kick compress MODEL sheared@24x384x1024x6 --out DIR --param data=DIR --param validation=DIR

Xia et al., "Sheared LLaMA: Accelerating Language Model Pre-training via Structured Pruning", arXiv 2310.06694. Weights
and hard-concrete masks are trained together under a constraint that brings the number of layers, hidden dimensions,
heads and intermediate dimensions to the target (equations 1 and 2); text comes from the domains that lag (algorithm 1).
The result is a plain model of exactly the target's shape.
"""

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from safetensors.torch import save_file
from torch import Tensor, nn

from kick import distributed
from kick.blocks import parameter_count
from kick.calibration import Calibration
from kick.compressor import Compressor, Cost, Knob, Progress, no_progress
from kick.errors import LevelError
from kick.levels import Level, Shape
from kick.settings import digest

from ..llama import ModelShape, refuse_remains
from ..training.domains import Domains, Loading
from ..training.figures import keep
from ..training.history import History, together
from ..training.loop import train
from ..training.objective import Objective, cross_entropy, groups_of
from ..training.spec import Training
from ..training.text import TextData, find_domains
from .cut import cut
from .masked import MaskedModel
from .masks import Constraint, Masks
from .shape import find_shape, find_shape_of, parse_shape


class Pruning(Training):
    """Masks settle slowly: a tenth of the steps is warm-up (appendix on training)."""

    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the steps, linear from zero")


_UNITS = {
    "layer": "layers",
    "hidden": "hidden dimensions",
    "head": "key heads",
    "intermediate": "intermediate dimensions",
}


class Sheared(Compressor):
    name = "sheared"
    knob = Knob.SHAPE

    class Params(TextData, Loading):
        pruning_every: int = Field(default=50, ge=1, description="steps between new weights of domains while pruning")
        continuing_every: int = Field(default=400, ge=1, description="and while training on")
        pruning: Pruning = Pruning()
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

        @model_validator(mode="after")
        def _says_nothing_in_vain(self) -> "Sheared.Params":
            of_masks = {"pruning_every", "target_warmup", "mask_learning_rate", "lambda_learning_rate", "constraint"}
            if self.masks == "random" and (unread := sorted(self.model_fields_set & (of_masks | {"beta"}))):
                raise ValueError(f"{unread[0]} is about learning masks, and masks: random learns none")
            if self.continuing is None and "continuing_every" in self.model_fields_set:
                raise ValueError("continuing_every is about training on, and continuing: null leaves that out")
            return self

        @model_validator(mode="after")
        def _reads_one_text(self) -> "Sheared.Params":
            if self.continuing and self.continuing.sequence_length != self.pruning.sequence_length:
                raise ValueError("pruning and continuing read the same text: give them one sequence_length")
            return self

    def inputs(self) -> dict[str, str]:
        found = {"data": self.params.fingerprint(), **self.params.held_out_fingerprint()}
        if isinstance(self.level, Shape) and self.level.name.startswith("like:"):
            found["target"] = digest(str(find_shape_of(self.level.name)))
        return found

    def check_level(self, level: Level) -> None:
        assert isinstance(level, Shape)
        parse_shape(level.name)

    def trained_on(self) -> Iterable[str]:
        return chain(self.params.beginnings(), self.params.held_out_beginnings(self.params.text_field))

    def remarks(self) -> Iterable[str]:
        stages = [stage for stage in (self.params.pruning, self.params.continuing) if stage]
        return dict.fromkeys(remark for stage in stages for remark in stage.remarks())

    def cost(self, level: Level | None, skeleton: nn.Module) -> Cost:
        assert isinstance(level, Shape)
        full: Any = skeleton
        source = ModelShape.of(full.config)
        params, stages, measured = self.params, [Cost(0, 0.0, 0)], 0.0
        target = find_shape(level.name, source, params.heads == "within")
        small = count_parameters(type(full), target.configuration(full.config))
        large = parameter_count(full)
        domains = len(find_domains(params.data))
        if params.masks == "learned":
            stages.append(params.pruning.cost(large))
            updates = 1 + params.pruning.steps // params.pruning_every
            measured += params.measuring(domains, updates, params.pruning.sequence_length, large)
        if params.continuing:
            stages.append(params.continuing.cost(small))
            updates = params.continuing.steps // params.continuing_every
            measured += params.measuring(domains, updates, params.continuing.sequence_length, small)
        return Cost(
            sum(stage.tokens for stage in stages),
            sum(stage.operations for stage in stages) + measured,
            max(stage.memory_bytes for stage in stages),
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
            raise LevelError(f"sheared takes a target shape, not '{level}'.", "For example sheared@24x384x1024x6.")
        params = self.params
        within = params.heads == "within"
        refuse_remains(model, "sheared")
        full: Any = model
        source = ModelShape.of(full.config)
        target = find_shape(level.name, source, within)
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
        losses = Domains(mixture, params, full, parameters, params.pruning.micro_batch)
        self.facts = {"target": str(target), "reference_losses": losses.reference}
        stages = {}
        with self.work_folder() as folder:
            if params.masks == "learned":
                masks = Masks(source, target, params.beta, self.seed, within).to(device)
                objective = Shearing(full, masks, params, losses, self.seed)
                stages["pruning"] = self._train("pruning", objective, mixture, folder, device, progress)
                self.facts["pruning"] = stages["pruning"].totals() | masks.record()
                if distributed.is_main():
                    save_file(dict(masks.log_alphas), folder / "kept" / "pruning" / "log_alphas.safetensors")
                objective.masked.remove()
                if off := masks.off():
                    found = ", ".join(
                        f"{opened:.1f} of {asked} {_UNITS[name]}{f' in layer {row}' if rows > 1 else ''}"
                        for name, (opened, asked, row, rows) in off.items()
                    )
                    self.warn(
                        f"masks had not settled: expected to be open, of those asked for, were {found}; the last ones "
                        "were kept or cut by a narrow margin. More steps of pruning help, or constraint: counts."
                    )
                z = masks.final()
            else:
                z = random_masks(source, target, within, self.seed)
            self.facts["layers_kept"] = z["layer"][0].nonzero().flatten().tolist()
            result = cut(full, {name: value.to(device) for name, value in z.items()}, target, within)
            full.to("meta")  # it is not needed any more, and large
            if params.continuing:
                continued = Continuing(result, losses, params.continuing_every)
                stages["continuing"] = self._train("continuing", continued, mixture, folder, device, progress)
                self.facts["continuing"] = stages["continuing"].totals()
        if stages:
            self.facts["training"] = together(list(stages.values()))
        self.facts["domain_weights"] = mixture.weights
        self.expected_parameters = parameters
        return result.requires_grad_(False).to(dtype).eval()

    def _train(
        self, stage: str, objective: Objective, mixture: Any, folder: Path, device: str, progress: Progress
    ) -> History:
        first = stage == "pruning"
        history = train(
            objective,
            mixture,
            getattr(self.params, stage),
            folder / stage,
            seed=self.seed if first else self.seed + 1,
            device=device,
            progress=progress,
            what=f"sheared, {stage}",
            more_follows=first and self.params.continuing is not None,
        )
        keep(history, folder / "kept" / stage)
        return history


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
        alphas, lambdas = list(self.masks.log_alphas.values()), list(self.masks.lambdas.values())
        groups = [
            *groups_of(self.model, spec),
            {"params": alphas, "lr": self.params.mask_learning_rate, "weight_decay": 0.0},
            {"params": lambdas, "lr": self.params.lambda_learning_rate, "weight_decay": 0.0, "maximize": True},
        ]
        return torch.optim.AdamW(groups, spec.learning_rate, spec.betas, spec.eps)

    def end_step(self, step: int, spec: Training) -> dict[str, Any]:
        self.masks.clamp()
        told = self.masks.record()
        if (step + 1) % self.params.pruning_every == 0 or step + 1 == spec.steps:
            counts = {name: round(float(open_.detach().mean())) for name, open_ in self.masks.expected_open().items()}
            self.masked.z = self.masks.final({name: max(1, count) for name, count in counts.items()})
            told |= self.losses.update(self)
            told["open_by_row"] = {name: open_.tolist() for name, open_ in self.masks.expected_open().items()}
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
    return parameter_count(model)
