"""What a run directory says, read once: for each setting its record, for each evaluation its scores beside dense."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from kick import checkpoint as checkpoints
from kick import compare, statistics
from kick.compare import Comparison, Estimate
from kick.config import SuiteSpec
from kick.files import read_json
from kick.judge.questions import mean_ratings
from kick.levels import Bits, Joint, Pattern, Sparsity
from kick.report.means import Means, SuiteScores, means_and_places
from kick.settings import CHAIN, DENSE, Setting, variation_in_words
from kick.statistics import Interval
from kick.suite import OVERALL, Metric, Sample, Score, Suite
from kick.sweep.plan import make_suite
from kick.sweep.store import JUDGE, EvaluationStore, Store, read_run, recorded_settings

Axis = Literal["sparsity", "bits", "size"]
Key = tuple[str, str]
"""(metric, group)"""

PERPLEXITY_MARGIN = 0.10
"""Perplexity that rises by no more than this share of the dense model's is often called fine."""

NOT_YET = "not answered yet"

FEWEST_IN_MEANS = 5
"""Samples of a suite below which its retained share may be anything, and would be the whole interval of a mean."""

LEAST_CERTAIN_IN_MEANS = 0.4
"""Share of a dense score at which its interval must begin, for the same reason: 3 right answers of 120 reach .34."""


@dataclass
class SettingResult:
    """A setting and what was measured on its checkpoint (None if it could not be made)."""

    setting: Setting
    record: dict[str, Any] | None
    dense: dict[str, Any] | None = None  # the dense model's record
    histories: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # of each stretch of training, its steps

    # Asked for again and again by tables and figures: each is worked out once.

    @cached_property
    def name(self) -> str:
        return self.setting.name

    @property
    def sparsity(self) -> float | None:
        return self.record["sparsity"] if self.record else None

    @cached_property
    def level(self) -> Any:
        """The level of the first stage, which is what a chain is drawn by."""
        return checkpoints.level_of(self.setting.level)

    @property
    def bits_per_weight(self) -> float | None:
        return self.record["bits_per_weight"] if self.record else None

    @property
    def parameters_removed(self) -> float | None:
        """Share of the dense model's parameters that are gone; below zero for a larger model."""
        if self.record is None or self.dense is None:
            return None
        return 1 - self.record["parameters"] / self.dense["parameters"]

    @cached_property
    def axis(self) -> Axis:
        """Which figure it belongs to: what its level turns, else what was measured to be less than dense."""
        if isinstance(self.level, Bits):
            return "bits"
        if self.record is not None and self.dense is not None and _has_another_shape(self.record, self.dense):
            return "size"  # also where the level is a sparsity: a share of parameters that are gone
        if isinstance(self.level, Sparsity | Pattern | Joint) or self.record is None or self.dense is None:
            return "sparsity"
        return "bits" if self.record["bits_per_weight"] < self.dense["bits_per_weight"] else "sparsity"

    @property
    def training(self) -> list[dict[str, Any]]:
        """What each stage that trained says of it: steps, tokens, hours and, of one stretch, its speed and losses."""
        stages = self.record.get("stages", []) if self.record else []
        return [
            {"compressor": stage["compressor"], **stage["facts"]["training"]}
            for stage in stages
            if "training" in stage.get("facts", {})
        ]

    @property
    def stands_alone(self) -> bool:
        """It is no point on a line of levels: a pattern, or a model without a level."""
        return self.level is None or isinstance(self.level, Pattern)

    @cached_property
    def method(self) -> str:
        """What is drawn in one colour: a compressor, or a chain of them, with what was varied."""
        words = variation_in_words(self.setting.variation)
        method = self.setting.method
        if method == self.setting.compressors:  # a chain is a line for each of what comes after its first stage
            method = CHAIN.join([self.setting.compressor, *map(str, self.setting.then)])
        return f"{method} {words}" if words else method

    @cached_property
    def family(self) -> str:
        """What is drawn as one line: a method's sparsities; its patterns are another."""
        return f"{self.method} N:M" if isinstance(self.level, Pattern) else self.method


