"""Is a compressor fit to be compared with the others? Its checks, on tiny models with random weights."""

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kick.blocks import find_decoder
from kick.calibration import Calibration
from kick.compressor import Compressor, LayerwiseCompressor
from kick.errors import LevelError
from kick.levels import Bits, Joint, Knob, Level, Pattern, Sparsity, parse_level, pruning
from kick.testing.check import Check, ConformanceError, run_all
from kick.testing.tiny import tiny_calibration, tiny_model, tiny_tokenizer

_EXAMPLES = {
    Knob.SPARSITY: ("0.3", "0.75"),
    Knob.PATTERN: ("2:4", "4:8"),
    Knob.BITS: ("4",),
    Knob.JOINT: ("0.5+4bit", "2:4+4bit"),
}
ARCHITECTURES = ("llama", "gpt2")


def check_compressor(
    kind: type[Compressor],
    params: dict[str, Any] | None = None,
    levels: Sequence[str] | None = None,
    architectures: Sequence[str] = ARCHITECTURES,
) -> None:
    """Run every check on `kind`. Raises ConformanceError listing all that fail.

    params: for all checks; what trains gets its text here, and few steps. levels: those to try, instead of examples for
    each kind of level; a compressor with target shapes must give some. architectures: of the tiny models.
    """
    run_all(kind.__name__, compressor_checks(kind, params, levels, architectures))


def compressor_checks(
    kind: type[Compressor],
    params: dict[str, Any] | None = None,
    levels: Sequence[str] | None = None,
    architectures: Sequence[str] = ARCHITECTURES,
) -> list[Check]:
    """The checks that `check_compressor` runs, each to be run alone."""
    if levels is None:
        levels = [text for knob in kind.knob for text in _EXAMPLES.get(knob, ())] or [""]
    if kind.knob & Knob.SHAPE and levels == [""]:
        raise ConformanceError(f"{kind.__name__} takes target shapes.", "Give `levels` to try.")
    asked = [parse_level(text, kind.knob) for text in levels]
    subject = _Subject(kind, params or {}, tuple(architectures))
    checks = {
        "reaches the level": partial(_reaches, subject, asked),
        "keeps the pattern": partial(_keeps_pattern, subject, asked),
        "lands on a grid": partial(_lands_on_grid, subject, asked),
        "is deterministic": partial(_is_deterministic, subject, asked[0]),
        "gives finite weights": partial(_is_finite, subject, asked),
        "leaves the embeddings alone": partial(_leaves_embeddings, subject, asked[0]),
        "keeps embeddings and head tied": partial(_keeps_tie, subject, asked[0]),
        "survives saving and loading": partial(_round_trip, subject, asked[0]),
        "refuses what it cannot do": partial(_refuses, subject),
    }
    return [Check(name, run) for name, run in checks.items()]


@dataclass(frozen=True)
class _Subject:
    """A compressor with its parameters, and the tiny models that it is tried on."""

    kind: type[Compressor]
    params: dict[str, Any]
    architectures: tuple[str, ...]

    def new(self) -> Compressor:
        compressor = self.kind(self.kind.Params(**self.params), seed=0)
        compressor.tokenizer = tiny_tokenizer()
        return compressor

    def compress(self, level: Level | None, architecture: str | None = None) -> tuple[nn.Module, Compressor]:
        architecture = architecture or self.architectures[0]
        compressor = self.new()
        try:
            model = compressor.compress(tiny_model(architecture), level, tiny_calibration())
        except Exception as error:
            raise ConformanceError(f"{architecture} at level {level}: {type(error).__name__}: {error}") from error
        if not isinstance(model, nn.Module):
            raise ConformanceError(f"compress returned {type(model).__name__}, not a model.")
        return model, compressor

    def each(self, levels: Sequence[Level | None]) -> Any:
        for level in levels:
            for architecture in self.architectures:
                yield level, architecture, *self.compress(level, architecture)


def _linears(model: nn.Module) -> dict[str, Tensor]:
    return {linear.name: linear.weight for linear in find_decoder(model).linears}


def _reaches(subject: _Subject, levels: Sequence[Level | None]) -> None:
    """Pruned: every linear where it works linear by linear, else all together, to the rounding of a row.

    Where parameters are taken away: as many as were announced, and fewer than before.
    """
    for level, architecture, model, compressor in subject.each(levels):
        if (expected := compressor.expected_parameters) is not None:
            before, after = (sum(p.numel() for p in each.parameters()) for each in (tiny_model(architecture), model))
            if not after == expected < before:
                counts = f"{before} parameters became {after}, announced were {expected}"
                raise ConformanceError(f"{architecture} at level {level}: {counts}.")
            continue
        asked = pruning(level)
        if not isinstance(asked, Sparsity):
            continue
        weights = _linears(model)
        if not isinstance(compressor, LayerwiseCompressor):
            weights = {"the model": torch.cat([weight.reshape(-1, 32) for weight in weights.values()])}
        for name, weight in weights.items():
            found, rounding = float((weight == 0).float().mean()), 1 / min(weight.shape)
            rounded_to_zero = 1.0 if isinstance(level, Joint) else 0.0
            if not asked.fraction - rounding <= found <= asked.fraction + rounding + rounded_to_zero:
                raise ConformanceError(f"{architecture}: {name} has a sparsity of {found:.3f}, asked was {asked}.")


