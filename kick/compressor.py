"""The Compressor interface, and the base class that walks the blocks for compressors working linear by linear."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Protocol

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from kick.blocks import Block, Decoder, Group, Linear, find_decoder, outline
from kick.calibration import Calibration
from kick.errors import ConfigError, KickError, LevelError
from kick.levels import Knob, Level, Pattern, parse_level, pruning
from kick.policy import OWL, Policy
from kick.quantization import Grid, Quantized
from kick.spec import Spec
from kick.streaming import resident
from kick.walk import BlockWalk, Listener, collect_head

__all__ = ["Compressor", "Cost", "Knob", "LayerwiseCompressor", "Progress", "Statistic"]


@dataclass(frozen=True)
class Cost:
    """What training takes: tokens learned from (0: gradients alone are asked for), floating-point operations, and bytes
    for weights, gradients and optimizer."""

    tokens: int
    operations: float
    memory_bytes: int


class Progress(Protocol):
    """Called as progress(3, 30, "model.layers.2"): done, of how many, and what. detail: what changes all the time."""

    def __call__(self, done: int, total: int, what: str, detail: str = "") -> None: ...


def no_progress(done: int, total: int, what: str, detail: str = "") -> None:
    """The progress of someone who is not watching."""


class Compressor(ABC):
    """Turns a dense model into a compressed one.

    A subclass names itself, says which levels it takes, and declares its hyper-parameters in `Params`. What went
    differently than asked (a layer skipped, a fallback taken) it tells to `warn`; that goes into the checkpoint's
    record.
    """

    name: ClassVar[str]
    knob: ClassVar[Knob]
    needs_calibration: bool = False
    brings_a_model: ClassVar[bool] = False  # made elsewhere: it stands first, and is given shapes without weights
    streams: ClassVar[bool] = False  # works on a model whose blocks are read from disk one at a time

    class Params(Spec):
        """Hyper-parameters: validated, and part of the setting's identity."""

    def __init__(self, params: BaseModel | None = None, seed: int = 0) -> None:
        self.params: Any = params if params is not None else self.Params()
        self.seed = seed
        self.policy = Policy()
        self.level: Level | None = None  # that `follow` was told
        self.stages_before = 0  # in a chain: what it is given is no dense model
        self.warnings: list[str] = []
        self.layers: dict[str, dict[str, Any]] = {}  # what is known of each linear, for the record
        self.grids: dict[str, Grid] = {}  # those of quantised linears
        self.stored_bits: dict[str, float] = {}  # a weight, of quantised linears that no Grid describes
        self.patterns: dict[str, Pattern] = {}  # N:M patterns found on linears, beyond those that the level asks for
        self.facts: dict[str, Any] = {}  # whatever else the record should say of this stage
        self.tokenizer: Any = None  # of the model to compress
        self.tokenizer_path: Path | None = None  # where a model that was brought has its own
        self.expected_parameters: int | None = None  # of the result, where parameters are taken away: verified
        self.workspace: Path | None = None  # a folder of its own, still there when a killed process is started again
        self.notes: dict[str, Any] = {}  # facts about the linears that are being treated, for their record
        self._at = ""

    def warn(self, message: str) -> None:
        """Put `message` into the checkpoint's record, with the linears that are being treated."""
        self.warnings.append(f"{self._at}: {message}" if self._at else message)

    @contextmanager
    def work_folder(self) -> Iterator[Path]:
        """Where to keep what is needed to go on after a kill; what lies in its `kept` goes into the checkpoint."""
        if self.workspace is not None:
            self.workspace.mkdir(parents=True, exist_ok=True)
            yield self.workspace
        else:  # nobody wants to go on
            with TemporaryDirectory() as folder:
                yield Path(folder)

    def follow(self, policy: Policy, level: Level | None) -> None:
        """Take `level`, and `policy` for its linears, before the next `compress`.

        Raises LevelError for a level that this compressor cannot reach, ConfigError for a policy that it cannot follow.
        """
        if not policy.is_uniform:
            raise ConfigError(
                f"{self.name} does not work linear by linear: it takes no layer rules.", "Leave them out."
            )
        if level is not None:
            self.check_level(level)
        self.level = level

    def check_level(self, level: Level) -> None:  # noqa: B027 (most reach all that their knob allows)
        """Raise LevelError for a level of the right kind that this compressor cannot reach."""

    def check_model(self, skeleton: Callable[[], nn.Module]) -> None:  # noqa: B027 (most take any model)
        """Raise LevelError where the model to compress does not take what `follow` was told.

        Called while a sweep is planned. skeleton: gives that model without weights, on the meta device; not at once.
        """

    def asked_levels(self, level: Level | None, decoder: Decoder) -> dict[str, Level]:
        """By the names of linears, the level that each was to reach in the last `compress`.

        One that is free in where it prunes promises nothing of any linear, unless it is a pattern.
        """
        return {linear.name: level for linear in decoder.linears} if isinstance(level, Pattern) else {}

    def inputs(self) -> dict[str, str]:
        """What it reads besides the source, and its fingerprint: part of the setting's identity.

        Called after `follow`, before anything is written. Raises KickError for what is not there.
        """
        return {}

    def remarks(self) -> Iterable[str]:
        """What a plan that uses it should say: allowed, and hardly meant."""
        return ()

    def trained_on(self) -> Iterable[str]:
        """Documents that it learns from besides calibration text, or the first of very many: none may be scored."""
        return ()

    def cost(self, level: Level | None, skeleton: nn.Module) -> Cost | None:
        """What training `skeleton`, the model without its weights, would take; None for what does not train."""
        return None

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
    Embeddings, norms and biases stay as they are. `policy` says which linear takes which level; the head takes one only
    where a rule names it.
    """

    streams = True
    statistic: ClassVar[type[Statistic] | None] = None
    group: Group  # the one that `solve_group` is called for
    linears: list[Linear]  # those of the group whose weights it is given
    levels: dict[str, Level]  # of each linear that was compressed, known once `compress` has begun

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.needs_calibration = cls.statistic is not None

    def solve(self, weight: Tensor, statistic: Any, level: Any) -> Tensor | Quantized:
        """weight [out, in] in the model's precision -> the compressed weight [out, in]."""
        raise NotImplementedError(f"{type(self).__name__} has neither solve nor solve_group")

    def solve_group(self, weights: list[Tensor], statistic: Any, level: Any) -> list[Tensor | Quantized]:
        """Weights [out, in] of linears that share an input and a level. By default one after the other."""
        return [self.solve(weight, statistic, level) for weight in weights]

    def enter_block(self, block: Block, walk: BlockWalk | None) -> None:
        """Called before a block is compressed."""

    def leave_block(self, block: Block) -> None:
        """Called after a block was compressed."""

    def follow(self, policy: Policy, level: Level | None) -> None:
        self.policy, self.level = policy, level
        self.needs_calibration = self.statistic is not None or policy.allocation is not None
        for asked in (level, *map(self._parse, policy.asked_levels())):
            if asked is not None:
                self.check_level(asked)
        policy.check(level)

    def check_model(self, skeleton: Callable[[], nn.Module]) -> None:
        """Rules that cover no linear, patterns that do not divide a linear's inputs."""
        if self.policy.layers or isinstance(pruning(self.level), Pattern):
            decoder = outline(skeleton())
            check_divisible(self.policy.assign(decoder, self.level, self._parse, lambda _: [0.0] * len(decoder.blocks)))

    def asked_levels(self, level: Level | None, decoder: Decoder) -> dict[str, Level]:
        return self.levels

    def _parse(self, text: str) -> Level | None:
        return parse_level(text, self.knob)

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
        levels = self._levels(model, decoder, level, calibration)
        self.levels = {linear.name: level for linear, level in levels.items() if level is not None}
        walk = self._walk(model, decoder, calibration) if self.statistic is not None else None
        for index, block in enumerate(decoder.blocks):
            progress(index, len(decoder.blocks), block.name)
            with resident(block.module, changed=True):
                self.enter_block(block, walk)
                statistics = self._gather(walk, block, levels) if walk else {}
                for group in block.groups:
                    self._compress_group(group, statistics.get(group), levels)
                self.leave_block(block)
                if walk and block is not decoder.blocks[-1]:
                    walk.propagate(block)
        if decoder.head is not None and levels[decoder.head] is not None:
            progress(len(decoder.blocks), len(decoder.blocks), decoder.head.name)
            self._compress_head(model, decoder.head, calibration, levels)
        progress(len(decoder.blocks), len(decoder.blocks), decoder.blocks[-1].name)
        return model

    def _compress_head(
        self, model: nn.Module, head: Linear, calibration: Calibration | None, levels: dict[Linear, Level | None]
    ) -> None:
        """With statistics of what reaches the head through all the compressed blocks."""
        statistic = None
        if self.statistic is not None and calibration is not None:
            statistic = self.statistic(head.weight.shape[1], head.weight.device)
            collect_head(model, head, calibration.tokens, statistic.see)
        self._compress_group(Group((head,)), statistic, levels)

    def _levels(
        self, model: nn.Module, decoder: Decoder, level: Level | None, calibration: Calibration | None
    ) -> dict[Linear, Level | None]:
        def outliers(rule: OWL) -> list[float]:
            return outlier_shares(self._walk(model, decoder, calibration), decoder, rule.outlier)

        levels = self.policy.assign(decoder, level, self._parse, outliers)
        check_divisible(levels)
        return levels

    def _walk(self, model: nn.Module, decoder: Decoder, calibration: Calibration | None) -> BlockWalk:
        if calibration is None:
            raise LevelError(f"{self.name} needs calibration text.", "Give a calibration source.")
        return BlockWalk(model, decoder, calibration.tokens, getattr(torch, calibration.precision))

    def _gather(self, walk: BlockWalk, block: Block, levels: dict[Linear, Level | None]) -> dict[Group, Statistic]:
        assert self.statistic is not None
        statistics: dict[Group, Statistic] = {}
        for group in block.groups:
            if any(levels[linear] is not None for linear in group.linears):
                weight = group.linears[0].weight
                statistics[group] = self.statistic(weight.shape[1], weight.device)
        if statistics:
            walk.collect(block, {group: statistic.see for group, statistic in statistics.items()})
        for group, statistic in statistics.items():
            if statistic.tokens == 0:
                names = ", ".join(linear.name for linear in group.linears)
                self.warn(f"{names}: no calibration token came by; its inputs count as equal.")
        return statistics

    def _compress_group(self, group: Group, statistic: Statistic | None, levels: dict[Linear, Level | None]) -> None:
        by_level: dict[Level, list[Linear]] = {}
        for linear in group.linears:
            if (level := levels[linear]) is not None:
                by_level.setdefault(level, []).append(linear)
        if not by_level:
            return
        self.group = group
        for level, linears in by_level.items():
            self.linears = linears
            self._at = ", ".join(linear.name for linear in linears)
            self.notes = {}
            try:
                solved = self.solve_group([linear.weight for linear in linears], statistic, level)
            except KickError as error:
                raise type(error)(f"{self._at}: {error.message}", error.hint) from error
            for linear, result in zip(linears, solved, strict=True):
                self._put(linear, result, statistic, level)
        self._at = ""

    def _put(self, linear: Linear, result: Tensor | Quantized, statistic: Statistic | None, level: Level) -> None:
        if isinstance(result, Quantized):
            self.grids[linear.name] = result.grid
            result = result.weight
        before = linear.weight
        after = result.to(before.dtype)
        size = before.float().norm()
        change = after.float() - before.float()
        facts: dict[str, Any] = {"level": str(level), "weight_error": float(change.norm() / size) if size else 0.0}
        if statistic is not None and (error := statistic.output_error(before.float(), change)) is not None:
            facts["reconstruction_error"] = error
        self.layers[linear.name] = facts
        self.layers[linear.name] |= self.notes
        before.copy_(after)