def _has_another_shape(record: dict[str, Any], dense: dict[str, Any]) -> bool:
    """Whether linears are gone, or narrower or wider than dense. A head that is counted too makes no other shape."""
    own, expected = record["layers"], dense["layers"]
    more = own.keys() - expected.keys()
    return len(more) > 1 or any(
        name not in own or own[name]["weights"] != layer["weights"] for name, layer in expected.items()
    )


@dataclass
class Evaluation:
    """One setting on one suite. `reason` says why there are no samples."""

    setting: str
    suite: str
    samples: list[Sample] = field(default_factory=list)
    scores: dict[Key, Score] = field(default_factory=dict)
    estimates: dict[Key, Estimate] = field(default_factory=dict)
    comparisons: dict[Key, Comparison] = field(default_factory=dict)
    reason: str | None = None
    damaged: bool = False  # it was answered, and cannot be read
    lm: dict[str, Any] = field(default_factory=dict)
    suite_record: dict[str, Any] = field(default_factory=dict)  # what was decided when the model was known
    grades: dict[str, float] = field(default_factory=dict)  # the judge's mean rating of each sample
    shots: dict[str, int] = field(default_factory=dict)  # how many questions had how many examples in front of them
    asked_otherwise: int = 0  # questions whose prompt is not the dense model's
    batch_size: int | None = None


