"""Intervals, paired tests and the matching verdict: pure functions on arrays.

Vocabulary: a *value* array [n] and a *per* array [n] give a ratio metric, sum(value) / sum(per); a plain mean has
per = 1. Intervals are 95 % unless said otherwise. Bootstrap resamples whole samples, the same ones for both models of a
pair, with a fixed seed: the same data give the same interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from scipy.special import ndtr, ndtri, stdtr, stdtrit
from scipy.stats import binomtest

RESAMPLES = 10_000
CONFIDENCE = 0.95
POWER = 0.8
TOLERANCE = 0.05
"""A compressed model matches if it loses at most this share of the dense score (LLM-KICK, arXiv 2310.01382)."""

Verdict = Literal["matching", "not matching", "undecided", "no signal"]

_FEW_ROWS = 512  # up to so many distinct rows, resampling draws their counts from a multinomial
_CHUNK = 4_000_000  # entries resampled at a time


@dataclass(frozen=True)
class Interval:
    low: float
    high: float


def wilson(successes: float, n: int, confidence: float = CONFIDENCE) -> Interval:
    """The score interval of a proportion (Wilson 1927): honest near 0 and 1, where the normal one is not."""
    if n == 0:
        return Interval(float("nan"), float("nan"))
    z = float(ndtri((1 + confidence) / 2))
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, float(centre - half))
    high = 1.0 if successes == n else min(1.0, float(centre + half))
    return Interval(low, high)


def resampled_sums(
    rows: np.ndarray, resamples: int = RESAMPLES, seed: int = 0, pseudo: np.ndarray | None = None
) -> np.ndarray:
    """Bootstrap sums: rows [n, k] -> [resamples, k], each the sum of n rows drawn with replacement.

    `pseudo` [p, k] are rows that the population is given besides, each with half the weight of a real one: with the
    corners of `corners`, an interval does not shrink to a point because nothing happened in a small sample.

    Equal rows are drawn together, from a multinomial over the distinct ones: the same distribution, and fast for
    right-or-wrong scores, of which a pair has four kinds.
    """
    n = len(rows)
    rng = np.random.default_rng(seed)
    population = rows if pseudo is None else np.concatenate([rows.repeat(2, axis=0), pseudo])
    if (
        len(np.unique(rows[: 4 * _FEW_ROWS], axis=0)) <= _FEW_ROWS
    ):  # a look at the first rows spares sorting continuous ones
        distinct, counts = np.unique(population, axis=0, return_counts=True)
        if len(distinct) <= _FEW_ROWS:
            return rng.multinomial(n, counts / counts.sum(), size=resamples) @ distinct
    columns = np.ascontiguousarray(population.T)
    sums = np.empty((resamples, rows.shape[1]))
    step = max(1, _CHUNK // n)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        index = rng.integers(0, len(population), (size, n), dtype=np.int32)
        for column, values in enumerate(columns):
            sums[start : start + size, column] = values.take(index).sum(axis=1)
    return sums


def percentile_interval(values: np.ndarray, n: int, confidence: float = CONFIDENCE) -> Interval:
    """The central share of bootstrap `values` of `n` samples. Undefined values (0/0) are left out.

    The share is widened for small n as a t interval is against a normal one (the expanded percentile interval of
    Hesterberg, The American Statistician 69, 2015). One sample has no interval.
    """
    defined = values[~np.isnan(values)]
    if len(defined) == 0 or n < 2:
        return Interval(float("nan"), float("nan"))
    tail = float(ndtr(np.sqrt(n / (n - 1)) * stdtrit(n - 1, (1 - confidence) / 2)))
    low, high = np.quantile(defined, [tail, 1 - tail], method="nearest")
    return Interval(float(low), float(high))


def is_binary(values: np.ndarray) -> bool:
    return bool(((values == 0.0) | (values == 1.0)).all())


CORNERS = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
"""Pairs of right-or-wrong answers: wrong in both, gained, lost, right in both."""


def corners(first: np.ndarray, second: np.ndarray, bounds: tuple[float, float] | None = None) -> np.ndarray | None:
    """The four extreme pairs [4, 2] of two scores within [0, 1], or within `bounds`; None for scores without bounds.

    Half an observation in each corner is what Agresti and Min (Statistics in Medicine 24, 2005) add for matched pairs
    of right-or-wrong answers. Of graded scores (ROUGE, F1) the corners lie at 0, what an answer that is lost scores,
    and at the upper quartile of those above it: at 1 they would outweigh a dozen texts that all score between 0.1 and
    0.3, and without any, intervals over ten questions hold the truth every other time.
    """
    if bounds is not None:
        return bounds[0] + (bounds[1] - bounds[0]) * CORNERS
    both = np.concatenate([first, second])
    if both.size == 0 or both.min() < 0 or both.max() > 1:
        return None
    return CORNERS if is_binary(both) else float(np.quantile(both[both > 0], 0.75)) * CORNERS


@cache
def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided McNemar p-value: `lost` pairs went from right to wrong, `won` from wrong to right."""
    if lost + won == 0:
        return 1.0
    return float(binomtest(min(lost, won), lost + won, 0.5).pvalue)


