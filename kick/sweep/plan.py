"""From a sweep file to a plan: every setting, every suite with its questions, and the identity of each evaluation.

What can be wrong without a model being loaded is found here, before anything is written: unknown names, impossible
levels, missing data, malformed rows, too little calibration text.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kick import __version__, devices, loading, meter, models, plugins
from kick import checkpoint as checkpoints
from kick.calibration import Calibration, CalibrationSpec, draw, precision_of
from kick.compress import Recipe, check_streamable, needs_calibration, prepare
from kick.compressor import Compressor, Cost
from kick.config import SuiteSpec, SweepConfig
from kick.errors import CheckpointError, ConfigError, DataError, KickError, about
from kick.judge.spec import JudgeSpec
from kick.lm import find_lm, params_of
from kick.lm.spec import LMSpec
from kick.models import ModelSource
from kick.outcome import Step
from kick.settings import Setting, digest
from kick.spec import distinct, validated
from kick.suite import DataSource, Example, Suite, data_fingerprint, repeated_id, subset
from kick.sweep.executors import find_executor
from kick.sweep.overlap import shared_passage
from kick.sweep.sizes import with_sizes_as_levels

WORKER_BYTES = 1.0e9
"""Memory of a process without a model: libraries and questions."""

MODELS_AT_ONCE = 3
"""Copies of the weights that compressing takes at its peak."""

_RELEVANT_VERSIONS = ("torch", "transformers", "tokenizers", "lm-eval")


@dataclass(frozen=True)
class PlannedSuite:
    """A suite with the questions it will ask; `identity` names suite, parameters and questions."""

    name: str
    spec: SuiteSpec
    suite: Suite
    source: str
    examples: list[Example]
    identity: dict[str, Any]

    def by_sample(self) -> dict[str, Example]:
        """The example that each sample is about, by the sample's id."""
        return {id: example for example in self.examples for id in self.suite.sample_ids(example)}


