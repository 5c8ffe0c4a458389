"""Two settings of a run side by side: paired tests on every suite, and the answers that changed between them."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from kick import compare, statistics
from kick.compare import Comparison
from kick.errors import RunError, unknown_name
from kick.report.results import Evaluation, Results
from kick.report.tables import number, percent
from kick.settings import DENSE
from kick.suite import Sample

_LONGEST = 200  # characters of an answer in the text; JSON has all of it


class Changed(NamedTuple):
    """A question that two settings score differently: their answers, and by how much the second scores more."""

    id: str
    prompt: str
    first: str
    second: str
    difference: float


@dataclass(frozen=True)
class Pair:
    """One suite: what the second setting kept of the first's score. `holm` is adjusted over the suites compared."""

    suite: str
    metric: str
    first: float
    second: float
    comparison: Comparison
    holm: float
    flipped: list["Changed"]

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
            "flipped": [row._asdict() for row in self.flipped],
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
        flipped = [] if score.metric.descriptive else _flipped(results, suite, score.metric.value, a, b)
        if outcome.lost is None:  # no answer is lost or won: of texts, those that differ most come first
            flipped = [row for row in flipped if row.first or row.second]
            flipped.sort(key=lambda row: -abs(row.difference))
        found.append(Pair(suite, metric, score.point, other.point, outcome, float("nan"), flipped))
    if not found:
        raise RunError(f"{first} and {second} have no suite in common.", "See the leaderboard for what failed.")
    adjusted = statistics.holm([pair.comparison.p_value for pair in found])
    return [replace(pair, holm=holm) for pair, holm in zip(found, adjusted, strict=True)]


def _flipped(results: Results, suite: str, value: str, first: Evaluation, second: Evaluation) -> list[Changed]:
    """Questions on which the two score differently, those that the second lost before those that it won."""
    prompts = {sample.id: sample.prompt for sample in results.get(DENSE, suite).samples or first.samples}
    return [
        Changed(sample.id, prompts.get(sample.id, sample.prompt), sample.output or "", again.output or "", difference)
        for sample, again, difference in changed_answers(first, second, value)
    ]


def changed_answers(first: Evaluation, second: Evaluation, value: str) -> list[tuple[Sample, Sample, float]]:
    """The samples of both on which they score differently in `value`, the second's losses before its gains.

    With each pair by how much the second scores more. Where a judge graded them, that is by its grades.
    """
    other = {sample.id: sample for sample in second.samples}
    changed = []
    for sample in first.samples:
        again = other.get(sample.id)
        if again is None or sample.left_out or again.left_out:
            continue
        before, after = first.grades.get(sample.id), second.grades.get(sample.id)
        if before is None or after is None:
            before, after = sample.scores.get(value), again.scores.get(value)
        if before is not None and after is not None and after != before:
            changed.append((sample, again, after - before))
    return sorted(changed, key=lambda item: item[2])


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
            which = "" if pair.comparison.lost is not None else "; those that differ most:"
            lines.append(f"\n{pair.suite}: {len(pair.flipped)} answers changed{which}")
        for row in pair.flipped[:most]:
            lines += [
                f"  {row.id}: …{_short(row.prompt[-_LONGEST:])}",
                f"    {first}: {_short(row.first)}",
                f"    {second}: {_short(row.second)}",
            ]
    return "\n".join(lines)


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else number(value)


def _short(text: str) -> str:
    """On one line, without what would move a terminal's cursor."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(text[: _LONGEST + 1].split()) + ("…" if len(text) > _LONGEST else "")
