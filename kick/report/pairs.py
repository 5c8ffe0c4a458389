"""Two settings of a run side by side: paired tests on every suite, and the answers that changed between them."""

from dataclasses import dataclass, replace
from typing import Any

from kick import compare, statistics
from kick.compare import Comparison
from kick.errors import RunError, unknown_name
from kick.report.results import Results
from kick.report.tables import number, percent
from kick.settings import DENSE
from kick.suite import Sample

_LONGEST = 200  # characters of an answer in the text; JSON has all of it


@dataclass(frozen=True)
class Pair:
    """One suite: what the second setting kept of the first's score. `holm` is adjusted over the suites compared."""

    suite: str
    metric: str
    first: float
    second: float
    comparison: Comparison
    holm: float
    flipped: list[tuple[str, str, str, str]]  # id, prompt, the first's answer, the second's

    def as_row(self) -> dict[str, Any]:
        found = self.comparison
        return {
            "suite": self.suite,
            "metric": self.metric,
            "n": found.n,
            "first": self.first,
            "second": self.second,
            "retained": found.retained,
            "retained_ci_low": found.interval.low,
            "retained_ci_high": found.interval.high,
            "verdict": found.verdict,
            "p_value": found.p_value,
            "p_holm": self.holm,
            "lost": found.lost,
            "won": found.won,
            "n_to_decide": found.n_to_decide,
            "flipped": [dict(zip(("id", "prompt", "first", "second"), row, strict=True)) for row in self.flipped],
        }


def pairs(results: Results, first: str, second: str) -> list[Pair]:
    """Every suite that both settings answered. Raises KickError for a setting that is not in the run."""
    names = [result.name for result in results.settings]
    for name in (first, second):
        if name not in names:
            raise unknown_name("setting", name, names)
    found: list[Pair] = []
    for suite in results.suites:
        metric, group = results.primary(suite)
        a, b = results.get(first, suite), results.get(second, suite)
        if (metric, group) not in a.scores or (metric, group) not in b.scores:
            continue
        score, other = a.scores[metric, group], b.scores[metric, group]
        outcome = compare.compare(score, other, a.estimates[metric, group].signal)
        flipped = []
        if outcome.lost is not None:  # where answers are right or wrong
            flipped = _flipped(results, suite, score.metric.value, a.samples, b.samples)
        found.append(Pair(suite, metric, score.point, other.point, outcome, float("nan"), flipped))
    if not found:
        raise RunError(f"{first} and {second} have no suite in common.", "See the leaderboard for what failed.")
    adjusted = statistics.holm([pair.comparison.p_value for pair in found])
    return [replace(pair, holm=holm) for pair, holm in zip(found, adjusted, strict=True)]


def _flipped(
    results: Results, suite: str, value: str, first: list[Sample], second: list[Sample]
) -> list[tuple[str, str, str, str]]:
    """Questions on which the two score differently, those that the second lost before those that it won."""
    prompts = {sample.id: sample.prompt for sample in results.get(DENSE, suite).samples or first}
    return [
        (sample.id, prompts.get(sample.id, sample.prompt), sample.output or "", again.output or "")
        for sample, again in changed_answers(first, second, value)
    ]


def changed_answers(first: list[Sample], second: list[Sample], value: str) -> list[tuple[Sample, Sample]]:
    """The samples of both on which they score differently in `value`, the second's losses before its gains."""
    other = {sample.id: sample for sample in second}
    changed = []
    for sample in first:
        again = other.get(sample.id)
        if again is None or not all(_counts(own, value) for own in (sample, again)):
            continue
        if difference := again.scores[value] - sample.scores[value]:
            changed.append((difference, sample, again))
    return [(sample, again) for _, sample, again in sorted(changed, key=lambda item: item[0])]


def _counts(sample: Sample, value: str) -> bool:
    return value in sample.scores and sample.error is None and not sample.truncated


def in_words(found: list[Pair], first: str, second: str, most: int) -> str:
    """A table of the suites, then up to `most` answers of each that changed."""
    lines = [
        f"| suite | n | {first} | {second} | retained | p | p (Holm) | lost / won | verdict |",
        f"|{'---|' * 9}",
    ]
    for pair in found:
        own = pair.comparison
        share = f"{percent(own.retained)} [{percent(own.interval.low)}, {percent(own.interval.high)}]"
        flips = "–" if own.lost is None else f"{own.lost} / {own.won}"
        more = f", about {own.n_to_decide:,} questions would decide" if own.n_to_decide else ""
        cells = [f"{pair.suite} ({pair.metric})", str(own.n), number(pair.first), number(pair.second), share]
        cells += [_p(own.p_value), _p(pair.holm), flips, f"{own.verdict or '–'}{more}"]
        lines.append(f"| {' | '.join(cells)} |")
    for pair in found:
        if pair.flipped and most:
            lines.append(f"\n{pair.suite}: {len(pair.flipped)} answers changed")
        for id, prompt, a, b in pair.flipped[:most]:
            lines += [
                f"  {id}: …{_short(prompt[-_LONGEST:])}",
                f"    {first}: {_short(a)}",
                f"    {second}: {_short(b)}",
            ]
    return "\n".join(lines)


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else number(value)


def _short(text: str) -> str:
    """On one line, without what would move a terminal's cursor."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(text[: _LONGEST + 1].split()) + ("…" if len(text) > _LONGEST else "")