@dataclass(frozen=True, kw_only=True)
class Plan:
    config: SweepConfig
    source: ModelSource
    path: Path
    fingerprint: str
    dtype: str
    device: str
    settings: list[Setting]
    steps: dict[str, list[Step]]  # of the settings that are made, to look at; carried out are others like them
    suites: list[PlannedSuite]
    calibrations: dict[CalibrationSpec, Calibration]  # each drawn once for all settings that need it
    inputs: dict[str, list[dict[str, str]]]  # what the stages of a setting read besides the source
    engines: list[tuple[LMSpec, dict[str, str]]]  # of each LM the versions of what answers outside this interpreter
    given: checkpoints.Checkpoint | None = None  # evaluated as it is: the plan's only setting, whose steps are not here

    @property
    def dense(self) -> Setting:
        """The model as it came; of a checkpoint that is asked as it is, its one setting."""
        return self.settings[0]

    @cached_property
    def calibrated(self) -> frozenset[str]:
        """The settings that need calibration."""
        return frozenset(name for name, steps in self.steps.items() if needs_calibration(steps))

    @cached_property
    def _skeleton(self) -> torch.nn.Module:
        """The model without weights."""
        return loading.load_skeleton(self.path, "float32")

    def check_model(self) -> None:
        """Raise KickError, with the setting's name, for what the model does not take."""
        for name, steps in self.steps.items():
            with about(f"setting '{name}'"):
                for step in steps[:1]:  # what a stage makes of the model is another one
                    step.compressor.check_model(lambda: self._skeleton)

    @cached_property
    def training(self) -> dict[str, Cost]:
        """What the settings that train would take, by their names.

        Stages that train one after the other add up, but for their memory. Raises KickError for what does not fit the
        model.
        """
        found: dict[str, Cost] = {}
        for name, steps in self.steps.items():
            for step in steps:
                if type(step.compressor).cost is Compressor.cost:
                    continue
                with about(f"setting '{name}'"):
                    cost = step.compressor.cost(step.level, self._skeleton)
                if cost is not None:
                    before = found.get(name, Cost(0, 0.0, 0))
                    found[name] = Cost(
                        before.tokens + cost.tokens,
                        before.operations + cost.operations,
                        max(before.memory_bytes, cost.memory_bytes),
                    )
        return found

    @cached_property
    def parameters(self) -> int:
        return loading.count_parameters(self.path)

    @cached_property
    def dense_bytes(self) -> int:
        """Of the dense weights in the run's precision."""
        return self.parameters * getattr(torch, self.dtype).itemsize

    @property
    def decided(self) -> SweepConfig:
        """The sweep file with what it leaves to the machine decided: other machines must not decide otherwise."""
        spec = self.config.calibration
        spec = spec.model_copy(update={"precision": precision_of(spec, self.dtype, self.device)})
        return self.config.model_copy(update={"device": self.device, "dtype": self.dtype, "calibration": spec})

    def calibration_of(self, setting: Setting) -> Calibration | None:
        """None where nothing needs it."""
        return self.calibrations.get(setting.calibration or self.config.calibration)

    def recipe(self, setting: Setting) -> Recipe:
        return Recipe(
            source=self.source,
            fingerprint=self.fingerprint,
            setting=setting,
            calibration=setting.calibration or self.config.calibration,
            dtype=self.dtype,
            device=self.device,
            stream=self.config.stream,
        )

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the answers. A run folder holds one of these."""
        return {
            "kick": __version__,
            "model": self.fingerprint,
            "dtype": self.dtype,
            "device": self.device,
            "versions": {name: version for name, version in meter.versions().items() if name in _RELEVANT_VERSIONS},
            "settings": {
                setting.name: {
                    **setting.model_dump(mode="json", exclude={"calibration"}),
                    "plugins": [_plugin_version(plugins.COMPRESSORS, stage.compressor) for stage in setting.stages],
                    **({"inputs": inputs} if any(inputs := self.inputs.get(setting.name, [])) else {}),
                    **self._calibration(setting),
                    **(self._engine(setting.variant.lm) if setting.is_dense and setting.variant.lm else {}),
                    **({"as_is": True} if self.given is not None else {}),
                }
                for setting in self.settings
            },
            "suites": {
                suite.name: {
                    **suite.identity,
                    "lm": (suite.spec.lm or self.config.lm).model_dump(mode="json"),
                    **self._engine(suite.spec.lm or self.config.lm),
                }
                for suite in self.suites
            },
        }

    def _calibration(self, setting: Setting) -> dict[str, Any]:
        """Nothing where the setting needs none, so that it may stand in a run beside any."""
        if setting.name not in self.calibrated:
            return {}
        drawn = self.calibration_of(setting)
        assert drawn is not None
        return {
            "calibration": {
                **(setting.calibration or self.config.calibration).model_dump(mode="json"),
                "tokens": drawn.fingerprint,
                "precision": drawn.precision,
            }
        }

    def _engine(self, lm: LMSpec) -> dict[str, Any]:
        found = next(versions for spec, versions in self.engines if spec == lm)
        return {"engine": found} if found else {}

    def lm_of(self, setting: Setting, suite: PlannedSuite) -> LMSpec:
        """The LM that answers `suite` for `setting`."""
        return setting.variant.lm or suite.spec.lm or self.config.lm

    def dtype_of(self, setting: Setting) -> str:
        return setting.variant.dtype or self.dtype

    def key(self, setting: Setting, suite: PlannedSuite) -> str:
        """The content address of one evaluation."""
        own = {name: self.identity[name][key] for name, key in (("settings", setting.name), ("suites", suite.name))}
        return digest({**self.identity, **own})


def make_plan(config: SweepConfig, as_is: bool = False, weights: bool = True, check_overlap: bool = True) -> Plan:
    """Resolve and check everything that `config` names.

    as_is: a model that is a kick checkpoint keeps its setting, instead of being the dense model of a new sweep.
    weights: False for a plan to look at only, for which those of `config.model` are not fetched from the hub.
    check_overlap: False where it was seen before that no text is both learned from and scored.
    """
    executor = find_executor(config.executor)
    executor.check(config.executor)
    device = executor.device(config.executor, config.device)
    dtype = devices.choose_dtype(config.dtype, device)
    config = with_sizes_as_levels(config, dtype)
    settings = config.all_settings()
    steps = {setting.name: prepare(setting) for setting in settings}
    inputs = {name: [step.compressor.inputs() for step in own] for name, own in steps.items()}
    _check_judge(config)
    assert isinstance(config.model, str)  # several models have a plan each
    source = models.find_source(config.model)
    given = _as_given(source) if as_is else None
    if given is not None:
        settings, steps = [Setting(**given.record["setting"])], {}
    suites = [plan_suite(spec, config.data) for spec in config.all_suites()]
    _check_dense_beside(config, settings, suites, device)
    engines = [(spec, find_lm(spec.name).check(params_of(spec), [s.name for s in settings])) for spec in lms(config)]
    path = models.fetch(source, weights=weights)
    if config.stream:
        for setting in settings:
            check_streamable(steps.get(setting.name, []), device)
    if any(spec.name == "fast" for spec, _ in engines):
        loading.check_unpacks(path)
    wanted = [s.calibration or config.calibration for s in settings if needs_calibration(steps.get(s.name, []))]
    tokenizer = loading.load_tokenizer(path) if wanted else None
    calibrations = {spec: draw(spec, tokenizer, dtype, device) for spec in distinct(wanted)}
    if check_overlap:
        _check_apart(calibrations, steps, suites, tokenizer)
    return Plan(
        config=config,
        source=source,
        path=path,
        fingerprint=models.fingerprint(path),
        dtype=dtype,
        device=device,
        settings=settings,
        steps=steps,
        suites=suites,
        calibrations=calibrations,
        inputs=inputs,
        engines=engines,
        given=given,
    )


def _check_judge(config: SweepConfig) -> None:
    """What would stop the judge at the end is said at the beginning."""
    if config.judge is not None:
        config.judge.check()
        config.judge.key()
        for spec in judged_suites(config, config.judge):
            judging_of(make_suite(spec), spec.name, config.judge)


def _as_given(source: ModelSource) -> checkpoints.Checkpoint | None:
    """The checkpoint that `source` is, if it is one of kick's. Raises CheckpointError for a damaged one."""
    if not (models.fetch(source, weights=False) / checkpoints.RECORD).is_file():
        return None
    given = checkpoints.read(models.fetch(source))
    if damage := checkpoints.damage(given):
        raise CheckpointError(f"{given.path} is not what its record says: {damage[0]}.", "Copy or compress it again.")
    return given


