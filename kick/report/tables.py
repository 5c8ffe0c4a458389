"""scores.csv (everything), and the leaderboard (a line a setting) as CSV and Markdown."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from kick.report.results import Results, SettingResult
from kick.settings import DENSE

DAGGER = "†"
"""Beside a verdict that its own interval gives, and that does not hold when all of a run are judged together (Holm)."""

SCORE_COLUMNS = tuple(
    "setting compressor level sparsity bits_per_weight suite metric group n score ci_low ci_high dense_score retained "  # noqa: SIM905
    "retained_ci_low retained_ci_high verdict p_value flips truncated failed".split()
)


def scores_csv(results: Results) -> str:
    """One row for each setting, suite, metric and group. p_value is unadjusted; flips counts both directions.

    A setting that failed on a suite, or has not answered it yet, has one row with n 0, the primary metric and empty
    numbers.
    """
    return csv_text(SCORE_COLUMNS, _score_rows(results))


def _score_rows(results: Results) -> Iterable[dict[str, Any]]:
    for result in results.settings:
        for suite in results.suites:
            evaluation = results.get(result.name, suite)
            facts = {**_setting_facts(result), "suite": suite}
            if evaluation.reason is not None:
                metric, group = results.primary(suite)
                yield {**facts, "metric": metric, "group": group, "n": 0}
            for key in evaluation.estimates:
                yield {**facts, **_numbers(results, result, suite, key)}


def _setting_facts(result: SettingResult) -> dict[str, Any]:
    record = result.record or {}
    return {
        "setting": result.name,
        "compressor": result.setting.compressors,
        "level": result.setting.levels,
        "sparsity": record.get("sparsity"),
        "bits_per_weight": record.get("bits_per_weight"),
    }


def _numbers(results: Results, result: SettingResult, suite: str, key: tuple[str, str]) -> dict[str, Any]:
    evaluation = results.get(result.name, suite)
    found = evaluation.estimates[key]
    row = found.as_row()
    if result.name == DENSE and found.n:
        row |= {"dense_score": found.score, "retained": 1.0, "retained_ci_low": 1.0, "retained_ci_high": 1.0}
    elif (pair := evaluation.comparisons.get(key)) is not None:
        row |= {
            "dense_score": pair.dense,
            "retained": pair.retained,
            "retained_ci_low": pair.interval.low,
            "retained_ci_high": pair.interval.high,
            "verdict": pair.verdict,
            "p_value": pair.p_value,
            "flips": pair.flips,
        }
    return row


def leaderboard(results: Results) -> list[dict[str, Any]]:
    """A row for each setting, dense first, then by mean retained share, the largest first."""
    rows = [_leader(results, result) for result in results.settings]
    return sorted(rows, key=lambda row: (row["setting"] != DENSE, -(row["mean_retained"] or 0.0)))


def _leader(results: Results, result: SettingResult) -> dict[str, Any]:
    record = result.record or {}
    row: dict[str, Any] = {
        "setting": result.name,
        "sparsity": record.get("sparsity"),
        "bits_per_weight": record.get("bits_per_weight"),
        "million_parameters": record["parameters"] / 1e6 if record else None,
        "megabytes": record["bytes"] / 1e6 if record else None,
    }
    row["place"] = results.places.get(result.name)
    of_itself = (1.0, None) if results.task_suites else None  # a mean over nothing is none
    mean = of_itself if result.name == DENSE else results.mean_retained(result.name)
    row["mean_retained"] = mean[0] if mean else None
    row["mean_retained_ci_low"] = mean[1].low if mean and mean[1] else None
    row["mean_retained_ci_high"] = mean[1].high if mean and mean[1] else None
    for suite in results.suites:
        found = results.estimate(result.name, suite)
        pair = results.comparison(result.name, suite)
        row |= {
            suite: found.score if found else None,
            f"{suite}_ci_low": found.interval.low if found else None,
            f"{suite}_ci_high": found.interval.high if found else None,
            f"{suite}_verdict": (pair and pair.verdict) or "",
            f"{suite}_holds": results.holds(result.name, suite),
            f"{suite}_n": found.n if found else 0,
            f"{suite}_left_out": found.truncated + found.failed if found else 0,
            f"{suite}_status": results.status(result.name, suite),
        }
    return row


def unseen_by_perplexity(results: Results) -> list[dict[str, Any]]:
    """Settings whose perplexity rose by no more than the margin while a task says that they do not match."""
    measure = results.perplexity_suite
    rows: list[dict[str, Any]] = []
    if measure is None:
        return rows
    for result in results.compressed:
        perplexity = results.comparison(result.name, measure)
        if perplexity is None or not 1 / perplexity.retained <= 1 + results.perplexity_margin:
            continue
        lost = [
            {"suite": suite, "pair": pair}
            for suite in results.suites
            if results.metric(suite).higher_is_better
            and (pair := results.comparison(result.name, suite)) is not None
            and pair.verdict == "not matching"
        ]
        if lost:
            rows.append({"setting": result.name, "increase": 1 / perplexity.retained - 1, "lost": lost})
    return rows


def noise(results: Results) -> list[dict[str, Any]]:
    """How far scores move when the dense model itself is asked in another way: a row for each way and suite."""
    return [
        {"setting": result.name, "suite": suite, "pair": pair}
        for result in results.variants
        for suite in results.suites
        if (pair := results.comparison(result.name, suite)) is not None
    ]


def leaderboard_csv(results: Results) -> str:
    rows = leaderboard(results)
    return csv_text(list(rows[0]), rows)


def leaderboard_markdown(results: Results) -> str:
    """The leaderboard for reading: scores with half-widths of their intervals, verdicts in words."""
    header = ["place", "setting", "sparsity", "bits", "M parameters", "MB", "mean retained"]
    header += [f"{name} ({results.metric(name).name})" for name in results.suites]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for row in leaderboard(results):
        cells = [str(row["place"] or "–"), row["setting"], percent(row["sparsity"]), bits(row["bits_per_weight"])]
        cells += [number(row["million_parameters"], 1), number(row["megabytes"], 0), mean_cell(row)]
        cells += [score_cell(row, name) for name in results.suites]
        lines.append(f"| {' | '.join(cells)} |")
    notes = [
        f"Model: {results.run['model']['name']}, {results.run['dtype']} on {results.run['device']}."
        + (f" {results.run['model']['note']}" if results.run["model"]["note"] else ""),
        "Scores with 95 % intervals. Verdict: does it lose at most 5 % of the dense score, by a paired 95 % interval?",
        f"{DAGGER}: does not hold when all verdicts of the run are judged together (Holm).",
        "Mean retained: share of the dense score left, over "
        + (", ".join(results.task_suites) or "no suite with a signal")
        + ".",
        "Place: settings that the questions cannot tell apart share one (paired intervals, 95 % for all pairs).",
        "Bits: of a weight in the blocks, packed with scales and zero points where it is quantised.",
        "Zeros and quantised weights are stored dense: they make no file smaller and no model faster.",
    ]
    return "\n".join(lines) + "\n\n" + "\n".join(f"{note}  " for note in notes) + "\n"


def bits(value: float | None) -> str:
    """Bits a weight: 4.31, 32."""
    return "–" if value is None else f"{value:.3g}"


def mean_cell(row: dict[str, Any]) -> str:
    if row["mean_retained"] is None:
        return "–"
    if row["mean_retained_ci_low"] is None:
        return percent(row["mean_retained"])
    low, high = percent(row["mean_retained_ci_low"]), percent(row["mean_retained_ci_high"])
    return f"{percent(row['mean_retained'])} [{low}, {high}]"


def score_cell(row: dict[str, Any], suite: str) -> str:
    if row[suite] is None:
        return row[suite + "_status"]
    interval = f"{number(row[suite])} [{number(row[suite + '_ci_low'])}, {number(row[suite + '_ci_high'])}]"
    left_out = f", {row[suite + '_left_out']} left out" if row[suite + "_left_out"] else ""
    return f"{interval} (n {row[suite + '_n']}{left_out}) {verdict_text(row, suite)}".rstrip()


def verdict_text(row: dict[str, Any], suite: str) -> str:
    """A verdict of a leaderboard's row, marked where it is doubtful; empty if there is none."""
    return f"{row[suite + '_verdict']}{'' if row[suite + '_holds'] else f' {DAGGER}'}"


def number(value: Any, digits: int = 3) -> str:
    """Large numbers with fewer digits: 0.412, 63.7, 1,250."""
    if not isinstance(value, int | float) or math.isnan(value):
        return "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.{min(digits, 1)}f}"
    return f"{value:.{digits}f}"


def percent(value: Any, digits: int = 0) -> str:
    return "–" if not isinstance(value, int | float) or not math.isfinite(value) else f"{100 * value:.{digits}f} %"


def csv_text(columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> str:
    """Rows as CSV: those of their values that have a column; what is missing or no finite number stays empty."""
    text = io.StringIO()
    writer: csv.DictWriter[str] = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _cell(row.get(key)) for key in columns})
    return text.getvalue()


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value


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
