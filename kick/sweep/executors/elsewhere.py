"""A work done on a machine that a cluster chose: what its process runs there, and what comes back.

Where the run directory is seen from there, results are in it. Where it is not, they come back as bytes, one evaluation
after the other, so that a machine that dies costs the one it was at. It is seen if it holds the mark that the starting
process left in it.
"""

import json
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from kick import devices
from kick.checkpoint import RECORD
from kick.errors import KickError, RunError
from kick.files import read_json, write_bytes
from kick.settings import digest
from kick.sweep.clock import Watch
from kick.sweep.executors.base import Job
from kick.sweep.executors.site import Site
from kick.sweep.plan import Plan
from kick.sweep.store import RUN, Store
from kick.sweep.work import Work

MARK = ".seen"

_sites: dict[str, Site] = {}  # of this process: a cluster may give it many works of a run
_folders: dict[str, tempfile.TemporaryDirectory[str]] = {}  # likewise, where the run directory is not seen


class Notes:
    """A watch where nobody looks: progress is seen from afar only as works that end."""

    def make(self, setting: str, how: str) -> None:
        self.note(f"{setting}: {how}")

    def show(self, done: int, total: int, what: str, detail: str = "") -> None:
        pass

    def made(self) -> None:
        pass

    def ask(self, setting: str, suite: str, questions: int) -> None:
        self.note(f"{setting}: {suite}")

    def skip(self, count: int) -> None:
        pass

    def advance(self, count: int) -> None:
        pass

    def stop(self) -> None:
        pass

    def note(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)


def leave_mark(root: Path) -> str:
    """A word in the run directory that no other directory of that path holds."""
    mark = secrets.token_hex(8)
    (root / MARK).write_text(mark, encoding="utf-8")
    return mark


class Came(NamedTuple):
    """What comes back of an evaluation, or of a work without any.

    files: none where they are in the run directory already. suite: which was asked. fatal: message and hint.
    parity: how far the LMs of the run are apart, where that was looked at.
    """

    files: Mapping[str, bytes] = MappingProxyType({})
    suite: str | None = None
    fatal: tuple[str, str] | None = None
    parity: list[dict[str, Any]] | None = None

    def take(self, store: Store) -> str | None:
        """Write the files into the run directory; gives the reason where they do not belong to what is there.

        Raises RunError for what concerns the whole sweep.
        """
        if self.fatal is not None:
            raise RunError(*self.fatal)
        inside = store.root.resolve()
        paths = {name: (inside / name).resolve() for name in self.files}
        for name, path in paths.items():
            if not path.is_relative_to(inside / "evaluations"):
                raise RunError(f"a result came back under the name {name}.", "Is the cluster running the same kick?")
            if path.name == RECORD and path.is_file():
                before, after = read_json(path), json.loads(self.files[name])
                if before["weights_fingerprint"] != after["weights_fingerprint"]:
                    return (
                        "its weights came out different from those that earlier answers belong to: another kind of "
                        f"machine? Delete {path.parent} to have the setting asked anew"
                    )
        for name in sorted(self.files, key=lambda name: name.endswith("scores.json")):  # what says "complete" last
            paths[name].parent.mkdir(parents=True, exist_ok=True)
            write_bytes(paths[name], self.files[name])
        if self.parity is not None and store.parity() is None:
            store.keep_parity(self.parity)
        return None


def carry_out_here(job: dict[str, Any], work: dict[str, Any], mark: str) -> Iterator[Came]:
    """Do a work of a job (both as JSON); gives what comes of it as it comes."""
    given, asked = Job(**job), Work.from_json(work)
    root = Path(given.root)
    try:
        if not (root / MARK).is_file():
            yield from _carry_out_apart(given, asked)
        elif _is_awaited(root, mark):
            for suite in _site(given, root).carry_out(asked, Notes()):
                yield Came(suite=suite)
                if not _is_awaited(root, mark):
                    return
    except KickError as error:  # what one evaluation can do wrong is recorded: this concerns all of them
        yield Came(fatal=(f"on {socket.gethostname()}: {error.message}", error.hint))


def _is_awaited(root: Path, mark: str) -> bool:
    """Whether whoever left `mark` waits for this still: the run may have been begun anew."""
    return (root / MARK).is_file() and (root / MARK).read_text(encoding="utf-8") == mark


def carry_out_whole(job: dict[str, Any], work: dict[str, Any], mark: str) -> list[Came]:
    """The same, for a cluster that gives nothing back before the end."""
    return list(carry_out_here(job, work, mark))


def _carry_out_apart(job: Job, work: Work) -> Iterator[Came]:
    """Do a work in a folder of its own; gives the files of each evaluation when it has ended."""
    if not work.owed:  # the weights of dense, which others would not see
        return
    own = _own_folder(job)  # weights too: they stay here
    site = _site(job, own)
    results, sent = site.store.setting_path(work.setting), set[Path]()
    shutil.rmtree(results, ignore_errors=True)  # of an earlier try
    try:
        for suite in site.carry_out(work, Notes()):
            new = [path for path in results.rglob("*") if path.is_file() and path not in sent]
            sent.update(new)
            files = {str(path.relative_to(own)): path.read_bytes() for path in new}
            yield Came(files, suite, parity=site.store.parity())
    finally:
        site.forget(work.setting)


def _own_folder(job: Job) -> Path:
    """Of this process, for a run: what all its works there start from, the dense checkpoint, is made once."""
    key = digest(job.identity)
    if key not in _folders:
        _folders.clear()
        _folders[key] = tempfile.TemporaryDirectory(prefix="kick-")
        (Path(_folders[key].name) / RUN).write_text("{}", encoding="utf-8")
    return Path(_folders[key].name)


def device_elsewhere(asked: str, gpus: Any) -> str:
    """`auto` decided by the GPUs that a work is given, or as this machine where that is not said.

    Any other is taken at its word: this machine, which may have no GPU, is not where it is used.
    """
    if asked != "auto":
        return asked
    if gpus is None:
        return devices.default_device()
    return "cuda" if gpus else "cpu"


def count(watch: Watch, plan: Plan, work: Work, suite: str) -> None:
    """Tell the clock of an evaluation that ended far away."""
    watch.ask(work.setting, suite, next(len(planned.examples) for planned in plan.suites if planned.name == suite))
    watch.stop()


def _site(job: Job, root: Path) -> Site:
    key = f"{root} {digest(job.identity)}"
    if key not in _sites:
        _sites.clear()
        _sites[key] = Site.of(replace(job, root=str(root)), sys.__stderr__)
    return _sites[key]
