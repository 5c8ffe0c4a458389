"""Which automatic match agrees with people about written answers?

    python benchmarks/agree_with_people.py --data DIR

DIR holds qa_judgements/EVOUNA/{NQ,TQ}.json (Wang et al., "Evaluating Open-QA Evaluation", arXiv 2305.12421): answers of
five systems, each marked right or wrong by people. For each of kick's metrics: the share of equal marks, the share of
wrong answers that it takes for right, and of right answers that it takes for wrong.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from kick_tasks import scoring

SYSTEMS = ("fid", "gpt35", "chatgpt", "gpt4", "newbing")
RULES: dict[str, scoring.Rule] = {"NQ": "squad", "TQ": "triviaqa"}


def judged(path: Path, system: str) -> list[tuple[str, list[str], bool]]:
    """(answer, accepted answers, whether people call it right) for each usable row."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [
        (row[f"answer_{system}"] or "", row["golden_answer"].split("/"), row[f"judge_{system}"])
        for row in rows
        if not row["improper"] and isinstance(row[f"judge_{system}"], bool)
    ]


def agreement(rows: list[tuple[str, list[str], bool]], metric: Callable[[str, list[str]], float]) -> dict[str, float]:
    marks = [(metric(answer, accepted) >= 0.5, right) for answer, accepted, right in rows]
    wrong, right = [m for m, people in marks if not people], [m for m, people in marks if people]
    return {
        "n": len(marks),
        "people": len(right) / len(marks),
        "agree": sum(m == people for m, people in marks) / len(marks),
        "false_positives": sum(wrong) / len(wrong),
        "false_negatives": 1 - sum(right) / len(right),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    options = parser.parse_args()
    line = "{:3} {:8} {:12} {:>5} {:>7} {:>6} {:>15} {:>15}"
    print(line.format("", "system", "metric", "n", "people", "agree", "wrong as right", "right as wrong"))
    for name, rule in RULES.items():
        for system in SYSTEMS:
            rows = judged(options.data / "qa_judgements" / "EVOUNA" / f"{name}.json", system)
            for metric in (scoring.contains, scoring.exact_match, scoring.token_f1):
                found = agreement(rows, partial(metric, rule=rule))
                n, *shares = found.values()
                print(line.format(name, system, metric.__name__, n, *(f"{share:.3f}" for share in shares)))


if __name__ == "__main__":
    main()
