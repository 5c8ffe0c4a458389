"""The Compressor interface, and the base class that walks the blocks for compressors working linear by linear."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from kick.blocks import Block, BlockWalk, Decoder, Linear, Listener, find_decoder
from kick.calibration import Calibration
from kick.errors import LevelError
from kick.settings import Knob, Level, Pattern

__all__ = ["Compressor", "Knob", "LayerwiseCompressor", "Progress", "Statistic"]

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what): progress(3, 30, "model.layers.2")."""


def no_progress(done: int, total: int, what: str) -> None:
    """The progress of someone who is not watching."""


class Compressor(ABC):
    """Turns a dense model into a compressed one.

    A subclass names itself, says which levels it takes, and declares its hyper-parameters in `Params`. What went
    differently than asked (a layer skipped, a fallback taken) it tells to `warn`; that goes into the checkpoint's
    record.
    """

    name: ClassVar[str]
    knob: ClassVar[Knob]
    needs_calibration: ClassVar[bool] = False

    class Params(BaseModel):
        """Hyper-parameters: validated, and part of the setting's identity."""

        model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, params: BaseModel | None = None, seed: int = 0) -> None:
        self.params: Any = params if params is not None else self.Params()
        self.seed = seed
        self.warnings: list[str] = []
        self.layers: dict[str, dict[str, float]] = {}

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    @abstractmethod
    def compress(
        self,
        model: nn.Module,
        level: Level | None,
        calibration: Calibration | None,
        *,
        progress: Progress = no_progress,
    ) -> nn.Module:
        """The compressed model: `model` changed in place, or a new one. `calibration` is there if it is needed."""


class Statistic(ABC):
    """What is gathered from the inputs of a group of linears, in float32 or better, in one pass."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.in_features = in_features
        self.device = device
        self.tokens = 0

    def see(self, inputs: Tensor) -> None:
        """inputs: [tokens, in]"""
        self.tokens += inputs.shape[0]
        self.add(inputs)

    @abstractmethod
    def add(self, inputs: Tensor) -> None:
        """Take in a batch of inputs [tokens, in]."""

    def output_error(self, weight: Tensor, change: Tensor) -> float | None:
        """Relative error of the outputs that `change` [out, in] makes to `weight`, if this statistic can tell."""
        return None


class LayerwiseCompressor(Compressor):
    """A compressor that treats each linear inside the decoder blocks by itself: implement `solve`.

    With a `statistic`, the blocks are walked in order: a block's statistics come from inputs that the compressed blocks
    before it produced; linears that share an input share one statistic. Without, no model is run at all.
    Embeddings, norms, biases and the head stay as they are.
    """

    statistic: ClassVar[type[Statistic] | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.needs_calibration = cls.statistic is not None

    @abstractmethod
    def solve(self, weight: Tensor, statistic: Any, level: Any) -> Tensor:
        """weight [out, in] in the model's precision -> the compressed weight [out, in]."""

    @torch.no_grad()
    def compress(
        self,
        model: nn.Module,
        level: Level | None,
        calibration: Calibration | None,
        *,
        progress: Progress = no_progress,
    ) -> nn.Module:
        decoder = find_decoder(model)
        check_divisible(decoder, level)
        walk = None
        if self.statistic is not None:
            if calibration is None:
                raise LevelError(f"{self.name} needs calibration text.", "Give a calibration source.")
            walk = BlockWalk(model, decoder, calibration.tokens)
        last = decoder.blocks[-1]
        for index, block in enumerate(decoder.blocks):
            progress(index, len(decoder.blocks), block.name)
            statistics = self._statistics(walk, block) if walk else {}
            for linear in block.linears:
                self._solve_linear(linear, statistics.get(linear), level)
            if walk and block is not last:
                walk.propagate(block)
        progress(len(decoder.blocks), len(decoder.blocks), last.name)
        return model

    def _statistics(self, walk: BlockWalk, block: Block) -> dict[Linear, Statistic]:
        assert self.statistic is not None
        statistics: dict[Linear, Statistic] = {}
        listeners: dict[Linear, Listener] = {}
        for group in block.groups:
            first = group.linears[0]
            shared = self.statistic(first.weight.shape[1], first.weight.device)
            listeners[first] = shared.see
            statistics |= dict.fromkeys(group.linears, shared)
        walk.collect(block, listeners)
        for linear, statistic in statistics.items():
            if statistic.tokens == 0:
                self.warn(f"{linear.name} received no calibration token; its inputs count as equal.")
        return statistics

    def _solve_linear(self, linear: Linear, statistic: Statistic | None, level: Level | None) -> None:
        before = linear.weight
        after = self.solve(before, statistic, level).to(before.dtype)
        size = before.float().norm()
        change = after.float() - before.float()
        errors = {"weight_error": float(change.norm() / size) if size else 0.0}
        if statistic is not None and (error := statistic.output_error(before.float(), change)) is not None:
            errors["reconstruction_error"] = error
        self.layers[linear.name] = errors
        before.copy_(after)


def check_divisible(decoder: Decoder, level: Level | None) -> None:
    """Raise LevelError before anything is changed if an N:M pattern does not divide some linear's input dimension."""
    if not isinstance(level, Pattern):
        return
    for linear in decoder.linears:
        in_features = linear.weight.shape[1]
        if in_features % level.of:
            raise LevelError(
                f"pattern {level} does not fit {linear.name}: {level.of} does not divide its {in_features} inputs.",
                "Choose an M that divides every input dimension, or a sparsity.",
            )
