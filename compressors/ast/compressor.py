"""AST: N:M sparse weights trained with the dense model as teacher.

    kick compress MODEL ast@2:4 --out DIR --param data=DIR --param steps=300 --param slorb=16

Huang et al., "Pruning Large Language Models with Semi-Structural Adaptive Sparse Training", arXiv 2407.20584. Masks
follow the weights, pruned weights decay under an annealed SR-STE, the dense model teaches, and a low-rank branch
(SLoRB) can stand beside the sparse weights; `ast@2:4 > awq@4` quantises afterwards with zeros kept. Other values of
the parameters give the baselines: fixed masks, static SR-STE, iterative and gradual magnitude pruning.
"""

import copy
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import nn

from kick import adapters, distributed
from kick.blocks import Linear, find_decoder, largest_block_list, parameter_count
from kick.calibration import Calibration
from kick.compressor import Compressor, Cost, Knob, Progress, check_divisible, no_progress
from kick.errors import ConfigError, LevelError
from kick.levels import Level, Pattern
from kick.loading import load_model, load_skeleton, load_tokenizer
from kick.measured import STRAY_ZEROS
from kick.models import fetch, find_source, fingerprint

from ..training.domains import Domains, Loading
from ..training.figures import keep
from ..training.loop import train
from ..training.spec import Training
from ..training.text import TextData, find_domains
from .objective import Method, SparseTraining
from .slorb import check_blocks