@dataclass(frozen=True)
class Results:
    """A whole run. Settings and suites stand in the order of the sweep file.

    perplexity_margin: the relative rise of perplexity that is taken to look fine. metrics: for some suites the one that
    verdicts are about, instead of their own. in_means: the suites that enter means, instead of all that could.
    """

    path: Path
    run: dict[str, Any]
    settings: list[SettingResult]
    suites: dict[str, Suite]
    evaluations: dict[tuple[str, str], Evaluation]
    judge: dict[str, Any] | None = None  # judge.json
    perplexity_margin: float = PERPLEXITY_MARGIN
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    in_means: Sequence[str] | None = None
    _primary: dict[str, Metric] = field(default_factory=dict, init=False, repr=False)  # what was found out

    def get(self, setting: str, suite: str) -> Evaluation:
        missing = Evaluation(setting, suite, reason="not part of this run")
        return self.evaluations.get((setting, suite), missing)

    def metric(self, suite: str) -> Metric:
        """What a suite's verdicts are about: the judge's score where there is one."""
        if suite not in self._primary:
            self._primary[suite] = self.metrics.get(suite) or self._metric(suite)
        return self._primary[suite]

    def _metric(self, suite: str) -> Metric:
        scores = self.get(DENSE, suite).scores
        candidates = (*self.suites[suite].judged_metrics, self.suites[suite].metrics[0])
        found = next(
            (metric for metric in candidates if (s := scores.get((metric.name, OVERALL))) and s.n), candidates[-1]
        )
        dense = scores.get((found.name, OVERALL))
        return dense.metric if dense else found  # what guessing gives may be known from the questions alone

    def primary(self, suite: str) -> Key:
        return self.metric(suite).name, OVERALL

    def estimate(self, setting: str, suite: str) -> Estimate | None:
        """The primary metric over all questions."""
        return self.get(setting, suite).estimates.get(self.primary(suite))

    def status(self, setting: str, suite: str) -> str:
        """`complete`, or why there is no score, in a word or two."""
        reason = self.get(setting, suite).reason
        if reason is not None:
            return NOT_YET if reason == NOT_YET else "failed"
        by_a_judge = self.metric(suite).name in {metric.name for metric in self.suites[suite].judged_metrics}
        could_be = any(sample.left_out is None for sample in self.get(setting, suite).samples)
        return "not judged" if by_a_judge and could_be and self.estimate(setting, suite) is None else "complete"

    @property
    def not_judged(self) -> list[str]:
        """Evaluations whose answers are there, of suites that a judge has graded for other settings."""
        pairs = ((result.name, suite) for suite in self.suites for result in self.settings)
        return [f"{setting} on {suite}" for setting, suite in pairs if self.status(setting, suite) == "not judged"]

    def comparison(self, setting: str, suite: str) -> Comparison | None:
        return self.get(setting, suite).comparisons.get(self.primary(suite))

    @cached_property
    def compressed(self) -> list[SettingResult]:
        return [result for result in self.settings if not result.setting.is_dense]

    @cached_property
    def variants(self) -> list[SettingResult]:
        """The dense model asked again in another way: what differs is noise."""
        return [result for result in self.settings if result.setting.is_dense and result.name != DENSE]

    @cached_property
    def perplexity_suite(self) -> str | None:
        """The first suite whose primary metric is a perplexity."""
        return next((name for name in self.suites if self.metric(name).transform == "exp"), None)

    @cached_property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(result.method for result in self.compressed))

    @cached_property
    def families(self) -> list[str]:
        return list(dict.fromkeys(result.family for result in self.compressed))

    def families_on(self, axis: Axis) -> list[str]:
        """Those that are drawn against this axis."""
        return list(dict.fromkeys(result.family for result in self.compressed if result.axis == axis))

    @cached_property
    def task_suites(self) -> list[str]:
        """Suites that enter means: they ask enough for an answer (more is better), and dense clearly gives some."""
        if self.in_means is not None:
            return list(self.in_means)
        return [
            name
            for name in self.suites
            if self.metric(name).higher_is_better
            and not self.metric(name).descriptive
            and (found := self.estimate(DENSE, name)) is not None
            and found.signal
            and found.n >= FEWEST_IN_MEANS
            and found.interval.low >= LEAST_CERTAIN_IN_MEANS * found.score
        ]

    def mean_retained(self, setting: str) -> tuple[float, Interval] | None:
        """Mean over task suites of the share of the dense score that is left; None if one has hardly an answer."""
        return self._means[0].get(setting)

    @property
    def places(self) -> dict[str, int]:
        """See kick.report.means."""
        return self._means[1]

    @cached_property
    def _means(self) -> tuple[Means, dict[str, int]]:
        others = [result.name for result in self.settings if result.name != DENSE]
        names = [name for name in others if all(self._answered(name, suite) for suite in self.task_suites)]
        asked = []
        for suite in self.task_suites:
            key = self.primary(suite)
            own = [self.get(name, suite) for name in names]
            dense = self.get(DENSE, suite).scores[key]
            asked.append(SuiteScores(dense, [one.scores[key] for one in own], [one.comparisons[key] for one in own]))
        return means_and_places(names, asked, {result.name for result in self.compressed})

    def _answered(self, setting: str, suite: str) -> bool:
        pair = self.comparison(setting, suite)
        return pair is not None and pair.whole and pair.n >= FEWEST_IN_MEANS

    @cached_property
    def compared(self) -> dict[tuple[str, str], Comparison]:
        """Every verdict: of each compressed setting on each suite's primary metric. What is judged together."""
        pairs = ((result.name, suite) for result in self.compressed for suite in self.suites)
        found = ((place, self.comparison(*place)) for place in pairs)
        return {place: pair for place, pair in found if pair is not None and pair.verdict is not None}

    @cached_property
    def adjusted(self) -> dict[tuple[str, str], float]:
        """p-values of no difference from dense at all, adjusted over `compared` by Holm's method."""
        return dict(zip(self.compared, statistics.holm([p.p_value for p in self.compared.values()]), strict=True))

    def holds(self, setting: str, suite: str) -> bool:
        """Whether a verdict holds when all are judged together; also where there is none, or no signal."""
        return (setting, suite) not in self._doubtful

    @cached_property
    def _doubtful(self) -> set[tuple[str, str]]:
        """Verdicts whose own line, a loss of 5 %, has a p-value that is not below 0.05 after Holm's adjustment."""
        signal = {place: pair for place, pair in self.compared.items() if pair.verdict != "no signal"}
        lines = [statistics.verdict_p(pair.retained, pair.interval, pair.n) for pair in signal.values()]
        return {
            place
            for (place, pair), p in zip(signal.items(), statistics.holm(lines), strict=True)
            if pair.verdict != "undecided" and p >= 1 - statistics.CONFIDENCE  # NaN: nothing was seen to vary
        }

    def doubtful_levels(self, family: str, suite: str) -> list[float]:
        """Of `verdicts`, the levels that match by themselves, and not when all verdicts are judged together."""
        return [
            _amount(result.level)
            for result in self.compressed
            if result.family == family
            and isinstance(result.level, Sparsity | Bits)
            and (result.name, suite) in self._doubtful
            and self.compared[result.name, suite].verdict == "matching"
        ]

    def verdicts(self, family: str, suite: str) -> list[tuple[float, str]]:
        """(sparsity, verdict) for each sparsity of a method, or (-bits, verdict), the least compressed first.

        Without a score its status stands in place of the verdict.
        """
        levels: list[tuple[float, str]] = []
        for result in self.compressed:
            if result.family == family and isinstance(result.level, Sparsity | Bits):
                found = self.comparison(result.name, suite)
                status = self.status(result.name, suite)
                unsaid = "undecided" if status == "complete" else status
                levels.append((_amount(result.level), (found and found.verdict) or unsaid))
        return sorted(levels)


