"""Means over suites: what was retained, with intervals, and places that settings share.

All settings are resampled together, on the same draws of the dense model's questions, so that their differences are
paired.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import studentized_range

from kick import statistics
from kick.compare import Comparison, by_unit, pseudo_units, retained_share
from kick.statistics import CONFIDENCE, RESAMPLES, Interval
from kick.suite import Metric, Score

_CHUNK = 2_000_000  # weights of questions drawn at a time

Means = dict[str, tuple[float, Interval]]


class SuiteScores(NamedTuple):
    """One suite: the dense model's score, and of each other setting the score and what was retained."""

    dense: Score
    others: list[Score]
    comparisons: list[Comparison]


def means_and_places(
    names: Sequence[str], suites: Sequence[SuiteScores], compressed: Collection[str]
) -> tuple[Means, dict[str, int]]:
    """For each setting `names`, all of which answered all `suites`, its mean retained share with an interval; places.

    Suites that ask the same questions (MMLU in two formats) are resampled with the same draws, though some be cut. A
    place is one more than the number of `compressed` settings that are clearly better: the paired interval of the
    difference of means lies above 0, in 95 % of runs those of all pairs together (Tukey's studentized range). Settings
    that share a place need not be equal; nothing here tells them apart.
    """
    if not suites or not names:
        return {}, {}
    points = np.mean([[pair.retained for pair in suite.comparisons] for suite in suites], axis=0)
    fewest = np.min([[pair.n for pair in suite.comparisons] for suite in suites], axis=0)
    draws = mean_draws([(suite.dense, suite.others) for suite in suites])
    means = {
        name: (float(point), mean_interval(own, int(n)))
        for name, point, own, n in zip(names, points, draws, fewest, strict=True)
    }
    ranked = [index for index, name in enumerate(names) if name in compressed]
    return means, _places([names[index] for index in ranked], points[ranked], draws[ranked], int(fewest.min()))


def _places(names: list[str], points: np.ndarray, draws: np.ndarray, fewest: int) -> dict[str, int]:
    """Intervals of differences from the covariance of the draws: normal ones, of all pairs at once."""
    if len(names) < 2 or fewest < 2:
        return dict.fromkeys(names, 1)
    covariance = np.atleast_2d(np.cov(draws[:, np.isfinite(draws).all(axis=0)]))
    variance = np.diag(covariance)
    error = np.sqrt(np.maximum(variance[:, None] + variance[None, :] - 2 * covariance, 0.0))
    ahead = points[None, :] - points[:, None]  # [own, other]
    errors = float(studentized_range.ppf(CONFIDENCE, len(names), fewest - 1)) / np.sqrt(2)
    errors *= np.sqrt(fewest / (fewest - 1))  # the bootstrap divides by n
    better = ahead > np.maximum(errors * error, 1e-12)
    return {name: 1 + int(own.sum()) for name, own in zip(names, better, strict=True)}


def mean_draws(suites: Sequence[tuple[Score, Sequence[Score]]]) -> np.ndarray:
    """Bootstrap draws [others, resamples] of the mean over suites of retained shares. suites: (dense, others) of each.

    Pseudo-observations bias every suite's share in the same direction, shares near 0 upwards. Averaging s independent
    suites shrinks the spread by sqrt(s), but not that bias: so the bias is scaled by 1/sqrt(s) as well. Without that, a
    mean of ten suites at 1 % would have an interval that lies above it.
    """
    total = np.zeros((len(suites[0][1]), RESAMPLES))
    together = _asking_the_same([list(by_unit(dense)) for dense, _ in suites])
    for seed, (units, members) in enumerate(together):
        for dense, others in (suites[index] for index in members):
            draws, aside = retained_draws(dense, others, seed, units)
            total += draws - aside[:, None] * (1 - len(together) ** -0.5)
    return total / len(suites)


def _asking_the_same(suites: Sequence[list[str]]) -> list[tuple[list[str], list[int]]]:
    """(all questions, the suites that ask them): of suites of which each has most of its questions in the first.

    Not all need be answered: a question that was cut in one of them is no other question.
    """
    found: list[tuple[list[str], list[int]]] = []
    for index, units in enumerate(suites):
        for known, members in found:
            if len(set(known) & set(units)) > min(len(known), len(units)) / 2:
                known += sorted(set(units) - set(known))
                members.append(index)
                break
        else:
            found.append((list(units), [index]))
    return found


def mean_interval(draws: np.ndarray, n: int) -> Interval:
    """The interval of a mean of shares, which are never below 0, of at least `n` questions a suite."""
    found = statistics.percentile_interval(draws, n)
    return Interval(max(0.0, found.low), found.high) if np.isfinite(found.low) else found


def retained_draws(
    dense: Score, others: Sequence[Score], seed: int = 0, units: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Bootstrap draws [others, resamples] of retained shares, all on the same draws of the dense model's questions.

    units: of more questions than dense answered, those of its own among them.

    As compare.resampled_retained: scores within bounds have half a pseudo-observation in each of their corners. Also
    returned: the bias that these add to each share [others].
    """
    units = list(by_unit(dense)) if units is None else units
    before, rows = np.zeros((2, len(others), len(units), 2))  # value and per of the dense model, and of the other
    for number, score in enumerate(others):
        shared = None if score.ids == dense.ids else set(dense.ids) & set(score.ids)
        for target, source in ((before, dense), (rows, score)):
            own = by_unit(source, shared)
            target[number] = [own.get(unit, (0.0, 0.0)) for unit in units]
    metric, n = dense.metric, len(units)
    chances = np.ones(n)
    observed = _shares(metric, np.ones((1, n)), before, rows)[:, 0]
    corners = []
    for whole, own in zip(before, rows, strict=True):
        answered = own[:, 1] > 0
        corners.append(pseudo_units(metric, np.concatenate([whole[answered], own[answered]], axis=1)))
    pairs = [own for own in corners if own is not None]
    if len(pairs) == len(others):
        chances = np.concatenate([np.full(n, 2.0), np.ones(4)])
        pseudo = np.stack(pairs)  # [others, 4, (value, per) of dense and of the other]
        before = np.concatenate([before, pseudo[:, :, :2]], axis=1)
        rows = np.concatenate([rows, pseudo[:, :, 2:]], axis=1)
    rng = np.random.default_rng(seed)
    found = np.empty((len(others), RESAMPLES))
    step = max(1, _CHUNK // len(chances))
    for start in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - start)
        weights = rng.multinomial(n, chances / chances.sum(), size=size).astype(np.float64)
        found[:, start : start + size] = _shares(metric, weights, before, rows)
    return found, _shares(metric, chances[None], before, rows)[:, 0] - observed


def _shares(metric: Metric, weights: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Retained shares [settings, draws] from weights [draws, units] and (value, per) [settings, units, 2] of both."""
    first, second = (
        [np.tensordot(rows[..., column], weights, axes=(1, 1)) for column in (0, 1)] for rows in (before, after)
    )
    return retained_share(metric.combine(*first), metric.combine(*second), metric.higher_is_better)
