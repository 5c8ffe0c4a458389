"""Several runs as one static site: an overview, a page for each model and each method, CSV and JSON.

Only what was asked the same can stand in one column. Where two runs asked a suite of one name differently (other
questions, parameters, prompts or templates), or computed in another precision, they are refused, and it is said why.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kick.config import COLUMNS
from kick.errors import RunError
from kick.files import check_writable, safe_name, write_json, write_text
from kick.report import tables
from kick.report.figures import draw, sizes
from kick.report.results import Results, read_results
from kick.report.template import inline, render, script
from kick.settings import DENSE
from kick.statistics import TOLERANCE
from kick.suite import Metric

_SAME = ("suite", "plugin", "params", "questions", "data")  # of a suite, for two runs to be compared on it
_OF_A_SUITE = ("", "_ci_low", "_ci_high", "_verdict", "_holds", "_n", "_left_out", "_status")


def write_leaderboard(runs: Sequence[Path], out: Path) -> list[dict[str, Any]]:
    """The site into `out`; its rows, the best first. Raises RunError for runs that cannot be compared."""
    found = [read_results(run) for run in runs]
    check_comparable(found)
    found = compared_across_tokenizers(found)
    check_writable(out)
    if (out / "run.json").exists():
        raise RunError(f"{out} is a run, with a leaderboard of its own.", "Choose another --out.")
    shared = shared_suites(found)
    found = [replace(results, in_means=shared) for results in found]  # a mean over other suites is another measure
    rows = [row for results in found for row in _rows(results)]
    rows = in_order(rows if len(found) == 1 else placed(rows))  # of one run places are known from paired answers
    suites = list(dict.fromkeys(suite for results in found for suite in results.suites))
    metrics = {suite: next(r.metric(suite).name for r in found if suite in r.suites) for suite in suites}
    out.mkdir(parents=True, exist_ok=True)
    figures = draw(sizes.planned(found), out / "figures")
    pages = {"index.html": ("All models and methods", rows)}
    for key, folder in (("model", "models"), ("method", "methods")):
        for value in dict.fromkeys(row[key] for row in rows):
            own = [row for row in rows if row[key] == value or (key == "method" and row["setting"] == DENSE)]
            pages[f"{folder}/{safe_name(value)}.html"] = (value, own)
    for name, (title, own) in pages.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        root = "../" if "/" in name else ""
        values: dict[str, Any] = {
            "title": title,
            "rows": own,
            "suites": suites,
            "metrics": metrics,
            "runs": found,
            "root": root,
            "shared": shared,
        }
        values |= {"figures": [] if "/" in name else figures, "inline": inline, **script("report.js")}
        write_text(out / name, render("leaderboard.html.j2", **values))
    columns = [*COLUMNS, *(f"{suite}{part}" for suite in suites for part in _OF_A_SUITE)]
    write_text(out / "leaderboard.csv", tables.csv_text(columns, rows))
    write_json(out / "leaderboard.json", rows)
    return rows


def shared_suites(found: Sequence[Results]) -> list[str]:
    """The suites that every run asked and on which every dense model shows a signal: what means are over."""
    return [suite for suite in found[0].task_suites if all(suite in results.task_suites for results in found)]


def check_comparable(found: Sequence[Results]) -> None:
    """Raise RunError where runs of one name of suite, or one model and setting, say different things."""
    first = found[0]
    seen: dict[tuple[str, str], Results] = {}
    models: dict[str, Results] = {}
    for results in found:
        if results.run["dtype"] != first.run["dtype"]:
            raise RunError(
                f"{results.path} was computed in {results.run['dtype']}, {first.path} in {first.run['dtype']}.",
                "Only runs in one precision can be compared.",
            )
        model = results.run["model"]
        other = models.setdefault(model["name"], results)
        if other.run["model"]["fingerprint"] != model["fingerprint"]:
            raise RunError(
                f"'{model['name']}' is one model in {other.path} and another in {results.path}: weights, configuration "
                "or tokenizer differ.",
                "Give the model of one of them another path or name, or leave out a run.",
            )
        for result in results.settings:
            key = model["name"], result.name
            if key in seen and result.name != DENSE:
                raise RunError(
                    f"{key[1]} of {key[0]} is in {seen[key].path} and in {results.path}.", "Name one of them."
                )
            seen[key] = results
    for suite in dict.fromkeys(suite for results in found for suite in results.suites):
        asked = [(results, _asked(results, suite)) for results in found if suite in results.suites]
        for results, own in asked[1:]:
            for name, value in own.items():
                if not _same(name, value, asked[0][1][name]):
                    raise RunError(
                        f"{results.path} and {asked[0][0].path} asked '{suite}' differently: {name} is {value!r} in "
                        f"one and {asked[0][1][name]!r} in the other.",
                        "Give one of the two suites a label, or leave out a run.",
                    )


def compared_across_tokenizers(found: Sequence[Results]) -> list[Results]:
    """Where texts are cut into other tokens, what is counted by tokens says nothing: the suite's metric is another.

    Raises RunError for a suite that has no other.
    """
    metrics: dict[str, Metric] = {}
    for suite in dict.fromkeys(suite for results in found for suite in results.suites):
        own = [results for results in found if suite in results.suites]
        if own[0].metric(suite).per != "tokens" or own[0].metric(suite).descriptive:
            continue
        seen: dict[str, float] = {}
        if not any(seen.setdefault(id, n) != n for results in own for id, n in _tokens(results, suite).items()):
            continue
        others = (
            metric for metric in own[0].suites[suite].metrics if metric.per != "tokens" and not metric.descriptive
        )
        metric = next(others, None)
        if metric is None:
            raise RunError(
                f"'{suite}' counts by tokens, and {own[0].path} and others have different tokenizers.",
                "Leave out a run, or the suite.",
            )
        metrics[suite] = metric
    return [replace(results, metrics=metrics) for results in found]


def _tokens(results: Results, suite: str) -> dict[str, float]:
    """For each question, how many tokens it has for the dense model."""
    score = results.get(DENSE, suite).scores.get(results.primary(suite))
    return dict(zip(score.ids, score.per.tolist(), strict=True)) if score else {}


def _asked(results: Results, suite: str) -> dict[str, Any]:
    """How a suite was asked: what has to be the same for two columns to be one."""
    given = results.run["suites"][suite]
    metric = results.metric(suite)
    dense = results.get(DENSE, suite)
    asked = {name: given.get(name) for name in _SAME} | {"decided": dense.suite_record, "shots": dense.shots}
    judged = metric.name in {own.name for own in results.suites[suite].judged_metrics}
    return asked | {"metric": metric.name, "judge": _judged_by(results, suite) if judged else None}


def _same(name: str, one: Any, other: Any) -> bool:
    """Whether a suite was asked alike in this. Of shots (how many questions had how many examples in front) a few may
    differ: another tokenizer makes some too long.
    """
    if name != "shots":
        return bool(one == other)
    moved = sum(abs(one.get(number, 0) - other.get(number, 0)) for number in {*one, *other}) / 2
    return moved <= TOLERANCE * max(1, sum(one.values()), sum(other.values()))


def _judged_by(results: Results, suite: str) -> dict[str, Any]:
    """Who gave a suite's ratings, and how it was asked."""
    record = results.judge or {}
    asked = record.get("judge", {}).get("suites", {}).get(suite, {})
    return {**record.get("identity", {}), **{key: record.get(key) for key in ("versions", "prompts")}, "asked": asked}


def _rows(results: Results) -> Iterator[dict[str, Any]]:
    methods = {result.name: result.setting.compressors for result in results.settings}
    for row in tables.leaderboard(results):
        yield {
            **row,
            "model": results.run["model"]["name"],
            "method": methods[row["setting"]],
            "run": str(results.path),
        }


def placed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the place of each: one more than the number of rows that are clearly better, whose intervals lie above.

    So rows that cannot be told apart share a place. Dense is the measure and takes none.
    """
    own = [row for row in rows if row["method"] != DENSE and row["mean_retained_ci_high"] is not None]
    found = [{**row, "place": None} for row in rows if row not in own]
    for row in own:
        better = sum(other["mean_retained_ci_low"] > row["mean_retained_ci_high"] for other in own)
        found.append({**row, "place": better + 1})
    return found


def in_order(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Dense first, then by what was retained, the most first."""
    return sorted(rows, key=lambda row: (row["setting"] != DENSE, -(row["mean_retained"] or 0.0), row["setting"]))
