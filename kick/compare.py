"""A setting's scores beside the dense model's: each with n and interval, each comparison paired by sample id."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from kick import statistics
from kick.statistics import Interval
from kick.suite import Metric, Score


@dataclass(frozen=True)
class Estimate:
    """A metric over a group for one setting."""

    metric: str
    group: str
    n: int
    score: float
    interval: Interval
    truncated: int
    failed: int
    signal: bool

    def as_row(self) -> dict[str, Any]:
        """The columns that scores.csv and scores.json have in common."""
        return {
            "metric": self.metric,
            "group": self.group,
            "n": self.n,
            "score": self.score,
            "ci_low": self.interval.low,
            "ci_high": self.interval.high,
            "truncated": self.truncated,
            "failed": self.failed,
        }


@dataclass(frozen=True)
class Comparison:
    """What a setting kept of the dense score, over the samples that both answered.

    `retained` is setting / dense, or dense / setting where lower is better. `lost` and `won` count answers that went
    from right to wrong and from wrong to right (None where answers are not right or wrong). Descriptive metrics have no
    verdict.
    """

    n: int
    dense: float
    retained: float
    interval: Interval
    verdict: statistics.Verdict | None
    p_value: float
    lost: int | None
    won: int | None
    n_to_decide: int | None
    whole: bool = True  # at most 5 % of the dense model's samples have no counterpart

    @classmethod
    def empty(cls, verdict: statistics.Verdict | None) -> "Comparison":
        """Of settings that answered nothing in common."""
        nothing = float("nan")
        return cls(0, nothing, nothing, Interval(nothing, nothing), verdict, nothing, None, None, None, whole=False)

    @property
    def flips(self) -> int | None:
        return None if self.lost is None or self.won is None else self.lost + self.won


def estimate(score: Score) -> Estimate:
    """The score with its interval: Wilson for right-or-wrong answers, bootstrap for everything else."""
    metric = score.metric
    value, per = _at(score, score.ids)
    if score.n == 0:
        interval = Interval(float("nan"), float("nan"))
    elif _right_or_wrong(score, value):
        interval = statistics.wilson(float(value.sum()), score.n)
    else:
        sums = statistics.resampled_sums(np.stack([value, per], axis=1))
        interval = statistics.percentile_interval(metric.combine(sums[:, 0], sums[:, 1]), score.n)
    signal = score.n > 0
    if signal and metric.higher_is_better:  # a perplexity has no level of chance
        signal = statistics.has_signal(interval, metric.chance)
    return Estimate(
        metric=metric.name,
        group=score.group,
        n=score.n,
        score=score.point,
        interval=interval,
        truncated=score.truncated,
        failed=score.failed,
        signal=signal,
    )


def _right_or_wrong(score: Score, value: np.ndarray) -> bool:
    """Whether each value is one answer; sums over clusters are none, though they may be 0 and 1."""
    return score.metric.per is None and not score.clusters and statistics.is_binary(value)


def compare(dense: Score, other: Score, signal: bool) -> Comparison:
    """`other` against `dense` on the samples they share. `signal`: whether the dense score says anything."""
    metric = dense.metric
    shared = _shared(dense, other)
    if not shared:
        return Comparison.empty(None if metric.descriptive else "undecided" if signal else "no signal")
    (dense_value, dense_per), (value, per) = _at(dense, shared), _at(other, shared)
    n = len(dense_value)
    dense_point = float(metric.combine(dense_value.sum(), dense_per.sum()))
    point = float(metric.combine(value.sum(), per.sum()))
    retained = retained_share(dense_point, point, metric.higher_is_better)
    interval = _interval(dense, other, dense_value, value, n)

    lost = won = None
    if _right_or_wrong(dense, dense_value) and _right_or_wrong(other, value):
        lost = int(((dense_value == 1) & (value == 0)).sum())
        won = int(((dense_value == 0) & (value == 1)).sum())
        p_value = statistics.mcnemar(lost, won)
    else:
        with np.errstate(divide="ignore", invalid="ignore"):
            differences = value / per - dense_value / dense_per
        p_value = statistics.sign_flip(np.nan_to_num(differences))
    whole = len(shared) >= (1 - statistics.TOLERANCE) * len(dense.ids)
    worst, best = _extremes(dense, point, len(shared) / len(dense.ids))
    line = 1 - statistics.TOLERANCE
    settled = worst >= line if whole and interval.low > line else whole or best < line
    outcome = None if metric.descriptive else statistics.verdict(interval, signal, settled)
    needed = statistics.n_to_decide(n, retained, interval) if outcome == "undecided" and settled else None
    return Comparison(
        n=n,
        dense=dense_point,
        retained=retained,
        interval=interval,
        verdict=outcome,
        p_value=p_value,
        lost=lost,
        won=won,
        n_to_decide=needed,
        whole=whole,
    )


def _extremes(dense: Score, point: float, share: float) -> tuple[float, float]:
    """The retained share if every answer that is missing were as bad, and as good, as can be.

    point: the other's score over the questions that both answered, a `share` of dense's.

    Of scores without bounds nothing is known of what is missing: a few then count as like the others, many as anything.
    """
    metric = dense.metric
    bounded = metric.bounds or ((0.0, 1.0) if metric.per is None and dense.value.max(initial=0) <= 1 else None)
    if bounded is None or not metric.higher_is_better or metric.transform != "mean":
        return float("inf"), float("inf")
    points = [share * point + (1 - share) * bound for bound in bounded]
    worst, best = (float(retained_share(dense.point, point, higher_is_better=True)) for point in points)
    return worst, best


def _interval(dense: Score, other: Score, dense_value: np.ndarray, value: np.ndarray, n: int) -> Interval:
    """Of the retained share. Right-or-wrong answers of the same four counts have the same: it is computed once."""
    metric = dense.metric
    if _right_or_wrong(dense, dense_value) and _right_or_wrong(other, value):
        kinds = np.bincount((2 * dense_value + value).astype(np.int64), minlength=4)
        return _interval_of_counts(metric.higher_is_better, *kinds.tolist())
    return statistics.percentile_interval(resampled_retained(dense, other), n)


@lru_cache(maxsize=100_000)
def _interval_of_counts(higher_is_better: bool, *kinds: int) -> Interval:
    """kinds: how many answers there are of each of statistics.CORNERS."""
    rows = statistics.CORNERS.repeat(kinds, axis=0)
    sums = statistics.resampled_sums(rows, pseudo=statistics.corners(rows[:, 0], rows[:, 1]))
    return statistics.percentile_interval(retained_share(sums[:, 0], sums[:, 1], higher_is_better), len(rows))


def resampled_retained(dense: Score, other: Score, seed: int = 0) -> np.ndarray:
    """Bootstrap draws [resamples] of the retained share, over the samples that both answered.

    Scores within bounds are resampled with half a pseudo-observation in each corner (see statistics.corners), so that a
    small sample in which nothing changed does not claim certainty.
    """
    metric = dense.metric
    shared = _shared(dense, other)
    (dense_value, dense_per), (value, per) = _at(dense, shared), _at(other, shared)
    rows = np.stack([dense_value, dense_per, value, per], axis=1)
    pseudo = pseudo_units(metric, rows)
    if pseudo is not None and metric.per is None and not dense.clusters:
        sums = statistics.resampled_sums(rows[:, [0, 2]], seed=seed, pseudo=pseudo[:, [0, 2]])
        return retained_share(sums[:, 0], sums[:, 1], metric.higher_is_better)
    sums = statistics.resampled_sums(rows, seed=seed, pseudo=pseudo)
    return retained_share(
        metric.combine(sums[:, 0], sums[:, 1]), metric.combine(sums[:, 2], sums[:, 3]), metric.higher_is_better
    )


def pseudo_units(metric: Metric, rows: np.ndarray) -> np.ndarray | None:
    """What stands in each corner (see statistics.corners), of the size of a usual unit; None for scores without bounds.

    rows: (value, per) of the dense model and of the other, [units, 4], and so is what is returned, [4, 4].
    """
    if metric.per is not None and metric.bounds is None:
        return None
    rows = rows[(rows[:, 1] > 0) & (rows[:, 3] > 0)]
    found = statistics.corners(rows[:, 0] / rows[:, 1], rows[:, 2] / rows[:, 3], metric.bounds)
    if found is None or len(rows) == 0:
        return None
    before, after = rows[:, 1].mean(), rows[:, 3].mean()
    return np.stack([before * found[:, 0], np.full(4, before), after * found[:, 1], np.full(4, after)], axis=1)


def _shared(dense: Score, other: Score) -> Sequence[str]:
    """The samples that both answered, in order."""
    return dense.ids if dense.ids == other.ids else sorted(set(dense.ids) & set(other.ids))


def _at(score: Score, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(value, per) of these samples, added up within clusters: what is resampled."""
    if ids is score.ids and not score.clusters:
        return score.value, score.per
    place = {id: index for index, id in enumerate(score.ids)}
    rows = [place[id] for id in ids]
    if not score.clusters:
        return score.value[rows], score.per[rows]
    _, cluster = np.unique([score.clusters[row] for row in rows], return_inverse=True)
    return np.bincount(cluster, score.value[rows]), np.bincount(cluster, score.per[rows])


def by_unit(score: Score, only: set[str] | None = None) -> dict[str, tuple[float, float]]:
    """(value, per) of each independent unit: a sample, or a cluster of them. only: the ids of samples that count."""
    found: dict[str, tuple[float, float]] = {}
    for id, unit, value, per in zip(score.ids, score.clusters or score.ids, score.value, score.per, strict=True):
        if only is None or id in only:
            before = found.get(unit, (0.0, 0.0))
            found[unit] = before[0] + float(value), before[1] + float(per)
    return found


def retained_share(dense: Any, other: Any, higher_is_better: bool) -> Any:
    """Of scores, numbers or arrays: `other` over `dense`, the other way round where lower is better."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.divide(other, dense) if higher_is_better else np.divide(dense, other)