def _amount(level: Sparsity | Bits) -> float:
    """The more the further a model is compressed."""
    return level.fraction if isinstance(level, Sparsity) else -float(level.width)


def read_results(path: Path) -> Results:
    """Everything in the run directory `path`, scored and compared. Raises RunError if it is none."""
    run, store = read_run(path), Store(path)
    settings = recorded_settings(run)
    specs = [own for row in run["config"]["suites"] for own in SuiteSpec(**row).each()]
    suites = {spec.name: make_suite(spec) for spec in specs}
    for name, suite in suites.items():  # some suites know their metrics only from their questions
        if "metrics" in run["suites"].get(name, {}):
            suite.metrics = tuple(Metric(**row) for row in run["suites"][name]["metrics"])
    evaluations = {}
    prompts: dict[str, dict[str, int]] = {}  # of each suite: the dense model's, by question, as hashes
    for setting in settings:
        for name, suite in suites.items():
            evaluations[setting.name, name] = _read_evaluation(
                store.evaluation(setting.name, name), setting.name, name, suite, prompts.setdefault(name, {})
            )
    for (setting_name, name), evaluation in evaluations.items():
        dense = evaluations.get((DENSE, name))
        if dense is not None and setting_name != DENSE:
            evaluation.comparisons = dict(_compare(dense, evaluation))
    dense_record = store.record(DENSE)
    results = [
        SettingResult(setting, store.record(setting.name), dense_record, store.histories(setting.name))
        for setting in settings
    ]
    judge = read_json(path / JUDGE) if (path / JUDGE).is_file() else None
    return Results(path, run, results, suites, evaluations, judge)


def _read_evaluation(
    store: EvaluationStore, setting: str, name: str, suite: Suite, prompts: dict[str, int]
) -> Evaluation:
    """prompts: the dense model's, which comes first and fills them in."""
    result = store.result()
    if result is None or result["status"] != "complete":
        return Evaluation(setting, name, reason=result["reason"] if result else NOT_YET)
    if not store.is_complete(result["key"]):
        reason = "its samples are not the ones that were scored; run the sweep again"
        return Evaluation(setting, name, reason=reason, damaged=True)
    samples = store.samples()
    judgments = store.judgments()
    scores = {(score.metric.name, score.group): score for score in suite.score(samples, judgments)}
    otherwise = 0
    for sample in samples:
        if setting == DENSE:
            prompts[sample.id] = hash(sample.prompt)
        else:
            same = prompts.get(sample.id, hash(sample.prompt)) == hash(sample.prompt)
            otherwise += not same and not suite.prompts_hold_answers
            sample.prompt, sample.choices = "", None  # as a rule dense's; a long run would not fit into memory
    estimates = {key: compare.estimate(score) for key, score in scores.items()}
    return Evaluation(
        setting,
        name,
        samples,
        scores,
        estimates,
        lm=result.get("lm", {}),
        suite_record=result.get("suite", {}),
        grades=mean_ratings(judgments),
        shots=result.get("shots", {}),
        asked_otherwise=otherwise,
        batch_size=result.get("batch_size"),
    )


def _compare(dense: Evaluation, other: Evaluation) -> Iterator[tuple[Key, Comparison]]:
    for key, score in other.scores.items():
        if key in dense.scores:
            yield key, compare.compare(dense.scores[key], score, dense.estimates[key].signal)
