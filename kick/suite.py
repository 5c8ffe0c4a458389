"""The Suite interface: what is asked of every model, and what becomes of the answers.

An example is a question with everything needed to ask and to score it; a sample is the record of one question asked of
one model; a metric says how samples add up. Statistics, files and comparison are done elsewhere.
"""

from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel

from kick.errors import ConfigError
from kick.judge.questions import Judgment, Question
from kick.settings import digest
from kick.spec import Spec

OVERALL = "overall"
CHARACTERS_PER_TOKEN = 4
"""Of English text, about: for estimates, and for prompts of a wanted length."""

NOT_A_NUMBER = "a log-likelihood is not a number"
"""The error of a sample whose options cannot be ranked: the first of them would look like the answer."""


@dataclass(frozen=True)
class DataSource:
    """Where a suite's rows come from: what the package carries, the Hugging Face hub, or a folder that mirrors it."""

    kind: Literal["embedded", "hub", "directory"]
    directory: Path | None = None

    @classmethod
    def parse(cls, text: str) -> "DataSource":
        if text == "embedded":
            return cls("embedded")
        if text == "hub":
            return cls("hub")
        return cls("directory", Path(text).expanduser())

    def __str__(self) -> str:
        return str(self.directory) if self.directory else self.kind


@dataclass(frozen=True)
class Example:
    """One question. `id` is stable and unique in its suite; `content` is JSON: all that prompt and score need."""

    id: str
    group: str
    content: dict[str, Any]


@dataclass
class Sample:
    """The record of one question. `scores` holds the numbers that metrics add up; an `error` keeps it out of them."""

    id: str
    group: str
    prompt: str
    output: str | None = None
    choices: list[dict[str, Any]] | None = None
    scores: dict[str, float] = field(default_factory=dict)
    truncated: bool = False
    shots: int = 0
    n_prompt_tokens: int = 0
    n_output_tokens: int = 0
    error: str | None = None

    @property
    def left_out(self) -> Literal["failed", "truncated"] | None:
        """Why it is counted beside the scores and is in none; an error comes before a prompt that was cut."""
        return "failed" if self.error is not None else "truncated" if self.truncated else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Sample":
        return cls(**{name: row[name] for name in _FIELDS})


_FIELDS = tuple(field.name for field in fields(Sample))