def _keeps_pattern(subject: _Subject, levels: Sequence[Level | None]) -> None:
    from kick.measured import pattern_violations

    for level, architecture, model, _ in subject.each(levels):
        asked = pruning(level)
        if not isinstance(asked, Pattern):
            continue
        for name, weight in _linears(model).items():
            if broken := pattern_violations(weight, asked):
                raise ConformanceError(f"{architecture}: {broken} groups of {name} keep more than {asked} allows.")


def _lands_on_grid(subject: _Subject, levels: Sequence[Level | None]) -> None:
    for level, architecture, model, compressor in subject.each(levels):
        if not isinstance(level, Bits | Joint):
            continue
        bits = level.bits if isinstance(level, Joint) else level
        for name, weight in _linears(model).items():
            grid = compressor.grids.get(name)
            if grid is None:
                raise ConformanceError(f"{architecture}: {name} has no grid; put it into `self.grids`.")
            if grid.bits != bits.width or grid.violations(weight):
                raise ConformanceError(f"{architecture}: {name} is not on a grid of {bits} bits.")


def _is_deterministic(subject: _Subject, level: Level | None) -> None:
    first, second = (subject.compress(level)[0].state_dict() for _ in range(2))
    for name, weight in first.items():
        if not torch.equal(weight, second[name]):
            raise ConformanceError(f"{name} differs between two runs with the same seed.")


def _is_finite(subject: _Subject, levels: Sequence[Level | None]) -> None:
    for _, architecture, model, _ in subject.each(levels):
        for name, weight in model.state_dict().items():
            if not bool(weight.isfinite().all()):
                raise ConformanceError(f"{architecture}: {name} holds values that are not finite.")


def _leaves_embeddings(subject: _Subject, level: Level | None) -> None:
    """Unless it trains the model, or takes parameters away."""
    for architecture in subject.architectures:
        before: Any = tiny_model(architecture)
        if subject.new().cost(level, before) is not None:
            continue
        after: Any
        after, compressor = subject.compress(level, architecture)
        if compressor.expected_parameters is not None:
            continue
        if not torch.equal(before.get_input_embeddings().weight, after.get_input_embeddings().weight):
            raise ConformanceError(f"{architecture}: the embeddings changed.")
        if not torch.equal(before.get_output_embeddings().weight, after.get_output_embeddings().weight):
            raise ConformanceError(f"{architecture}: the head changed.")


def _keeps_tie(subject: _Subject, level: Level | None) -> None:
    model: Any = subject.compress(level)[0]
    if model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
        raise ConformanceError("embeddings and head were one tensor, and are two now.")
    if not model.config.tie_word_embeddings:
        raise ConformanceError("the configuration no longer says that embeddings and head are tied.")


def _round_trip(subject: _Subject, level: Level | None) -> None:
    from transformers import AutoModelForCausalLM

    for architecture in subject.architectures:
        model: Any = subject.compress(level, architecture)[0]
        tokens = tiny_calibration().tokens
        with tempfile.TemporaryDirectory() as folder:
            try:
                model.save_pretrained(folder)
                if not list(Path(folder).glob("*.safetensors")):
                    raise ConformanceError(f"{architecture}: save_pretrained wrote no safetensors.")
                loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
            except ConformanceError:
                raise
            except Exception as error:
                raise ConformanceError(f"{architecture} cannot be saved and loaded: {error}") from error
        with torch.no_grad():
            if not torch.allclose(model(tokens).logits, loaded(tokens).logits, atol=1e-5):
                raise ConformanceError(f"{architecture} gives other logits after saving and loading.")


def _refuses(subject: _Subject) -> None:
    """What it cannot do ends in a LevelError, with the model as it was."""
    if Knob.PATTERN in subject.kind.knob:
        _expect_level_error(subject, Pattern(keep=2, of=7), tiny_calibration(), "2:7 of 32 inputs")
    if subject.new().needs_calibration:
        example = next((text for knob in subject.kind.knob for text in _EXAMPLES.get(knob, ())), "")
        _expect_level_error(subject, parse_level(example, subject.kind.knob), None, "no calibration")


def _expect_level_error(subject: _Subject, level: Level | None, calibration: Calibration | None, what: str) -> None:
    model = tiny_model(subject.architectures[0])
    before = copy.deepcopy(model.state_dict())
    try:
        subject.new().compress(model, level, calibration)
    except LevelError:
        pass
    except Exception as error:
        raise ConformanceError(f"{what} raised {type(error).__name__} instead of LevelError: {error}") from error
    else:
        raise ConformanceError(f"{what} was accepted.")
    if any(not torch.equal(weight, before[name]) for name, weight in model.state_dict().items()):
        raise ConformanceError(f"{what} was refused, but the model was changed before.")
