"""What a sweep file says: what to compress, how far, and what to ask, as checked and frozen models.

Reading one is kick.sweep_file's.
"""

import itertools
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from kick.calibration import CalibrationSpec
from kick.errors import ConfigError
from kick.judge.spec import JudgeSpec
from kick.levels import USUAL_LEVELS, as_written
from kick.lm.spec import LMSpec
from kick.policy import Policy
from kick.settings import DENSE, Setting, Stage, parse_setting, variation_in_words
from kick.spec import Seed, Spec, validated
from kick.sweep.executors.spec import ExecutorSpec

COLUMNS = (
    "place", "model", "setting", "method", "sparsity", "bits_per_weight", "million_parameters", "megabytes",
    "mean_retained", "mean_retained_ci_low", "mean_retained_ci_high", "run",
)  # fmt: skip
"""Of leaderboards, beside those that suites' labels name."""


def check_label(label: str) -> str:
    """A label may be anything that does not break a table."""
    if label in COLUMNS:
        raise ValueError(f"'{label}' is a column of the leaderboard: choose another label")
    if "|" in label or not label.isprintable() or label != label.strip():
        raise ValueError(
            "a label may hold neither a bar nor line breaks nor control characters, nor begin or end blank"
        )
    return label


Varied = dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]]


class SameSize(Spec):
    """Levels by the sizes of other models, dense, in the run's precision. Worked out by kick.sweep.sizes."""

    models: tuple[str, ...] = Field(min_length=1, description="as `model`")
    by: Literal["bytes", "parameters"] = Field(
        default="bytes", description="of weights that are not zero and a bit for each that may be, or their number"
    )
    levels: dict[str, str] | None = Field(
        default=None, description="kick's own: the sparsity for each of the models whose size can be reached"
    )


class Grid(Policy):
    """One compressor at several levels and seeds: a setting for each combination. `then` holds later stages."""

    compressor: str
    levels: tuple[str, ...] = Field(
        default=("",),
        min_length=1,
        description="sparsities, patterns, bits or shapes; `sparsities`, `patterns`, `bits`: the usual ones",
    )
    same_size: SameSize | None = Field(
        default=None, description="instead of levels: as sparse as it takes to be worth what smaller models are"
    )
    params: dict[str, Any] = Field(
        default_factory=dict, description="of that compressor: `kick list compressors --json`"
    )
    then: tuple[Stage, ...] = ()
    seeds: tuple[Seed, ...] = Field(
        default=(0,), min_length=1, description="runs of the method; also of its draw of calibration text"
    )
    calibration: dict[str, Any] = Field(
        default_factory=dict, description="keys that differ from the sweep's calibration"
    )
    vary: Varied = Field(
        default_factory=dict, description="parameters, or calibration.KEY, each with the values that it takes in turn"
    )
    label: str = Field(default="", description="replaces the compressor's name in the names of these settings")

    @field_validator("label")
    @classmethod
    def _plain(cls, label: str) -> str:
        return check_label(label)

    @field_validator("levels", mode="before")
    @classmethod
    def _as_text(cls, levels: Any) -> Any:
        given = (levels,) if isinstance(levels, str) else levels
        if isinstance(given, list | tuple):
            texts = map(as_written, given)
            return tuple(level for text in texts for level in USUAL_LEVELS.get(str(text), (text,)))
        return levels

    @model_validator(mode="after")
    def _levels_once(self) -> "Grid":
        if self.same_size is not None and self.levels != ("",):
            raise ValueError("levels and same_size are two ways to say how far: give one of them")
        return self

    def settings(self, calibration: CalibrationSpec) -> list[Setting]:
        """calibration: the sweep's. Raises ConfigError for a key that a calibration does not have."""
        levels = self.levels if self.same_size is None else dict.fromkeys((self.same_size.levels or {}).values())
        return [
            self._setting(level, seed, variation, calibration)
            for level in levels
            for variation in combinations(self.vary)
            for seed in self.seeds
        ]

    def _setting(self, level: str, seed: int, variation: dict[str, Any], sweeps: CalibrationSpec) -> Setting:
        varied = {key.removeprefix(_CALIBRATION): v for key, v in variation.items() if key.startswith(_CALIBRATION)}
        own = {**self.calibration, **varied}
        if seed:  # another run of a method has other text to calibrate on
            own.setdefault("seed", sweeps.seed + seed)
        calibration = None
        if own:
            given = {**sweeps.model_dump(), **own}
            calibration = validated(CalibrationSpec, given, f"the calibration of '{self.compressor}'")
        setting = Setting(
            compressor=self.compressor,
            level=level,
            params={**self.params, **{k: v for k, v in variation.items() if not k.startswith(_CALIBRATION)}},
            layers=self.layers,
            allocation=self.allocation,
            then=self.then,
            seed=seed,
            calibration=calibration,
            variation=variation,
        )
        label = f"{self.label}@{level}" if self.label and level else self.label
        if variation:
            label = f"{label or setting.name} {variation_in_words(variation, self.vary)}"
        if len(self.seeds) > 1:
            label = f"{label or setting.name}#{seed}"
        return setting.model_copy(update={"label": label})