class AST(Compressor):
    name = "ast"
    knob = Knob.PATTERN

    class Params(Training, TextData, Method, Loading):
        update_every: int = Field(default=0, ge=0, description="steps between new weights of domains; 0: they stay")
        learning_rate: float = Field(default=2e-4, gt=0)
        weight_decay: float = Field(default=0.1, ge=0)
        teacher: str | None = Field(
            default=None, description="a model source to distil from; by default the model as it comes"
        )

        @model_validator(mode="after")
        def _says_nothing_in_vain(self) -> "AST.Params":
            unread = sorted(self.model_fields_set & Loading.model_fields.keys())
            if unread and not self.update_every:
                raise ValueError(f"{unread[0]} is about new weights of domains, and update_every: 0 sets none")
            if self.teacher is not None and not self.distillation:
                raise ValueError("a teacher is named, and distillation: 0 learns nothing from it")
            return self

    def inputs(self) -> dict[str, str]:
        teacher = self.params.teacher
        read = {"data": self.params.fingerprint(), **self.params.held_out_fingerprint()}
        return read | ({"teacher": fingerprint(fetch(find_source(teacher)))} if teacher is not None else {})

    def trained_on(self) -> Iterable[str]:
        return chain(self.params.beginnings(), self.params.held_out_beginnings(self.params.text_field))

    def remarks(self) -> Iterable[str]:
        return self.params.remarks()

    def cost(self, level: Level | None, skeleton: nn.Module) -> Cost:
        params, parameters = self.params, parameter_count(skeleton)
        blocks = largest_block_list(skeleton)[1]
        pruned = sum(weight.numel() for block in blocks for weight in block.parameters() if weight.ndim == 2)
        branches = pruned // params.slorb if params.slorb else 0
        cost = params.cost(parameters + branches, teacher=self._teacher_size(parameters))
        masks = 2 * pruned  # the one now, and the first
        cost = replace(cost, memory_bytes=cost.memory_bytes + masks)
        if not params.update_every:
            return cost
        domains, updates = len(find_domains(params.data)), 1 + params.steps // params.update_every
        measured = params.measuring(domains, updates, params.sequence_length, parameters)
        return replace(cost, operations=cost.operations + measured)

    def compress(
        self,
        model: nn.Module,
        level: Level | None,
        calibration: Calibration | None,
        *,
        progress: Progress = no_progress,
    ) -> nn.Module:
        if not isinstance(level, Pattern):
            raise LevelError(f"ast takes an N:M pattern, not '{level}'.", "For example ast@2:4.")
        params = self.params
        decoder = find_decoder(model)
        if params.sharding == "fsdp":
            check_shards(decoder.linears, level, distributed.world())
        check_divisible(dict.fromkeys(decoder.linears, level))
        if params.slorb:
            adapters.refuse_attached(model, "ast with slorb")
            check_blocks(decoder.linears, params.slorb)
        dtype, device = next(model.parameters()).dtype, str(next(model.parameters()).device)
        teacher = self._teacher(model, decoder.linears, device) if params.distillation else None
        model = model.float()  # weights are trained in float32 whatever they are stored in
        with self.work_folder() as folder:
            held = {"held_out": params.held_out, "validation": params.validation} if params.update_every else {}
            mixture = params.open(self.tokenizer, params.sequence_length, self.seed, **held)
            size = parameter_count(model)
            domains = Domains(mixture, params, model, size, params.micro_batch) if params.update_every else None
            objective = SparseTraining(model, decoder, level, params, teacher, domains, params.update_every)
            history = train(
                objective, mixture, params, folder, seed=self.seed, device=device, progress=progress, what=self.name
            )
            objective.finish()
            flips = history.column("flip_rate")[1]
            self.facts = {"training": history.totals(), **_flips(flips)}
            self.facts |= {"domain_weights": mixture.weights} if domains else {}
            keep(history, folder / "kept")
        return model.requires_grad_(False).to(dtype).eval()

    def _teacher_size(self, own: int) -> int:
        """Parameters of the teacher; 0 without one."""
        if not self.params.distillation:
            return 0
        if self.params.teacher is None:
            return own
        teacher = load_skeleton(fetch(find_source(self.params.teacher)), "float32")
        return parameter_count(teacher)

    def _teacher(self, model: nn.Module, linears: list[Any], device: str) -> nn.Module:
        if self.params.teacher is not None:
            path = fetch(find_source(self.params.teacher))
            teacher = load_model(path, "float32", device)
            ours: Any = model
            same = teacher.config.vocab_size == ours.config.vocab_size  # type: ignore[union-attr]
            if same and self.tokenizer is not None:
                same = load_tokenizer(path).get_vocab() == self.tokenizer.get_vocab()
            if not same:
                raise ConfigError(
                    f"the teacher '{self.params.teacher}' has another vocabulary than the model.",
                    "A teacher must speak in the same tokens.",
                )
        else:
            zeros = sum(int((linear.weight == 0).sum()) for linear in linears)
            if zeros > STRAY_ZEROS * sum(linear.weight.numel() for linear in linears):
                raise ConfigError(
                    "ast distils from the dense model, and the one it was given is already sparse.",
                    "Name a teacher, or set distillation to 0.",
                )
            if self.stages_before:
                self.warn("its teacher is what the stages before it left, not the dense model; `teacher` names another")
            teacher = copy.deepcopy(model)
        dtype = torch.bfloat16 if self.params.bfloat16(device) else torch.float32  # it computes in this anyway
        return teacher.to(dtype).requires_grad_(False).eval()


def _flips(rates: list[float]) -> dict[str, float]:
    """Of the shares of masks that changed at an update: the peak, the mean over the last quarter, the last."""
    if not rates:
        return {}
    last = rates[-max(1, len(rates) // 4) :]
    return {"peak_flip_rate": max(rates), "last_quarter_flip_rate": sum(last) / len(last), "last_flip_rate": rates[-1]}


def check_shards(linears: list[Linear], pattern: Pattern, processes: int) -> None:
    """Raise ConfigError where sharding over so many processes would cut groups of `pattern`.

    FSDP cuts a tensor's first dimension: the outputs, but of GPT-2's layers the inputs, along which groups lie.
    """
    for linear in linears:
        inputs = linear.weight.shape[1]
        if linear.transposed and processes > 1 and -(-inputs // processes) % pattern.of:
            raise ConfigError(
                f"{processes} processes cut the {inputs} inputs of '{linear.name}' inside groups of {pattern.of}.",
                f"Take a number of processes that cuts them into multiples of {pattern.of}, or sharding: ddp.",
            )
