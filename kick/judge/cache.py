"""What a judge was asked, by content: a question that was answered is never paid for twice."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from kick.files import to_json
from kick.judge.client import Verdict
from kick.judge.questions import Answer
from kick.judge.spec import JudgeSpec
from kick.settings import digest


class Cache:
    """What was asked so far, by content, and what it took. Unanswered questions are kept too: they cost as much."""

    def __init__(self, path: Path, spec: JudgeSpec) -> None:
        self.path = path
        self.judge = digest(spec.identity())
        self._verdicts: list[tuple[str, str, Verdict]] = []  # (judge, key, verdict), the last of a key counts
        self._file: TextIO | None = None
        for line in path.read_bytes().split(b"\n") if path.is_file() else []:
            try:
                row = json.loads(line)
                self._verdicts.append((row.pop("by"), row.pop("key"), Verdict(**row)))
            except (ValueError, KeyError, TypeError):  # cut short by a crash: it is asked again
                continue
        self._by_key = {key: verdict for _, key, verdict in self._verdicts}

    def answer(self, key: str) -> Answer | None:
        return self._by_key[key].answer if key in self._by_key else None

    def get(self, key: str) -> Verdict | None:
        return self._by_key.get(key)

    def of_this_judge(self) -> list[Verdict]:
        return [verdict for judge, _, verdict in self._verdicts if judge == self.judge]

    def used(self) -> tuple[int, int]:
        """(prompt, output) tokens that this judge took so far."""
        own = self.of_this_judge()
        return sum(verdict.prompt_tokens for verdict in own), sum(verdict.output_tokens for verdict in own)

    def spent(self) -> tuple[int, int]:
        """(prompt, output) tokens of every judge that graded this run: what a budget counts."""
        everything = [verdict for _, _, verdict in self._verdicts]
        return sum(v.prompt_tokens for v in everything), sum(v.output_tokens for v in everything)

    @contextmanager
    def appending(self) -> Iterator[None]:
        with open(self.path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # half a line, left by a crash: the next must not be glued to it
                    file.write(b"\n")
        with open(self.path, "a", encoding="utf-8", errors="backslashreplace", newline="\n") as text:
            self._file = text
            yield
        self._file = None

    def add(self, key: str, verdict: Verdict) -> None:
        assert self._file is not None
        self._file.write(to_json({"by": self.judge, "key": key, **asdict(verdict)}, indent=None) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._verdicts.append((self.judge, key, verdict))
        self._by_key[key] = verdict
