"""Places instead of ranks: settings that the questions cannot tell apart share one. And how far seeds lie apart."""

from typing import Any

import numpy as np

from kick.compare import by_unit
from kick.report.results import Results
from kick.settings import DENSE
from kick.statistics import CONFIDENCE
from kick.suite import Metric, Score

RESAMPLES = 2_000


def places(results: Results) -> dict[str, int]:
    """For each compressed setting with a mean: one more than the number of settings that are clearly better.

    Clearly better: the paired 95 % interval of the difference of mean retained shares lies above 0, over the same
    bootstrap draws of questions for all. Settings that share a place need not be equal; nothing here tells them apart.
    """
    names = [result.name for result in results.compressed if results.mean_retained(result.name) is not None]
    if not names:
        return {}
    draws = np.mean([_retained(results, suite, names) for suite in results.task_suites], axis=0)  # [names, resamples]
    tail = (1 - CONFIDENCE) / 2
    found = {}
    for index, name in enumerate(names):
        lowest = np.nanquantile(draws - draws[index], tail, axis=1)
        found[name] = 1 + int((np.delete(lowest, index) > 0).sum())
    return found


def _retained(results: Results, suite: str, names: list[str]) -> np.ndarray:
    """Retained shares [names, resamples]: every setting on the same draws of the dense model's questions."""
    key = results.primary(suite)
    dense = results.get(DENSE, suite).scores[key]
    base = by_unit(dense)
    units = list(base)
    rng = np.random.default_rng(0)
    weights = rng.multinomial(len(units), np.full(len(units), 1 / len(units)), size=RESAMPLES).astype(np.float64)
    return np.stack(
        [_share(dense.metric, base, results.get(name, suite).scores[key], units, weights) for name in names]
    )


def _share(
    metric: Metric, base: dict[str, tuple[float, float]], score: Score, units: list[str], weights: np.ndarray
) -> np.ndarray:
    own = by_unit(score)
    nothing = (0.0, 0.0)
    dense = np.array([base[unit] if unit in own else nothing for unit in units])
    other = np.array([own.get(unit, nothing) for unit in units])
    with np.errstate(divide="ignore", invalid="ignore"):
        before, after = (metric.combine(*(weights @ pair).T) for pair in (dense, other))
        return np.divide(after, before) if metric.higher_is_better else np.divide(before, after)


def seed_spread(results: Results) -> list[dict[str, Any]]:
    """For what was run with several seeds: mean and standard deviation between them, beside the interval within one."""
    groups: dict[str, list[str]] = {}
    for result in results.compressed:
        name = result.name.removesuffix(f"#{result.setting.seed}")
        if name != result.name:
            groups.setdefault(name, []).append(result.name)
    rows = []
    for name, members in groups.items():
        for suite in results.suites:
            found = [own for member in members if (own := results.estimate(member, suite)) is not None and own.n]
            if len(found) < 2:
                continue
            scores = np.array([own.score for own in found])
            rows.append(
                {
                    "setting": name,
                    "suite": suite,
                    "seeds": len(found),
                    "mean": float(scores.mean()),
                    "deviation": float(scores.std(ddof=1)),
                    "lowest": float(scores.min()),
                    "highest": float(scores.max()),
                    "half_width": float(np.mean([(own.interval.high - own.interval.low) / 2 for own in found])),
                }
            )
    return rows
