"""The run directory: what is done, and the appending of what comes in. One writer at a time.

run.json                                    resolved configuration, identity, versions, hardware
logs/                                       what worker processes print
evaluations/SETTING/kick.json               the record of the setting's checkpoint
evaluations/SETTING/SUITE/samples.jsonl     one line a sample, appended as answers come
                          scores.json       written last: with status "complete" the evaluation is done
                          judgments.jsonl   what a judge said of the samples (kick.judge.run)
checkpoints/SETTING/                        weights, while they are needed
"""

import fcntl
import glob
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from kick import meter
from kick.checkpoint import HISTORY, RECORD, TRAINING
from kick.errors import RunError
from kick.files import (
    check_own,
    check_writable,
    clear_partials,
    read_json,
    safe_name,
    sha256_of,
    to_json,
    write_json,
    write_text,
)
from kick.jsonl import read_jsonl
from kick.judge.questions import Judgment
from kick.settings import Setting
from kick.suite import Sample
from kick.sweep.lock import lock
from kick.sweep.plan import Plan

RUN = "run.json"
JUDGE, JUDGE_CACHE = "judge.json", "judge-cache.jsonl"
FORMAT = 1
_MAY_GROW = {"settings": "{}/*/samples.jsonl", "suites": "*/{}/samples.jsonl"}
"""Parts of an identity, and where under evaluations/ the answers of one of their names are."""

_OF_PLAN = ("config", "settings", "suites", "seeds", "identity")
"""Keys of run.json that another sweep file changes; the others are as they were when the run began."""


