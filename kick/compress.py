"""From a model source and a setting to a checkpoint on disk: one stage, the same for every compressor."""

import glob
import re
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from kick import __version__, adapters, distributed, plugins
from kick import checkpoint as checkpoints
from kick.calibration import Calibration, CalibrationSpec, draw
from kick.compressor import Compressor, Progress, no_progress
from kick.errors import ConfigError, LevelError, about
from kick.files import scratch_directory
from kick.levels import parse_level
from kick.loading import is_skeleton, load_model, load_skeleton, load_tokenizer
from kick.measured import Structure, measure
from kick.meter import Meter, computes_on, versions
from kick.models import ModelSource, fetch, fingerprint
from kick.outcome import Outcome, Step
from kick.settings import Setting, Stage, Variant, digest
from kick.spec import explain
from kick.streaming import open_streamed


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what a checkpoint holds."""

    source: ModelSource
    fingerprint: str
    setting: Setting
    calibration: CalibrationSpec
    dtype: str
    device: str
    stream: bool = False  # blocks are read from disk one at a time; the result is the same

    @classmethod
    def of(
        cls,
        source: ModelSource,
        setting: Setting,
        calibration: CalibrationSpec,
        dtype: str = "float32",
        device: str = "cpu",
        stream: bool = False,
    ) -> "Recipe":
        """Of the files that `source` has now, which are fetched if they are not here."""
        return cls(
            source=source,
            fingerprint=fingerprint(fetch(source)),
            setting=setting,
            calibration=calibration,
            dtype=dtype,
            device=device,
            stream=stream,
        )


def prepare(setting: Setting) -> list[Step]:
    """The steps of `setting`, none for dense.

    Raises UnknownNameError, LevelError or ConfigError: all that can be wrong with a setting before a model is loaded.
    """
    if setting.is_dense:
        if setting.level or not setting.is_uniform:
            raise LevelError("'dense' takes no level and no rules for layers.", "It is the model as it came.")
        try:
            Variant(**setting.params)
        except ValidationError as error:
            raise ConfigError(f"dense: {explain(error)}", "It can be asked with another dtype or lm.") from error
        return []
    steps = [_step(stage, setting) for stage in setting.stages]
    for number, step in enumerate(steps):
        step.compressor.stages_before = number
    for step in steps[1:]:
        if step.compressor.brings_a_model:
            raise LevelError(
                f"setting '{setting.name}': {step.stage} brings a model of its own.", "It can only stand first."
            )
    return steps


def _step(stage: Stage, setting: Setting) -> Step:
    kind = plugins.compressor(stage.compressor)
    with about(f"setting '{setting.name}'"):
        level = parse_level(stage.level, kind.knob)
        try:
            compressor = kind(kind.Params(**stage.params), seed=setting.seed)
        except ValidationError as error:
            raise ConfigError(explain(error), _known_params(kind)) from error
        except TypeError as error:
            raise ConfigError(
                f"{kind.__name__} cannot be made: {error}.", "It is made of (params, seed=...)."
            ) from error
        compressor.follow(stage, level)
    return Step(stage, compressor, level)


def needs_calibration(steps: list[Step]) -> bool:
    return any(step.compressor.needs_calibration for step in steps)


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
    steps, out = prepare(recipe.setting), out.resolve()
    with ExitStack() as stack:
        meter = stack.enter_context(Meter(recipe.device))
        path = start or fetch(recipe.source)
        if recipe.stream:
            check_streamable(steps, recipe.device)
        if steps and steps[0].compressor.brings_a_model:
            model = load_skeleton(path, recipe.dtype)
        elif recipe.stream and (path.is_dir() or steps):  # a dense .gguf file has to be read as a whole, once
            scratch = stack.enter_context(scratch_directory(out.with_name(f".{out.name}.blocks")))
            model = open_streamed(path, recipe.dtype, scratch)
        else:
            model = load_model(path, recipe.dtype, recipe.device)
        tokenizer = load_tokenizer(path)
        if not needs_calibration(steps):
            calibration = None
        known = Structure(adapters=adapters.attached(model))
        done = Outcome(None if is_skeleton(model) else measure(model, structure=known), structure=known)
        workspace = find_workspace(out, recipe, steps)
        for number, step in enumerate(steps, 1):
            step.compressor.workspace = workspace / f"{number}-{step.stage.compressor}"
            if step.compressor.needs_calibration and calibration is None:
                calibration = draw(recipe.calibration, tokenizer, recipe.dtype, recipe.device)
            step.compressor.tokenizer = tokenizer
            model = done.carry_out(step, model, calibration, progress)
            if step.compressor.brings_a_model:
                model = model.to(recipe.device)
            if step.compressor.tokenizer_path is not None:
                brought = load_tokenizer(step.compressor.tokenizer_path)
                if brought.get_vocab() != tokenizer.get_vocab():
                    calibration = None  # its tokens mean something else to this model
                tokenizer = brought
        done.compare(steps)
        meter.stop()
        assert done.measured is not None
        record = {
            "kick_version": __version__,
            "setting": recipe.setting.model_dump(mode="json"),
            "setting_name": recipe.setting.name,
            "source": {"name": recipe.source.name, "fingerprint": recipe.fingerprint, "note": recipe.source.note},
            "calibration": calibration.record() if calibration else None,
            "dtype": recipe.dtype,
            "device": recipe.device,
            "computed_on": computes_on(recipe.device),
            "warnings": done.warnings,
            "stages": done.stages,
            "seconds": round(meter.seconds, 3),
            "peak_memory_bytes": meter.peak_bytes,
            "versions": versions(),
            "layers": done.layers,
        }
        if distributed.is_main():
            checkpoints.save(out, model, tokenizer, record, done.measured, done.structure, kept_files(workspace))
            shutil.rmtree(workspace, ignore_errors=True)
        distributed.wait()  # the others read what the first one wrote
        return checkpoints.read(out)


def find_workspace(out: Path, recipe: Recipe, steps: list[Step]) -> Path:
    """Where what is needed to go on is kept until `out` is there. What another recipe left for it is removed."""
    own = out.with_name(f".{out.name}.{identity(recipe, steps)}.work")
    if distributed.is_main():
        for path in out.parent.glob(f".{glob.escape(out.name)}.*.work"):
            if path != own and re.fullmatch(r"[0-9a-f]{16}", path.name.split(".")[-2]):
                shutil.rmtree(path)
    return own


def identity(recipe: Recipe, steps: list[Step]) -> str:
    """What tells apart the workspaces of different recipes, whose `steps` are prepared, for one place."""
    parts = (recipe.fingerprint, recipe.setting.model_dump(mode="json"), recipe.calibration.model_dump(mode="json"))
    return digest([__version__, *parts, recipe.dtype, [step.compressor.inputs() for step in steps]])


def kept_files(workspace: Path) -> dict[str, Path]:
    """What compressors left for the checkpoint in `kept` of their workspaces, by its place there."""
    return {
        f"{checkpoints.TRAINING}/{stage.name}/{file.relative_to(stage / 'kept').as_posix()}": file
        for stage in sorted(workspace.glob("*"))
        for file in sorted((stage / "kept").rglob("*"))
        if file.is_file()
    }


def check_streamable(steps: list[Step], device: str) -> None:
    """Raise ConfigError where not all blocks can be read from disk one at a time."""
    for step in steps:
        if not step.compressor.streams:
            raise ConfigError(f"{step.stage} cannot be streamed.", "It does not work linear by linear.")
    if device != "cpu":
        raise ConfigError(f"streaming cannot run on '{device}'.", "Ask for the device cpu.")
