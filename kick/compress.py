"""From a model source and a setting to a checkpoint on disk: one stage, the same for every compressor."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from torch import nn

from kick import __version__, plugins
from kick import checkpoint as checkpoints
from kick.blocks import find_decoder
from kick.calibration import Calibration, CalibrationSpec, draw
from kick.compressor import Compressor, Progress, no_progress
from kick.config import explain
from kick.errors import ConfigError, KickError, LevelError
from kick.meter import Meter, versions
from kick.models import ModelSource, fetch, load_model, load_tokenizer
from kick.settings import Level, Pattern, Setting, Sparsity, parse_level


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a checkpoint holds."""

    source: ModelSource
    fingerprint: str
    setting: Setting
    calibration: CalibrationSpec
    dtype: str
    device: str


def prepare(setting: Setting) -> tuple[Compressor | None, Level | None]:
    """The compressor of `setting`, parameters checked, and its level. (None, None) for dense.

    Raises UnknownNameError, LevelError or ConfigError: all that can be wrong with a setting before a model is loaded.
    """
    if setting.is_dense:
        if setting.level or setting.params:
            raise LevelError("'dense' takes no level and no parameters.", "It is the model as it came.")
        return None, None
    compressor = plugins.compressor(setting.compressor)
    try:
        level = parse_level(setting.level, compressor.knob)
    except LevelError as error:
        raise LevelError(f"setting '{setting.name}': {error.message}", error.hint) from error
    try:
        params = compressor.Params(**setting.params)
    except ValidationError as error:
        raise ConfigError(f"setting '{setting.name}': {explain(error)}", _known_params(compressor)) from error
    return compressor(params, seed=setting.seed), level


def _known_params(plugin: type[Compressor]) -> str:
    names = list(plugin.Params.model_fields)
    return f"{plugin.name} takes {', '.join(names)}." if names else f"{plugin.name} takes no parameters."


def compress(
    recipe: Recipe,
    out: Path,
    progress: Progress = no_progress,
    start: Path | None = None,
    calibration: Calibration | None = None,
) -> checkpoints.Checkpoint:
    """Carry out `recipe` and write the checkpoint to `out`. Nothing is left there if it fails.

    `start` is a directory that already holds the source's weights, to spare reading a slower format again;
    `calibration` is what the recipe's calibration gave when it was drawn before.
    """
    compressor, level = prepare(recipe.setting)
    with Meter(recipe.device) as meter:
        path = start or fetch(recipe.source)
        model = load_model(path, recipe.dtype, recipe.device)
        tokenizer = load_tokenizer(path)
        before = checkpoints.measure(model).sparsity
        if compressor is not None:
            if not compressor.needs_calibration:
                calibration = None
            elif calibration is None:
                calibration = draw(recipe.calibration, tokenizer)
            try:
                model = compressor.compress(model, level, calibration, progress=progress)
            except KickError:
                raise
            except Exception as error:  # a plugin may raise anything; --debug shows where
                raise KickError(f"{recipe.setting.name} failed: {type(error).__name__}: {error}") from error
        measured = checkpoints.measure(model, level, find_decoder(model))
        _check_reached(recipe.setting, level, measured, model, before)
    warnings = list(compressor.warnings) if compressor else []
    if compressor is not None and measured.uncovered:
        warnings.append(
            f"{len(measured.uncovered)} weights inside the blocks belong to no linear layer and stay dense "
            f"({1 - measured.coverage:.1%} of the blocks' weights): {', '.join(measured.uncovered[:4])}"
            + (", ..." if len(measured.uncovered) > 4 else ".")
        )
    record = {
        "kick_version": __version__,
        "setting": recipe.setting.model_dump(mode="json"),
        "setting_name": recipe.setting.name,
        "source": {"name": recipe.source.name, "fingerprint": recipe.fingerprint, "note": recipe.source.note},
        "calibration": calibration.record() if compressor and calibration else None,
        "dtype": recipe.dtype,
        "device": recipe.device,
        "warnings": warnings,
        "seconds": round(meter.seconds, 3),
        "peak_memory_bytes": meter.peak_bytes,
        "versions": versions(),
        "layers": compressor.layers if compressor else {},
    }
    return checkpoints.save(out, model, tokenizer, record, measured)


def _check_reached(
    setting: Setting, level: Level | None, measured: checkpoints.Measured, model: nn.Module, before: float
) -> None:
    """Refuse to write a checkpoint that is not what it is called.

    Sparsity may differ by the rounding of one row. Zeros that the source had `before` come on top where they stand in
    rows of their own making.
    """
    broken = [name for name, parameter in model.named_parameters() if not bool(parameter.isfinite().all())]
    if broken:
        raise KickError(
            f"{setting.name}: {broken[0]} holds values that are not finite.",
            "The compressor is at fault, or the source.",
        )
    if isinstance(level, Pattern) and measured.violations:
        raise KickError(
            f"{setting.name}: {measured.violations} groups of {level.of} keep more than {level.keep}.",
            "The compressor is at fault.",
        )
    if isinstance(level, Sparsity):
        shortest = min(min(layer["shape"]) for layer in measured.layers.values())
        rounding = 1 / shortest
        if measured.sparsity < level.fraction - rounding or measured.sparsity - before > level.fraction + rounding:
            raise KickError(
                f"{setting.name} reached a sparsity of {measured.sparsity:.4f}.", "The compressor is at fault."
            )