@torch.no_grad()
def outlier_shares(walk: BlockWalk, decoder: Decoder, outlier: float) -> list[float]:
    """For each block the share of weights whose |W_ij| ||X_j|| exceeds `outlier` times their mean."""
    return [_outlier_share(walk, block, outlier) for block in decoder.blocks]


def _outlier_share(walk: BlockWalk, block: Block, outlier: float) -> float:
    squares: dict[Group, Tensor | float] = dict.fromkeys(block.groups, 0.0)

    def listener(group: Group) -> Listener:
        def add(inputs: Tensor) -> None:
            squares[group] = squares[group] + inputs.float().square().sum(dim=0)

        return add

    def scores() -> Iterator[Tensor]:
        for group, total in squares.items():
            if isinstance(total, Tensor):  # where no token came by nothing is known
                yield from (linear.weight.float().abs() * total.sqrt() for linear in group.linears)

    with resident(block.module):
        walk.collect(block, {group: listener(group) for group in block.groups})
        weights = sum(score.numel() for score in scores())
        mean = sum(float(score.double().sum()) for score in scores()) / weights
        above = sum(int((score > outlier * mean).sum()) for score in scores())
        walk.propagate(block)
    return above / weights


def check_divisible(levels: dict[Linear, Level | None]) -> None:
    """Raise LevelError before anything is changed if an N:M pattern does not divide some linear's input dimension."""
    for linear, level in levels.items():
        pattern = pruning(level)
        in_features = linear.weight.shape[1]
        if isinstance(pattern, Pattern) and in_features % pattern.of:
            raise LevelError(
                f"pattern {pattern} does not fit {linear.name}: {pattern.of} does not divide its {in_features} inputs.",
                "Choose an M that divides every input dimension, or a sparsity.",
            )
