"""The sweep file: what to compress, how far, and what to ask. YAML in, checked and frozen models out."""

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from kick.calibration import CalibrationSpec
from kick.errors import ConfigError, did_you_mean
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
            label = f"{label or setting.name} {variation_in_words(variation)}"
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
                    "label": f"{self.name} {variation_in_words(variation)}",
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
        return tuple(_grid_of(setting) if isinstance(setting, str) else setting for setting in settings)

    @field_validator("suites", mode="before")
    @classmethod
    def _suites_from_text(cls, suites: Any) -> Any:
        if not isinstance(suites, list | tuple):
            return suites
        return tuple({"suite": suite} if isinstance(suite, str) else suite for suite in suites)

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
        _check_unique("setting", [setting.name for setting in settings])
        return settings

    def all_suites(self) -> list[SuiteSpec]:
        """In the order of the file, one for each combination of what varies. Raises ConfigError as all_settings."""
        suites = [own for suite in self.suites for own in suite.each()]
        _check_unique("suite", [suite.name for suite in suites])
        return suites

    @property
    def models(self) -> tuple[str, ...]:
        return (self.model,) if isinstance(self.model, str) else self.model


def _grid_of(text: str) -> dict[str, Any]:
    setting = parse_setting(text)
    return {"compressor": setting.compressor, "levels": [setting.level], "then": setting.then}


def _check_unique(kind: str, names: list[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise ConfigError(f"two {kind}s are called '{name}'.", "Give one of them a label.")


class _Loader(yaml.SafeLoader):
    """YAML's safe loader without base-60 numbers (`2:4` is a pattern, not 124) that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' stands twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_OURS = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag not in _OURS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def read_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise ConfigError(f"{where} is nested too deeply.", "A sweep file needs a handful of levels.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error).split())}", "Correct that line.") from error


def load(path: Path, overrides: list[str] = []) -> SweepConfig:  # noqa: B006 (never changed)
    """The sweep file at `path` with `KEY=VALUE` overrides (dotted keys; values are YAML). Raises ConfigError."""
    if not path.is_file():
        raise ConfigError(f"no sweep file {path}.", "Expected a YAML file; configs/ holds some to start from.")
    try:
        content = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text.", "Save it as UTF-8.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a mapping.", "Expected keys such as model, settings and suites.")
    if odd := [key for key in content if not isinstance(key, str)]:
        raise ConfigError(
            f"{path}: the key {odd[0]!r} is no word.", "Expected keys such as model, settings and suites."
        )
    for override in overrides:
        _override(content, override)
    return parse(content, str(path))


def parse(content: dict[str, Any], where: str) -> SweepConfig:
    try:
        return SweepConfig(**content)
    except ValidationError as error:
        raise ConfigError(*_explain(error, content, where)) from error


def schema() -> dict[str, Any]:
    """The JSON schema of a sweep file, for editors: what `load` takes, short forms included."""
    found = SweepConfig.model_json_schema()
    short = {"type": "string"}
    for key, what in (("settings", "compressor@level, or a chain with >"), ("suites", "a suite's name")):
        items = found["properties"][key]["items"]
        found["properties"][key]["items"] = {"anyOf": [{**short, "description": what}, items]}
    grid = found["$defs"]["Grid"]["properties"]
    grid["then"]["items"] = {"anyOf": [short, grid["then"]["items"]]}
    level: dict[str, Any] = {"anyOf": [short, {"type": "number"}]}
    levels = grid["levels"]
    levels.pop("type", None)
    levels.pop("items", None)
    levels["anyOf"] = [short, {"type": "array", "items": level}]
    found["$defs"]["LayerRule"]["properties"]["level"] = {**level, "default": None}
    found["$defs"]["Stage"]["properties"]["level"] = {**level, "default": ""}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A sweep file of kick", **found}


def _explain(error: ValidationError, content: dict[str, Any], where: str) -> tuple[str, str]:
    """The first fault of a sweep file: which key, what was given, what is allowed there."""
    faults: dict[tuple[Any, ...], list[Any]] = {}
    for fault in error.errors():  # a key that may be several things has one for each
        faults.setdefault(_place(fault["loc"], content), []).append(fault)
    place, found = next(iter(faults.items()))
    first = found[0]
    path = ".".join(map(str, place))
    more = f" ({len(faults) - 1} more)" if len(faults) > 1 else ""
    known = _model_at(place[:-1]).model_fields
    allowed = f"Allowed there: {', '.join(known)}."
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key '{path}'{more}.{did_you_mean(str(place[-1]), known)}", allowed
    if first["type"] == "missing":
        return f"{where}: the key '{path}' is missing{more}.", allowed
    messages = dict.fromkeys(_plainly(fault["msg"]) for fault in found)
    return f"{where}: {path} is {first['input']!r}{more}.", f"{', or: '.join(messages)}."


def _plainly(message: str) -> str:
    """pydantic's words in those of YAML."""
    message = message.replace("a valid tuple", "a list, [...]").removeprefix("Value error, ")
    return re.sub(r"a valid dictionary( or instance of \w+)?", "a mapping, {...}", message)


def _place(location: tuple[Any, ...], content: Any) -> tuple[Any, ...]:
    """The keys of a fault's location: between them pydantic names the kinds that it tried."""
    place: list[Any] = []
    for number, part in enumerate(location):
        if isinstance(content, dict) and (part in content or number == len(location) - 1):
            content = content.get(part)
        elif isinstance(content, list | tuple) and isinstance(part, int) and part < len(content):
            content = content[part]
        else:
            continue
        place.append(part)
    return tuple(place)


def _model_at(place: tuple[Any, ...]) -> type[Spec]:
    """What a part of a sweep file is a description of."""
    model: type[Spec] = SweepConfig
    for part in place:
        if part in model.model_fields:
            model = next(_specs_in(model.model_fields[part].annotation), model)
    return model


def _specs_in(annotation: Any) -> Iterator[type[Spec]]:
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        yield annotation
    for part in get_args(annotation):
        yield from _specs_in(part)


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override} has no '='.", "For example --set lm.batch_size=8.")
    *parents, last = key.split(".")
    place: Any = content
    try:
        for part in parents:
            if isinstance(place, list):
                place = place[int(part)]
            else:  # a section that says nothing is one to be filled
                place[part] = {} if place.get(part) is None else place[part]
                place = place[part]
        if isinstance(place, list):
            place[int(last)] = read_yaml(value, f"--set {key}")
        elif isinstance(place, dict):
            place[last] = read_yaml(value, f"--set {key}")
        else:
            raise TypeError
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--set {key}: there is no such place in the file.", "For example --set suites.0.limit=20."
        ) from error