def _check_dense_beside(config: SweepConfig, settings: list[Setting], suites: list[PlannedSuite], device: str) -> None:
    """Raise ConfigError where a suite needs the dense model and it is not there, or does not fit beside another."""
    for planned in suites:
        if not planned.suite.needs_dense:
            continue
        if not any(setting.is_dense for setting in settings):
            raise ConfigError(
                f"the suite '{planned.name}' compares with the dense model, which a checkpoint by itself is not.",
                "Ask it in a sweep, where `dense` is always run.",
            )
        lm = planned.spec.lm or config.lm
        if len(settings) > 1 and not find_lm(lm.name).leaves_room_for_another(params_of(lm), device):
            raise ConfigError(
                f"the suite '{planned.name}' asks the dense model beside each other, and one of the lm '{lm.name}' "
                "takes more than half of a device.",
                "Set lm.params.memory_utilization to 0.45, or give that suite an lm of its own, such as {name: fast}.",
            )


def _check_apart(
    calibrations: dict[CalibrationSpec, Calibration],
    steps: dict[str, list[Step]],
    suites: list[PlannedSuite],
    tokenizer: Any,
) -> None:
    """Raise ConfigError where text that is calibrated or trained on is scored as well."""
    scored = {  # windows of one text, which a passage may cross
        planned.name: " ".join(example.content["text"] for example in planned.examples)
        for planned in suites
        if planned.suite.scores_text
    }
    for spec, drawn in calibrations.items():
        texts = tokenizer.batch_decode(drawn.tokens, clean_up_tokenization_spaces=False) if scored else []
        for name, text in scored.items():
            if passage := shared_passage(texts, [text]):
                raise ConfigError(
                    f"the calibration text '{spec.source}' holds a passage that '{name}' scores: '{passage[:60]}...'.",
                    "Calibrate on other text: what a compressor was fitted to is no test of it.",
                )
    if not scored:
        return
    different = {(step.stage.compressor, str(step.stage.params)): step for own in steps.values() for step in own}
    for step in different.values():
        learned = list(step.compressor.trained_on())
        for name, text in scored.items():
            if passage := shared_passage([text], learned):
                raise ConfigError(
                    f"the text that {step.stage.compressor} trains on holds a passage that '{name}' scores: "
                    f"'{passage[:60]}...'.",
                    "Train on other text: what a compressor was fitted to is no test of it.",
                )