@dataclass(frozen=True)
class Metric:
    """How samples add up: transform(sum of scores[value] / sum of scores[per]); per=None counts each sample as one.

    `chance` is what guessing gives; a dense model not clearly above it says nothing on this metric.
    `bounds` are the least and the most that it can be, for what is graded in clusters: 1 and 10 of a rating.
    `descriptive` metrics (a length, a speed) describe answers: no verdict is given on them, and they enter no mean.
    """

    name: str
    value: str
    per: str | None = None
    transform: Literal["mean", "exp"] = "mean"
    higher_is_better: bool = True
    chance: float | None = None
    unit: str = ""
    descriptive: bool = False
    bounds: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.bounds is not None:  # JSON gives a list
            object.__setattr__(self, "bounds", tuple(self.bounds))

    def combine(self, value: Any, per: Any) -> Any:
        """The metric from sums over samples (numbers or arrays)."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            ratio = np.divide(value, per)
            return np.exp(ratio) if self.transform == "exp" else ratio


@dataclass(frozen=True)
class Score:
    """A metric over one group of samples, still by sample, so that another model's score can be paired with it.

    ids, value and per, one for each sample, are what `metric` adds up. clusters: what each sample belongs to, where
    samples are not independent (the turns of a conversation): paired by sample, resampled by cluster.
    """

    metric: Metric
    group: str
    ids: tuple[str, ...]
    value: np.ndarray
    per: np.ndarray
    truncated: int = 0
    failed: int = 0
    clusters: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        """Independent units: samples, or clusters of them."""
        return len(set(self.clusters)) if self.clusters else len(self.ids)

    @property
    def point(self) -> float:
        return float(self.metric.combine(self.value.sum(), self.per.sum())) if self.n else float("nan")


class Suite(ABC):
    """Asks a model questions and scores the answers.

    A subclass names itself, declares its parameters in `Params` and its metrics (the first is the primary one), makes
    examples out of rows, and answers them. One whose answers a judge can grade has `judged_metrics` besides, which come
    first where there are judgments. `needs_dense`: it compares with the dense model while it asks (`answer_beside`).
    `most_at_once` bounds batches of long answers. `argument`: the parameter that may stand in its name, as in
    `lm_eval:arc_easy`.
    """

    name: ClassVar[str]
    metrics: tuple[Metric, ...]
    judged_metrics: tuple[Metric, ...] = ()
    needs_judge: ClassVar[bool] = False
    most_at_once: ClassVar[int | None] = None  # for long answers: a batch is what a crash can lose
    needs_dense: ClassVar[bool] = False
    times_itself: ClassVar[bool] = False  # other work beside it would be measured too
    prompts_hold_answers: ClassVar[bool] = False  # the model's own, so that no two models are asked in the same words
    scores_text: ClassVar[bool] = False  # its questions are running text (`text`), which nothing may be calibrated on
    argument: ClassVar[str] = ""
    description: ClassVar[str] = ""

    class Params(Spec):
        """What can be asked differently: validated, and part of the evaluation's identity."""

    class Judging(Spec):
        """What a judge can be asked differently. No part of an evaluation: judging again never generates again."""

    def __init__(self, params: BaseModel | None = None) -> None:
        self.params: Any = params if params is not None else self.Params()

    @abstractmethod
    def examples(self, source: DataSource) -> list[Example]:
        """All questions of `source`, in a stable order. Raises DataError for missing files and malformed rows."""

    @abstractmethod
    def answer(self, lm: Any, examples: Sequence[Example]) -> Iterator[Sample]:
        """Ask `lm` (lm-eval's LM interface) each example; one sample each, in order, as answers come."""

    def answer_beside(self, lm: Any, dense: Any, examples: Sequence[Example]) -> Iterator[Sample]:
        """As `answer`, with the dense model's LM at hand (`lm` itself where dense is asked). For `needs_dense`."""
        return self.answer(lm, examples)

    def sample_ids(self, example: Example) -> list[str]:
        """The ids of the samples that `answer` yields for `example`, in order: one, unless the suite says otherwise."""
        return [example.id]

    def record(self, lm: Any) -> dict[str, Any]:
        """What was decided when `lm` was known, such as whether its chat template was used."""
        return {}

    def judge_questions(
        self,
        judging: Any,
        examples: Mapping[str, Example],
        samples: Sequence[Sample],
        dense: Mapping[str, Sample],
    ) -> Iterator[Question]:
        """What to ask a judge about `samples`. examples and dense: by id; `judging`: an instance of `Judging`.

        dense: what to compare with, the dense model's answers or those of the setting that `judging.baseline` names.
        """
        raise ConfigError(
            f"the suite '{self.name}' has nothing for a judge.", "A suite that can be judged declares judged_metrics."
        )

    def batches(self, examples: Sequence[Example], size: int) -> list[list[Example]]:
        """What is asked in one go: `examples` in order, cut into pieces of at most `size`.

        An interrupted evaluation takes up at a whole batch, so a batch must depend on the list of examples alone.
        """
        size = self.at_once(size)
        return [list(examples[start : start + size]) for start in range(0, len(examples), size)]

    def at_once(self, size: int) -> int:
        """How many questions are asked in one go where `size` would be: a suite of long answers takes fewer."""
        return min(size, self.most_at_once or size)

    def length(self, example: Example) -> int:
        """Characters that asking `example` takes, without what all examples share. For estimates only."""
        return sum(len(value) for value in example.content.values() if isinstance(value, str))

    def groups_of(self, sample: Sample) -> list[str]:
        """The groups that a sample counts in."""
        return [OVERALL, sample.group]

    def score(self, samples: Iterable[Sample], judgments: Sequence[Judgment] = ()) -> list[Score]:
        """Every metric over every group, overall first. Truncated and failed samples are counted and left out.

        Reads `samples` once, so that they need not all be in memory.
        """
        groups: dict[str, list[_Tally]] = {OVERALL: [_Tally(metric, OVERALL) for metric in self.metrics]}
        for sample in samples:
            for group in self.groups_of(sample):
                if group not in groups:
                    groups[group] = [_Tally(metric, group) for metric in self.metrics]
                for tally in groups[group]:
                    tally.add(sample)
        return [
            tally.score()
            for tallies in groups.values()
            for tally in tallies
            if tally.applies or not any(other.applies for other in tallies)
        ]

    @property
    def scores_in_one_pass(self) -> bool:
        """Whether `score` is the one above; others may go over the samples several times."""
        return type(self).score is Suite.score

    def members(self, samples: Sequence[Sample]) -> dict[str, list[Sample]]:
        """The samples of each group, overall first."""
        found: dict[str, list[Sample]] = {OVERALL: []}
        for sample in samples:
            for group in self.groups_of(sample):
                found.setdefault(group, []).append(sample)
        return found


