"""What is kept of a training run: a line for each step, and its totals."""

import json
import math
from pathlib import Path
from typing import Any

from kick.checkpoint import HISTORY
from kick.files import to_json, write_text


class History:
    """The steps of one run, each a line of history.jsonl in `folder`, written as it comes."""

    def __init__(self, folder: Path, begin: int | None = None) -> None:
        """begin: keep the steps before this one; later ones were not saved and come again. None: only read."""
        self.path = folder / HISTORY
        lines = self.path.read_text(encoding="utf-8").split("\n") if self.path.is_file() else []
        found = [row for line in lines if (row := _read(line))]
        self.rows = [row for row in found if begin is None or row["step"] < begin]
        if begin is not None:
            write_text(self.path, "".join(to_json(row, indent=None) + "\n" for row in self.rows))

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(to_json(row, indent=None) + "\n")

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of the steps that tell `name`."""
        rows = [row for row in self.rows if isinstance(row.get(name), int | float)]
        return [row["step"] for row in rows], [row[name] for row in rows]

    def totals(self) -> dict[str, Any]:
        """Steps, tokens, tokens a second, hours; the loss at the beginning and over the last tenth."""
        tokens, seconds = (sum(row[key] for row in self.rows) for key in ("tokens", "seconds"))
        losses = [row.get("cross_entropy", row["loss"]) for row in self.rows]
        last = losses[-max(1, len(losses) // 10) :]
        return {
            "steps": len(self.rows),
            "tokens": tokens,
            "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
            "hours": round(seconds / 3600, 4),
            "first_loss": losses[0] if losses else None,
            "last_loss": math.fsum(last) / len(last) if last else None,
        }


def together(histories: list[History]) -> dict[str, Any]:
    """The totals of stretches that followed each other: the first one's first loss, the last one's last."""
    each = [history.totals() for history in histories]
    steps, tokens, hours = (sum(totals[key] for totals in each) for key in ("steps", "tokens", "hours"))
    return {
        "steps": steps,
        "tokens": tokens,
        "tokens_per_second": round(tokens / hours / 3600, 1) if hours else None,
        "hours": hours,
        "first_loss": each[0]["first_loss"],
        "last_loss": each[-1]["last_loss"],
    }


def _read(line: str) -> dict[str, Any] | None:
    """A row, or nothing for the line that was being written when the process died."""
    try:
        return json.loads(line) if line.strip() else None
    except ValueError:
        return None