class Store:
    """A run directory opened for writing. lock_file: what the lock hangs on, to be held by all who write."""

    def __init__(self, root: Path, lock_file: TextIO | None = None) -> None:
        self.root = root
        self.lock_file = lock_file

    # The run as a whole

    @staticmethod
    @contextmanager
    def open(root: Path, plan: Plan, fresh: bool = False) -> Iterator["Store"]:
        """The run directory for `plan`, created, taken up again or extended, locked until the block ends.

        Raises RunError if it holds a run that `plan` does not go on with, is in use, or is a folder of something else.
        """
        check_usable(root, plan, fresh)
        root.mkdir(parents=True, exist_ok=True)
        with lock(root) as lock_file:
            if not fresh:
                check_continues(root, plan.identity)  # another may have begun it before the lock was ours
            if fresh:
                for part in ("evaluations", "checkpoints", "figures", "logs"):
                    shutil.rmtree(root / part, ignore_errors=True)
                for part in (RUN, JUDGE, JUDGE_CACHE, "scores.csv", "leaderboard.csv", "leaderboard.md", "report.html"):
                    (root / part).unlink(missing_ok=True)
            clear_partials(root)
            store = Store(root, lock_file)
            store._begin(plan)
            yield store

    def _begin(self, plan: Plan) -> None:
        """Write run.json, or what another sweep file changes in it."""
        held = read_json(self.root / RUN) if (self.root / RUN).exists() else {}
        config = plan.config.model_dump(mode="json")
        if held and held["config"] == config and not differences(held["identity"], plan.identity):
            return
        kept = {key: held[key] for key in held if key not in _OF_PLAN}
        wanted = json.loads(json.dumps(plan.identity["settings"]))
        for name, own in held.get("identity", {}).get("settings", {}).items():
            if wanted.get(name) != own:  # it left, or became another one: nothing was answered, but it may be made
                self.drop_checkpoint(name)
                shutil.rmtree(self.setting_path(name), ignore_errors=True)
        source = {
            "name": plan.source.name,
            "kind": plan.source.kind,
            "note": plan.source.note,
            "commit": plan.path.name if plan.source.kind == "hub" else None,  # the hub's cache has a folder for each
            "fingerprint": plan.fingerprint,
        }
        suites = {
            suite.name: {
                "source": suite.source,
                **suite.identity,
                "groups": len({e.group for e in suite.examples}),
                "metrics": [asdict(metric) for metric in suite.suite.metrics],
            }
            for suite in plan.suites
        }
        write_json(
            self.root / RUN,
            {
                "format": FORMAT,
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
                "config": config,
                "model": source,
                "dtype": plan.dtype,
                "device": plan.device,
                "settings": [setting.model_dump(mode="json") | {"name": setting.name} for setting in plan.settings],
                "suites": suites,
                "seeds": {
                    "calibration": plan.config.calibration.seed,
                    "suites": {s.name: s.spec.seed for s in plan.suites},
                },
                "versions": meter.versions(),
                "hardware": meter.hardware(plan.device),
                "identity": plan.identity,
                **kept,
            },
        )

    def parity(self) -> list[dict[str, Any]] | None:
        """How the LMs of the run differ, or None if that was not looked at."""
        return read_json(self.root / RUN).get("parity")

    def keep_parity(self, rows: list[dict[str, Any]]) -> None:
        write_json(self.root / RUN, read_json(self.root / RUN) | {"parity": rows})

    def as_first(self, key: str, here: int) -> int:
        """What `key` was when the first worker of this run began, which would be `here` now: it decides rounding."""
        known = read_json(self.root / RUN)
        if key not in known:
            write_json(self.root / RUN, known | {key: here})
        return known.get(key, here)

    def checkpoint_path(self, setting: str) -> Path:
        return self.root / "checkpoints" / safe_name(setting)

    def has_checkpoint(self, setting: str) -> bool:
        """Whether one lies there; it may be damaged."""
        return (self.checkpoint_path(setting) / RECORD).is_file()

    def drop_checkpoint(self, setting: str) -> None:
        shutil.rmtree(self.checkpoint_path(setting), ignore_errors=True)
        parent = self.root / "checkpoints"
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()

    def trim_checkpoints(self, most_bytes: float, finished: Sequence[str]) -> None:
        """Delete checkpoints of `finished` settings, in order, until the others of them take at most `most_bytes`."""
        kept = [path for name in finished if (path := self.checkpoint_path(name)).is_dir()]
        sizes = [sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in kept]
        excess = sum(sizes) - most_bytes
        for path, size in zip(kept, sizes, strict=True):
            if excess <= 0:
                break
            shutil.rmtree(path)
            excess -= size

    @contextmanager
    def alone_with(self, setting: str) -> Iterator[None]:
        """While one process works on a setting, others that would do the same wait: jobs may outlive who sent them."""
        self.setting_path(setting).mkdir(parents=True, exist_ok=True)
        with open(self.setting_path(setting) / ".lock", "a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    # One setting, one evaluation

    def setting_path(self, setting: str) -> Path:
        return self.root / "evaluations" / safe_name(setting)

    def evaluation(self, setting: str, suite: str) -> "EvaluationStore":
        return EvaluationStore(self.setting_path(setting) / safe_name(suite))

    def record(self, setting: str) -> dict[str, Any] | None:
        """What was measured on the setting's checkpoint, or None if it was never made."""
        return _read_if_whole(self.setting_path(setting) / RECORD, "setting", "layers")

    def keep_record(self, setting: str, record: dict[str, Any]) -> None:
        if json.loads(to_json(record)) != self.record(setting):
            self.setting_path(setting).mkdir(parents=True, exist_ok=True)
            write_json(self.setting_path(setting) / RECORD, record)

    def keep_training(self, setting: str, checkpoint: Path) -> None:
        """Histories and figures of what was trained, which outlive the checkpoint."""
        if (checkpoint / TRAINING).is_dir():
            shutil.copytree(checkpoint / TRAINING, self.setting_path(setting) / TRAINING, dirs_exist_ok=True)

    def histories(self, setting: str) -> dict[str, list[dict[str, Any]]]:
        """The steps of each stretch of training of `setting`, by its place: `1-sheared/pruning`."""
        folder = self.setting_path(setting) / TRAINING
        return {
            path.parent.relative_to(folder).as_posix(): [row for _, row in read_jsonl(path)]
            for path in sorted(folder.rglob(HISTORY))
        }


class EvaluationStore:
    """The files of one evaluation."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.samples_path = path / "samples.jsonl"
        self.judgments_path = path / "judgments.jsonl"
        self.scores_path = path / "scores.json"

    def result(self) -> dict[str, Any] | None:
        return _read_if_whole(self.scores_path, "status", "key")

    def is_complete(self, key: str) -> bool:
        """Whether the evaluation called `key` is done and its samples are still the ones that were scored."""
        result = self.result()
        if result is None or result["status"] != "complete" or result["key"] != key:
            return False
        return self.samples_path.is_file() and sha256_of(self.samples_path) == result.get("samples_sha256")

    def samples(self) -> list[Sample]:
        """All samples on disk. Raises RunError at a line that is not one."""
        return list(self.read())

    def read(self) -> Iterator[Sample]:
        """The samples on disk, one after the other. Raises RunError at a line that is not one."""
        with open(self.samples_path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield Sample.from_json(json.loads(line))
                except (ValueError, KeyError, TypeError) as error:
                    raise RunError(
                        f"line {number} of {self.samples_path} is damaged.", "Run the sweep again: it is asked anew."
                    ) from error

    def judgments(self) -> list[Judgment]:
        """What a judge said of the samples on disk; none if they were judged before they were asked again."""
        expected = (self.result() or {}).get("judgments_sha256")
        if expected is None or not self.judgments_path.is_file() or sha256_of(self.judgments_path) != expected:
            return []
        with open(self.judgments_path, encoding="utf-8", newline="\n") as file:
            return [Judgment.from_json(json.loads(line)) for line in file]

    def keep_judgments(self, judgments: Sequence[Judgment], scores: list[dict[str, Any]]) -> None:
        """Replace the judgments, and in scores.json the scores, which now count them."""
        lines = (to_json(judgment.to_json(), indent=None) + "\n" for judgment in judgments)
        write_text(self.judgments_path, "".join(lines))
        result = self.result()
        assert result is not None
        self.finish({**result, "judgments_sha256": sha256_of(self.judgments_path), "scores": scores})

    def resume(self, batches: Sequence[Sequence[str]]) -> int:
        """Cut samples.jsonl to its whole batches from the first on; gives how many there are.

        batches: the ids of the samples of each.

        A line cut short by a crash, a damaged line and an incomplete batch are taken away: they are asked again.
        """
        if not self.samples_path.is_file():
            return 0
        position = whole = done = 0
        with open(self.samples_path, "rb") as file:
            for batch in batches:
                for id in batch:
                    line = file.readline()
                    if not line.endswith(b"\n") or _id_of(line) != id:
                        break
                    position += len(line)
                else:
                    whole, done = position, done + 1
                    continue
                break
        os.truncate(self.samples_path, whole)
        return done

    @contextmanager
    def appending(self) -> Iterator["Appender"]:
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.samples_path, "a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            yield Appender(file)

    def finish(self, result: dict[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.scores_path, result)

    def forget_result(self) -> None:
        """It counts as one that was not tried; its samples stay."""
        self.scores_path.unlink(missing_ok=True)


class Appender:
    """Writes samples at once; `sync` makes sure that they are on disk."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def add(self, sample: Sample) -> None:
        self.file.write(to_json(sample.to_json(), indent=None) + "\n")
        self.file.flush()

    def sync(self) -> None:
        os.fsync(self.file.fileno())


def _read_if_whole(path: Path, *keys: str) -> dict[str, Any] | None:
    """None where there is none with these keys: where a disk left something else in its place it is made again."""
    if not path.is_file():
        return None
    try:
        found = read_json(path)
    except ValueError:
        return None
    return found if isinstance(found, dict) and all(key in found for key in keys) else None


def _id_of(line: bytes) -> str | None:
    try:
        row = json.loads(line)
        return Sample.from_json(row).id
    except (ValueError, KeyError, TypeError):
        return None


def _is_fresh(root: Path) -> bool:
    """Whether a run may begin there: nothing but a lock, and what a killed process had half written of run.json."""
    return all(entry.name == ".lock" or entry.match(f".{RUN}.*.partial") for entry in root.iterdir())


def read_run(root: Path) -> dict[str, Any]:
    """run.json of the run directory `root`. Raises RunError if it is none that can be read."""
    if not (root / RUN).is_file():
        raise RunError(
            f"{root} is not a run: it holds no {RUN}.", "Expected a folder that `kick sweep` or `kick evaluate` wrote."
        )
    try:
        run = read_json(root / RUN)
    except ValueError as error:
        raise RunError(
            f"{root / RUN} is damaged: {error}.",
            "Put a copy of it back; or `kick sweep --fresh` asks everything in that folder again.",
        ) from error
    if not isinstance(run, dict) or run.get("format") != FORMAT:
        held = run.get("format") if isinstance(run, dict) else None
        raise RunError(f"{root / RUN} has format {held}; this kick reads {FORMAT}.", "Run the sweep again.")
    return run


def recorded_settings(run: dict[str, Any]) -> list[Setting]:
    """The settings that a run.json names, in its order."""
    return [Setting(**{key: value for key, value in row.items() if key != "name"}) for row in run["settings"]]


@contextmanager
def alone_in(root: Path) -> Iterator[None]:
    """A run directory to write into while nobody else does. Raises RunError if it is none, or is being written."""
    read_run(root)  # a lock is left in no folder of something else
    check_writable(root)
    with lock(root):
        yield


def check_usable(root: Path, plan: Plan, fresh: bool) -> None:
    """Raise RunError unless `plan` may be run (again) in `root`."""
    check_writable(root)
    if root.is_dir() and not _is_fresh(root):
        check_own(root, RUN)
    if not fresh:
        check_continues(root, plan.identity)


def check_continues(root: Path, identity: dict[str, Any]) -> None:
    """Raise RunError if a run of `identity` does not go on with the one in `root`; no run there is fine.

    It may have more settings and suites: what was answered stays as it is, and the rest is asked. Those of which
    nothing was answered may be missing, or be others.
    """
    if not (root / RUN).is_file():
        return
    try:
        held = read_json(root / RUN)["identity"]
        parts = {part: dict(held[part]) for part in _MAY_GROW}
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{root / RUN} cannot be read.", "Choose another --out, or --fresh to start that folder again."
        ) from error
    for part, known in parts.items():
        answered = {name: own for name, own in known.items() if _any(root, _MAY_GROW[part], name)}
        held = {**held, part: answered}
        identity = {**identity, part: {name: own for name, own in identity[part].items() if name in answered}}
    if shown := differences(held, identity):
        raise RunError(
            f"{root} holds a run of another configuration: {shown}.",
            "Settings and suites may be added to a run, and those be left out or changed whose answers are deleted "
            "(under evaluations/). Else choose another --out, or --fresh to start that folder again.",
        )


def _any(root: Path, answers: str, name: str) -> bool:
    return any((root / "evaluations").glob(answers.format(glob.escape(safe_name(name)))))


def differences(held: dict[str, Any], wanted: dict[str, Any]) -> str:
    """How two identities differ, in words; empty if they do not."""
    found = list(_differences(held, json.loads(json.dumps(wanted))))
    return "; ".join(found[:3]) + (f"; {len(found) - 3} more" if len(found) > 3 else "")


def _differences(held: Any, wanted: Any, place: str = "") -> Iterator[str]:
    if isinstance(held, dict) and isinstance(wanted, dict):
        for key in [*held, *(key for key in wanted if key not in held)]:
            below = f"{place}.{key}" if place else key
            if key not in wanted:
                yield f"{below} is only there"
            elif key not in held:
                yield f"{below} is only here"
            else:
                yield from _differences(held[key], wanted[key], below)
    elif held != wanted:
        yield f"{place} is {held!r} there, {wanted!r} here"