def count_left_out(samples: Iterable[Sample], graded: Mapping[str, Sequence[Any]]) -> tuple[int, int]:
    """(truncated, failed) for a judged score. graded: the grades of each sample, by its id.

    A sample with an empty list there was sent to the judge and got no grade: it counts as failed.
    """
    reasons = [sample.left_out or ("failed" if graded.get(sample.id) == [] else None) for sample in samples]
    return reasons.count("truncated"), reasons.count("failed")


class _Tally:
    """A score in the making: numbers and ids of samples, not the samples."""

    def __init__(self, metric: Metric, group: str) -> None:
        self.metric, self.group = metric, group
        self.ids: list[str] = []
        self.value, self.per = array("d"), array("d")
        self.truncated = self.failed = 0
        self.applies = False  # whether any sample has this metric

    def add(self, sample: Sample) -> None:
        value = sample.scores.get(self.metric.value)
        self.applies = self.applies or value is not None
        if sample.left_out == "failed":
            self.failed += 1
        elif sample.left_out == "truncated":
            self.truncated += 1
        elif value is not None:
            self.ids.append(sample.id)
            self.value.append(value)
            self.per.append(sample.scores[self.metric.per] if self.metric.per else 1.0)

    def score(self) -> Score:
        order = sorted(range(len(self.ids)), key=self.ids.__getitem__)
        places = np.array(order, dtype=np.int64)
        return Score(
            metric=self.metric,
            group=self.group,
            ids=tuple(self.ids[place] for place in order),
            value=np.frombuffer(self.value, dtype=np.float64)[places],
            per=np.frombuffer(self.per, dtype=np.float64)[places],
            truncated=self.truncated,
            failed=self.failed,
        )


def subset(examples: Sequence[Example], limit: int | None, limit_per_group: int | None, seed: int) -> list[Example]:
    """A seeded random choice, stratified over groups, in the original order.

    `limit` shares its places among groups in proportion to their size (largest remainders get the places left over);
    `limit_per_group` takes as many of each. With both, the second is applied first.
    """
    rng = np.random.default_rng(seed)
    by_group: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        by_group.setdefault(example.group, []).append(index)
    if limit_per_group is not None:
        by_group = {group: _choose(rng, rows, limit_per_group) for group, rows in by_group.items()}
    available = sum(map(len, by_group.values()))
    if limit is not None and limit < available:
        exact = {group: limit * len(rows) / available for group, rows in by_group.items()}
        places = {group: int(share) for group, share in exact.items()}
        left_over = sorted(exact, key=lambda group: (places[group] - exact[group], group))
        for group in left_over[: limit - sum(places.values())]:
            places[group] += 1
        by_group = {group: _choose(rng, rows, places[group]) for group, rows in by_group.items()}
    return [examples[index] for index in sorted(index for rows in by_group.values() for index in rows)]


def _choose(rng: np.random.Generator, rows: list[int], count: int) -> list[int]:
    return list(rng.choice(rows, size=count, replace=False)) if count < len(rows) else rows


def repeated_id(examples: Iterable[Example]) -> str | None:
    """An id that stands twice: pairing needs unique ones."""
    seen: set[str] = set()
    for example in examples:
        if example.id in seen:
            return example.id
        seen.add(example.id)
    return None


def data_fingerprint(examples: Sequence[Example]) -> str:
    """Identity of the questions: equal for equal rows, wherever they were read from."""
    return digest([[example.id, example.group, example.content] for example in examples])