_CALIBRATION = "calibration."


def combinations(varied: Varied) -> list[dict[str, Any]]:
    """Every combination of the values, the last key's first; one empty combination where nothing varies."""
    return [dict(zip(varied, values, strict=True)) for values in itertools.product(*varied.values())]


class SuiteSpec(Spec):
    """One suite and how it is asked. `limit` is a seeded sample, stratified over the suite's groups."""

    suite: str
    label: str = Field(default="", description="what results call it; the suite's name if not given")
    params: dict[str, Any] = Field(default_factory=dict)
    data: str | None = Field(default=None, description="instead of the sweep's data")
    limit: int | None = Field(default=None, ge=1)
    limit_per_group: int | None = Field(default=None, ge=1)
    seed: Seed = 0
    lm: LMSpec | None = Field(default=None, description="instead of the sweep's lm")
    vary: Varied = Field(
        default_factory=dict, description="parameters with the values that they take in turn: a suite for each"
    )

    def each(self) -> "list[SuiteSpec]":
        """One suite for each combination of what varies."""
        if not self.vary:
            return [self]
        return [
            self.model_copy(
                update={
                    "label": f"{self.name} {variation_in_words(variation, self.vary)}",
                    "params": {**self.params, **variation},
                    "vary": {},
                }
            )
            for variation in combinations(self.vary)
        ]

    @property
    def name(self) -> str:
        return self.label or self.suite

    @field_validator("label")
    @classmethod
    def _plain(cls, label: str) -> str:
        return check_label(label)


class SweepConfig(Spec):
    """A whole sweep file. `dense` is always run, whether `settings` names it or not."""

    model: str | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="a hub id, a directory, a .gguf file or a packaged model; a list gives each model its own run"
    )
    settings: tuple[Grid, ...] = ()
    suites: tuple[SuiteSpec, ...] = Field(min_length=1)
    data: str = Field(default="hub", description="embedded, hub, or a folder that mirrors the public files")
    calibration: CalibrationSpec = CalibrationSpec()
    lm: LMSpec = LMSpec()
    judge: JudgeSpec | None = Field(default=None, description="grades answers at the end; see also `kick judge`")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    executor: ExecutorSpec = ExecutorSpec()
    stream: bool = Field(default=False, description="compress block by block from disk, for models larger than memory")
    keep_checkpoints: bool = Field(
        default=False, description="keep the weights of compressed models after their evaluation"
    )
    disk_budget_gb: float | None = Field(
        default=None,
        gt=0,
        description="most GB of kept checkpoints; above it, those of the settings that finished first are deleted",
    )

    @field_validator("settings", mode="before")
    @classmethod
    def _settings_from_text(cls, settings: Any) -> Any:
        if not isinstance(settings, list | tuple):
            return settings
        return tuple(grid_of(setting) if isinstance(setting, str) else setting for setting in settings)

    @field_validator("suites", mode="before")
    @classmethod
    def _suites_from_text(cls, suites: Any) -> Any:
        if not isinstance(suites, list | tuple):
            return suites
        return tuple(suite_of(suite) if isinstance(suite, str) else suite for suite in suites)

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> "SweepConfig":
        if self.disk_budget_gb is not None and not self.keep_checkpoints:
            raise ValueError("disk_budget_gb is of kept checkpoints: set keep_checkpoints: true")
        if twice := [name for name, count in Counter(self.models).items() if count > 1]:
            raise ValueError(f"the model '{twice[0]}' is named twice")
        return self

    def all_settings(self) -> list[Setting]:
        """Dense first, then the grid in the order of the file. Raises ConfigError if two have one name."""
        settings = [Setting(compressor=DENSE)]
        grids = [grid.settings(self.calibration) for grid in self.settings]
        settings += [setting for grid in grids for setting in grid if setting != settings[0]]
        _check_names("setting", [setting.name for setting in settings])
        return settings

    def all_suites(self) -> list[SuiteSpec]:
        """In the order of the file, one for each combination of what varies. Raises ConfigError as all_settings."""
        suites = [own for suite in self.suites for own in suite.each()]
        _check_names("suite", [suite.name for suite in suites])
        return suites

    @property
    def models(self) -> tuple[str, ...]:
        return (self.model,) if isinstance(self.model, str) else self.model


def suite_of(text: str) -> dict[str, Any]:
    """The long form of a suite that is a name alone."""
    return {"suite": text}


def grid_of(text: str) -> dict[str, Any]:
    """The long form of a setting that is written as `wanda@0.5 > gptq@4`. Raises LevelError for anything else."""
    setting = parse_setting(text)
    return {"compressor": setting.compressor, "levels": [setting.level], "then": setting.then}


def _check_names(kind: str, names: list[str]) -> None:
    """Raise ConfigError for a name that stands twice, or that values put together into what no table takes."""
    for name, count in Counter(names).items():
        if count > 1:
            raise ConfigError(f"two {kind}s are called '{name}'.", "Give one of them a label.")
        try:
            check_label(name)
        except ValueError as error:
            raise ConfigError(f"the {kind} '{name}': {error}.", "Give it a label.") from error