def sign_flip(differences: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided paired permutation p-value of the mean difference: under the null each sign is a coin toss.

    The observed arrangement counts as one, so that p is never 0 (Phipson and Smyth, 2010). Where no resample is as
    extreme, Hoeffding's bound on a sum of independent signs (JASA 58, 1963) may tell that p is smaller than that.
    """
    differences = differences[differences != 0]
    if len(differences) == 0:
        return 1.0
    rng = np.random.default_rng(seed)
    observed = abs(differences.sum())
    extreme = 0
    step = max(1, _CHUNK // len(differences))
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        signs = rng.integers(0, 2, (size, len(differences)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ differences) >= observed * (1 - 1e-12)).sum())
    if extreme:
        return (extreme + 1) / (resamples + 1)
    bound = 2 * float(np.exp(-(observed**2) / (2 * (differences**2).sum())))
    return min(1 / (resamples + 1), max(bound, np.finfo(float).tiny))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the given order; NaN stays NaN and is not counted."""
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(len(p), np.nan)
    order = [index for index in np.argsort(p, kind="stable") if not np.isnan(p[index])]
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p[index]))
        adjusted[index] = running
    return adjusted.tolist()


def verdict(retained: Interval, signal: bool, whole: bool = True) -> Verdict:
    """Whether a loss of TOLERANCE lies above, below or inside the interval of the loss, 1 - retained.

    whole: False where answers are missing that could turn it.
    """
    if not signal:
        return "no signal"
    if not whole:
        return "undecided"
    if retained.low > 1 - TOLERANCE:
        return "matching"
    if retained.high < 1 - TOLERANCE:
        return "not matching"
    return "undecided"


def verdict_p(retained: float, interval: Interval, n: int) -> float:
    """Two-sided p-value of a loss of exactly TOLERANCE, read off the interval: below 0.05 where the line is outside.

    The standard error is the half-width on the line's side over the 97.5 % quantile of t with n - 1 degrees of freedom.
    NaN where there is none, and for an interval without width: nothing was seen to vary.
    """
    line = 1 - TOLERANCE
    toward = interval.high - retained if retained < line else retained - interval.low
    if not np.isfinite(toward) or not np.isfinite(retained) or toward <= 0 or n < 2:
        return float("nan")
    return float(2 * stdtr(n - 1, -stdtrit(n - 1, (1 + CONFIDENCE) / 2) * abs(retained - line) / toward))


def has_signal(dense: Interval, chance: float | None) -> bool:
    """Whether dense is so clearly above chance (0 where nothing can be guessed) that a guesser would not match it."""
    return bool(dense.low * (1 - TOLERANCE) > (chance or 0.0))


def point_verdict(retained: float) -> bool:
    """The paper's rule, without uncertainty: it matches if at most TOLERANCE of the dense score is lost."""
    return retained >= 1 - TOLERANCE


def n_to_decide(n: int, retained: float, interval: Interval) -> int | None:
    """About how many samples would decide an undecided verdict four times of five, if what was estimated is the truth.

    The interval's half shrinks as 1/sqrt(n); besides it, the estimate itself has to fall on the right side. None if it
    lies on the line or is not a number.
    """
    distance = abs(retained - (1 - TOLERANCE))
    if not np.isfinite(distance) or distance < 1e-9:
        return None
    toward = interval.high - retained if retained < 1 - TOLERANCE else retained - interval.low
    if not np.isfinite(toward):
        return None
    wanted = 1 + float(ndtri(POWER) / ndtri((1 + CONFIDENCE) / 2))
    return max(n + 1, int(np.ceil(n * (wanted * toward / distance) ** 2)))


def frontier(levels: Sequence[tuple[float, str]]) -> float | None:
    """The largest level up to which every tested level matches; None if the smallest already does not.

    levels: (how far, verdict, or why there is none), any order; a level with several verdicts (seeds) matches if all of
    them do. Verdicts are not monotone: a level that matches beyond one that does not, or that is undecided, does not
    count. Verdicts without signal are left out.
    """
    by_level: dict[float, list[str]] = {}
    for level, outcome in levels:
        if outcome != "no signal":
            by_level.setdefault(level, []).append(outcome)
    reached = None
    for level in sorted(by_level):
        if any(outcome != "matching" for outcome in by_level[level]):
            return reached
        reached = level
    return reached
