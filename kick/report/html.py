"""report.html: one file that explains itself, works offline and on a phone. Everything from a model is escaped."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kick import statistics
from kick.compare import Comparison
from kick.levels import Bits, Sparsity
from kick.report import tables
from kick.report.figures import Drawn
from kick.report.pairs import changed_answers
from kick.report.results import NOT_YET, Results
from kick.report.template import inline, render, script
from kick.settings import DENSE
from kick.spec import distinct
from kick.suite import Sample

ANSWERS_PER_SUITE = 6
_SETTINGS_PER_QUESTION = 60
_LONG = 1500
_FLIPS_IN_ALL, _PROMPT, _ANSWER, _QUESTION = 900, 900, 400, 200  # flips, and characters of each part


def page(results: Results, drawn: list[Drawn]) -> str:
    return render(
        "report.html.j2",
        results=results,
        run=results.run,
        frontier=_frontier(results),
        leaderboard=tables.leaderboard(results),
        comparisons=_comparisons(results),
        flips=(flips := _flips(results)),
        flips_shown=max((len(place.shown) for place in flips.values()), default=0),
        seeds=tables.seed_spread(results),
        **script("report.js"),
        unseen=tables.unseen_by_perplexity(results),
        perplexity_margin=results.perplexity_margin,
        noise=tables.noise(results),
        figures=[(figure, inline(figure)) for figure in drawn],
        judge=results.judge,
        answers=_answers(results),
        failures=_failures(results),
        warnings=_by_warning(results),
        trained=[(r, r.training) for r in results.compressed if r.training],
        brought=[(r, facts) for r in results.compressed if (facts := _brought(r.record))],
        facts=_facts(results),
        config=json.dumps(results.run["config"], indent=2, ensure_ascii=False),
    )


def _failures(results: Results) -> dict[tuple[str, str], list[str]]:
    """Suites without a score, by setting and reason: a run that is not finished has many."""
    found: dict[tuple[str, str], list[str]] = {}
    for evaluation in results.evaluations.values():
        if evaluation.reason is not None:
            found.setdefault((evaluation.setting, evaluation.reason), []).append(evaluation.suite)
    return found


def _by_warning(results: Results) -> dict[str, list[str]]:
    """The settings that each warning is about: levels of one method often share one."""
    found: dict[str, list[str]] = {}
    for result in results.settings:
        for warning in (result.record or {}).get("warnings", []):
            found.setdefault(warning, []).append(result.name)
    variants = {result.name for result in results.settings if result.setting.is_dense}  # may be asked in others
    for evaluation in results.evaluations.values():
        if evaluation.asked_otherwise:
            warning = f"{evaluation.suite}: {evaluation.asked_otherwise} questions had another prompt than dense's"
            found.setdefault(warning, []).append(evaluation.setting)
        own, dense = evaluation.batch_size, results.get(DENSE, evaluation.suite).batch_size
        if own and dense and own != dense and evaluation.setting not in variants:
            warning = f"{evaluation.suite}: asked in batches of {own}, dense in {dense}: the smaller after a failure"
            found.setdefault(warning, []).append(evaluation.setting)
    return found


def _frontier(results: Results) -> list[dict[str, Any]]:
    """For each method with sparsities or bits: per suite how far every tested level matches."""
    rows = []
    for family in results.families:
        if not any(r.family == family and isinstance(r.level, Sparsity | Bits) for r in results.compressed):
            continue
        cells = []
        for suite in results.suites:
            dense = results.estimate(DENSE, suite)
            if results.metric(suite).descriptive:
                cells.append("–")
            elif dense is None or not dense.signal:
                cells.append("no signal")
            else:
                cells.append(_frontier_cell(results.verdicts(family, suite), results.doubtful_levels(family, suite)))
        rows.append({"family": family, "cells": cells})
    return rows


_WORST_FIRST = ("not matching", "undecided", "matching")
_WITHOUT_VERDICT = ("failed", "not judged", NOT_YET)


def _frontier_cell(verdicts: list[tuple[float, str]], doubtful: Sequence[float] = ()) -> str:
    """How far it matches, and what is known of the next level: "20 % (30 %: undecided)", "4 bits (3 bits: ...)".

    doubtful: levels whose verdict does not hold when all are judged together; where it rests on one: "20 % †".
    """

    def name(level: float) -> str:
        return f"{-level:g} bits" if level < 0 else tables.percent(level)

    reached = statistics.frontier(verdicts)
    beyond = [(level, verdict) for level, verdict in verdicts if reached is None or level > reached]
    text = "none" if reached is None else name(reached)
    if reached is not None and any(level <= reached for level in doubtful):
        text += f" {tables.DAGGER}"
    if not beyond:
        return text
    level = beyond[0][0]
    own = [verdict for each, verdict in beyond if each == level and verdict != "no signal"]
    if missing := next((status for status in _WITHOUT_VERDICT if status in own), None):
        return f"{text} ({name(level)}: {missing})"
    matching = sum(verdict == "matching" for verdict in own)
    if len(own) > 1 and matching:  # of several seeds
        return f"{text} ({name(level)}: {matching} of {len(own)} matching)"
    return f"{text} ({name(level)}: {next(v for v in _WORST_FIRST if v in own)})" if own else text


@dataclass(frozen=True)
class _Flips:
    """Of one setting on one suite: how many answers changed, and some of them."""

    id: str
    lost: int
    won: int
    shown: list[dict[str, Any]]


def _flips(results: Results) -> dict[tuple[str, str], _Flips]:
    """For each verdict on right-or-wrong answers some that changed; fewer for each where there are many."""
    pairs = {
        (result.name, suite): pair
        for result in results.compressed
        for suite in results.suites
        if (pair := results.comparison(result.name, suite)) is not None and pair.flips
    }
    if len(pairs) > _FLIPS_IN_ALL // 2:  # too many for a page: those that changed most
        kept = set(sorted(pairs, key=lambda place: -(pairs[place].flips or 0))[: _FLIPS_IN_ALL // 2])
        pairs = {place: pair for place, pair in pairs.items() if place in kept}
    most = max(2, min(20, _FLIPS_IN_ALL // max(1, len(pairs))))
    found = {}
    for number, ((setting, suite), pair) in enumerate(pairs.items()):
        value = results.metric(suite).value
        changed = changed_answers(results.get(DENSE, suite), results.get(setting, suite), value)
        shown = [
            {
                "id": sample.id,
                "question": _question(sample.prompt),
                "prompt": _shorten(sample.prompt, _PROMPT),
                "dense": _shorten(sample.output or "", _ANSWER),
                "other": _shorten(again.output or "", _ANSWER),
                "lost": difference < 0,
            }
            for sample, again, difference in _some(changed, most)
        ]
        found[setting, suite] = _Flips(f"flips-{number}", pair.lost or 0, pair.won or 0, shown)
    return found


def _some(changed: list[tuple[Sample, Sample, float]], most: int) -> list[tuple[Sample, Sample, float]]:
    """Lost ones first, but a quarter of the places for what was won."""
    lost = [each for each in changed if each[2] < 0]
    won = [each for each in changed if each[2] > 0]
    kept_for_won = min(len(won), most // 4)
    first = lost[: most - kept_for_won]
    return [*first, *won[: most - len(first)]]


def _question(prompt: str) -> str:
    """The end of a prompt, where the question stands."""
    text = " ".join(prompt.strip().split("\n")[-2:])
    return text if len(text) <= _QUESTION else f"…{text[-_QUESTION:]}"


@dataclass(frozen=True)
class _Row:
    setting: str
    suite: str
    estimate: Any
    pair: Any
    adjusted: float
    holds: bool  # the verdict, among all of them
    by_point: str
    above_chance: float | None


def _comparisons(results: Results) -> list[_Row]:
    """Every verdict, with p-values adjusted over all of them (Holm)."""
    return [
        _Row(
            setting,
            suite,
            results.estimate(setting, suite),
            pair,
            results.adjusted[setting, suite],
            results.holds(setting, suite),
            _by_point(pair.retained),
            _above_chance(pair, results.metric(suite).chance),
        )
        for (setting, suite), pair in results.compared.items()
    ]


def _above_chance(pair: Comparison, chance: float | None) -> float | None:
    """Of what the dense model has above chance, the share that is left; below 0 for less than guessing gives."""
    if chance is None or pair.verdict == "no signal" or not pair.dense > chance:
        return None
    return (pair.retained * pair.dense - chance) / (pair.dense - chance)


def _by_point(retained: float) -> str:
    if math.isnan(retained):
        return "–"
    return "matching" if statistics.point_verdict(retained) else "not matching"


def _answers(results: Results) -> list[dict[str, Any]]:
    """For each suite that has answers to show: some questions with every setting's, those that changed first."""
    sections = []
    for suite in results.suites:
        dense = {sample.id: sample for sample in results.get(DENSE, suite).samples}
        key = results.suites[suite].metrics[0].value
        others = {
            result.name: {sample.id: sample for sample in results.get(result.name, suite).samples}
            for result in results.compressed
        }
        answered = [id for id, sample in dense.items() if sample.output is not None and sample.error is None]
        changes = {
            id: sum(
                1
                for samples in others.values()
                if id in samples and samples[id].scores.get(key) != dense[id].scores.get(key)
            )
            for id in answered
        }
        chosen = sorted(answered, key=lambda id: (-changes[id], id))
        picked = chosen[: ANSWERS_PER_SUITE // 2] + chosen[len(chosen) // 2 :][: ANSWERS_PER_SUITE // 2]
        if picked:
            rows = [
                {
                    "id": id,
                    "prompt": _shorten(dense[id].prompt),
                    "answers": [(DENSE, _answer(dense[id], key, results.get(DENSE, suite).grades))]
                    + [
                        (name, _answer(others[name][id], key, results.get(name, suite).grades))
                        for name in _some_settings(id, others)
                    ],
                    "more": max(0, sum(id in samples for samples in others.values()) - _SETTINGS_PER_QUESTION),
                }
                for id in dict.fromkeys(picked)
            ]
            sections.append({"suite": suite, "questions": rows})
    return sections


def _some_settings(id: str, others: dict[str, dict[str, Sample]]) -> list[str]:
    """Those that answered question `id`; of very many some, evenly over their order, which is that of their levels."""
    answered = [name for name, samples in others.items() if id in samples]
    most = min(len(answered), _SETTINGS_PER_QUESTION)
    return [answered[place * len(answered) // most] for place in range(most)]


def _answer(sample: Sample, key: str, grades: dict[str, float]) -> dict[str, Any]:
    score = grades.get(sample.id) if grades else sample.scores.get(key)
    return {"text": _shorten(sample.output or ""), "score": score, "truncated": sample.truncated}


def _shorten(text: str, most: int = _LONG) -> str:
    """Both ends of a long text: a few-shot prompt begins with examples and ends with the question."""
    return text if len(text) <= most else f"{text[: most // 2]}\n[…]\n{text[-most // 2 :]}"


def _brought(record: dict[str, Any] | None) -> dict[str, Any] | None:
    """What was found out about a model that was made elsewhere."""
    stages = record["stages"] if record else []
    return stages[0]["facts"] if stages and "format" in stages[0]["facts"] else None


def _lm_records(results: Results) -> list[dict[str, Any]]:
    """What the LMs said of themselves, whether they share prefixes and if not why: one, if all suites have the same."""
    return distinct(evaluation.lm for evaluation in results.evaluations.values() if evaluation.lm)


def _parity(row: dict[str, Any]) -> str:
    """How one LM differs from the sweep's main one, on one kind of request."""
    found = row["reason"] if row["difference"] is None else f"differs by {row['difference']:.2g}"
    return f"{row['lm']} beside {row['reference']}, {row['kind']}: {found}{'' if row['agrees'] else ' (DISAGREES)'}"


def _facts(results: Results) -> list[tuple[str, str]]:
    """What the report records of a run, named; what it does not have is left out."""
    run = results.run
    dense = next((r.record for r in results.settings if r.setting.is_dense and r.record), None)
    hardware = ", ".join(f"{key} {value}" for key, value in run["hardware"].items())
    facts = [
        ("model", f"{run['model']['name']} ({run['model']['kind']}), SHA-256 {run['model']['fingerprint'][:16]}…"),
        ("commit on the hub", run["model"].get("commit")),
        ("about the model", run["model"]["note"]),
        ("parameters", f"{dense['parameters']:,}" if dense else ""),
        ("precision and device", f"{run['dtype']} on {run['device']}"),
        *(("lm", ", ".join(f"{key} {value}" for key, value in own.items())) for own in _lm_records(results)),
        *(("lm parity", _parity(row)) for row in run.get("parity", [])),
        ("calibration", ", ".join(f"{key} {value}" for key, value in run["config"]["calibration"].items())),
        ("hardware", hardware),
        ("versions", ", ".join(f"{name} {version}" for name, version in run["versions"].items())),
        ("started", run["started"]),
    ]
    for name, suite in run["suites"].items():
        params = ", ".join(f"{key} {value}" for key, value in suite["params"].items() if value is not None)
        decided = ", ".join(f"{key} {value}" for key, value in results.get(DENSE, name).suite_record.items() if value)
        facts.append(
            (
                f"suite {name}",
                f"{suite['questions']} questions of {suite['source']} ({params}), data {suite['data']}"
                + (f"; {decided}" if decided else ""),
            )
        )
    return [(name, value) for name, value in facts if value]
