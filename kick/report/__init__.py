"""From a run directory to tables, figures and one HTML page. Nothing is asked or judged again."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from kick.files import check_own, check_writable, write_text
from kick.report.results import PERPLEXITY_MARGIN, Results, read_results
from kick.sweep.store import alone_in


def write_tables(results: Results, out: Path) -> None:
    """scores.csv, leaderboard.csv and leaderboard.md into `out`."""
    from kick.report import tables

    write_text(out / "scores.csv", tables.scores_csv(results))
    write_text(out / "leaderboard.csv", tables.leaderboard_csv(results))
    write_text(out / "leaderboard.md", tables.leaderboard_markdown(results))


def write_report(
    run: Path,
    out: Path | None = None,
    figures_like: Sequence[str] = ("*",),
    perplexity_margin: float = PERPLEXITY_MARGIN,
) -> Results:
    """Everything that a report holds: tables, figures and report.html, into `out` (by default the run itself).

    figures_like: globs of the figures' names. Raises ConfigError if one fits none. perplexity_margin: the relative rise
    of perplexity that is taken to look fine.
    """
    from kick.report import figures, html

    out = out or run
    into_the_run = out.resolve() == run.resolve()
    if not into_the_run:
        check_writable(out)
        check_own(out, "report.html")
    with alone_in(run) if into_the_run else nullcontext():
        results = replace(read_results(run), perplexity_margin=perplexity_margin)
        chosen = figures.choose(results, figures_like)
        out.mkdir(parents=True, exist_ok=True)
        write_tables(results, out)
        drawn = figures.draw(chosen, out / "figures")
        write_text(out / "report.html", html.page(results, drawn))
    return results