def lms(config: SweepConfig) -> list[LMSpec]:
    """The LMs that a sweep uses, the main one first."""
    own = [suite.lm for suite in config.suites] + [setting.variant.lm for setting in config.all_settings()]
    return distinct(spec for spec in (config.lm, *own) if spec is not None)


def gpus_each(plan: Plan) -> int:
    """GPUs of one work: as many as the LM that spreads over most of them asks for."""
    return max(find_lm(spec.name).gpus(params_of(spec)) for spec in lms(plan.config))


def judged_suites(config: SweepConfig, judge: JudgeSpec) -> list[SuiteSpec]:
    """The suites that a judge grades. Raises ConfigError where `judge` names another, or there is none."""
    found = [spec for spec in config.all_suites() if make_suite(spec).judged_metrics]
    names = [spec.name for spec in found]
    if not found:
        raise ConfigError(
            "a judge is named, but none of the suites can be graded.", "Graded are suites such as mt_bench."
        )
    if unknown := sorted(set(judge.suites) - set(names)):
        raise ConfigError(
            f"judge.suites names '{unknown[0]}', which no judge can grade.", f"Graded: {', '.join(names)}."
        )
    return found


def judging_of(suite: Suite, name: str, judge: JudgeSpec) -> Any:
    """How the answers of the suite called `name` are graded. Raises ConfigError for what it does not know."""
    return validated(suite.Judging, judge.suites.get(name, {}), f"judge.suites.{name}")


def make_suite(spec: SuiteSpec) -> Suite:
    """The suite of `spec`, its parameters checked."""
    kind, argument = plugins.suite_of(spec.suite)
    if twice := sorted(argument.keys() & spec.params.keys()):
        raise ConfigError(f"suite '{spec.name}': '{twice[0]}' stands in its name and in its params.", "Say it once.")
    return kind(validated(kind.Params, {**argument, **spec.params}, f"suite '{spec.name}'"))


def plan_suite(spec: SuiteSpec, default_data: str) -> PlannedSuite:
    suite = make_suite(spec)
    source = DataSource.parse(spec.data or default_data)
    try:
        everything = suite.examples(source)
    except (KickError, OSError):
        raise
    except Exception as error:  # a plugin may raise anything
        raise DataError(
            f"suite '{spec.name}' fails as it reads {source}: {type(error).__name__}: {error}.",
            "--debug shows the whole error.",
        ) from error
    if odd := [each for each in everything if not isinstance(each, Example)]:
        raise DataError(f"suite '{spec.name}' has {odd[0]!r} among its questions.", "Expected kick.suite.Example.")
    if not everything:
        raise DataError(f"suite '{spec.name}' found no question in {source}.", "Check --data.")
    if twice := repeated_id(everything):
        raise DataError(f"suite '{spec.name}' has two questions with the id '{twice}'.", "Pairing needs unique ids.")
    examples = subset(everything, spec.limit, spec.limit_per_group, spec.seed)
    identity = {
        "suite": spec.suite,
        "plugin": _plugin_version(plugins.SUITES, spec.suite.partition(":")[0]),
        "params": suite.params.model_dump(mode="json"),
        "questions": len(examples),
        "data": data_fingerprint(examples),
    }
    return PlannedSuite(spec.name, spec, suite, str(source), examples, identity)


def _plugin_version(group: str, name: str) -> str:
    found = plugins.available(group).get(name)
    return f"{found.origin} {found.version}" if found else "none"  # dense, or a checkpoint of a plugin not installed
