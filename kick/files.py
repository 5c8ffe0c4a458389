"""Writing files so that a crash leaves the old one or the new one, never half of one; and naming and hashing them."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kick.errors import DiskFullError, RunError

_OLD = 24 * 3600.0  # seconds
_LONGEST_NAME = 180  # bytes


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8): written beside it, flushed to disk, then renamed over it."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, data: bytes) -> None:
    temporary = _beside(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _beside(path: Path) -> Path:
    """Where this process writes what is to become `path`: others, on other machines too, may be writing the same."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")


def write_json(path: Path, value: Any) -> None:
    write_text(path, to_json(value) + "\n")


def to_json(value: Any, indent: int | None = 2) -> str:
    """JSON that any reader takes: numbers that are not finite become null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, which replaces `path` only when the block ends without an error."""
    path = path.resolve()
    partial = _beside(path)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        stop_if_full(error)
        raise
    for file in partial.rglob("*"):
        if file.is_file():
            file.chmod(file.stat().st_mode | stat.S_IMODE(partial.stat().st_mode) & 0o666)  # safetensors hides its own
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    if path.exists():
        shutil.rmtree(path)
    os.replace(partial, path)


def stop_if_full(error: BaseException) -> None:
    """Raise DiskFullError where an error says that a disk is full: that is nobody's fault, and ends everything."""
    if isinstance(error, DiskFullError):  # said before
        raise error
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
        raise DiskFullError(
            f"the disk is full: {error}.", "Free some space and run the same command again; what is there is kept."
        ) from error


def clear_partials(root: Path) -> None:
    """Remove what killed processes left half-written below `root`, where nobody of this machine writes now.

    What other machines write there is theirs, unless it is a day old.
    """
    here = f".{socket.gethostname()}."
    for path in [*root.rglob(".*.partial"), *root.rglob(".*.blocks")]:
        if path.suffix == ".partial" and here not in path.name and _is_new(path):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _is_new(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime < _OLD
    except FileNotFoundError:  # it has become what it was to be
        return True


@contextmanager
def scratch_directory(path: Path) -> Iterator[Path]:
    """An empty directory that is gone afterwards; what a killed process left there is cleared first."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def safe_name(name: str) -> str:
    """A name for a file or folder that stays inside its parent whatever `name` says: `../x` becomes `..%2Fx`.

    A long one is cut and ends in a hash: file systems take 255 bytes, and files beside it have longer names.
    """
    quoted = re.sub(r"^\.", "%2E", quote(name, safe="@:=,+-_.[] ()"))
    if len(quoted) <= _LONGEST_NAME:
        return quoted
    return f"{quoted[: _LONGEST_NAME - 17]}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def check_own(directory: Path, mark: str) -> None:
    """Raise RunError where a folder holds anything and not the file `mark`, by which an earlier result is known."""
    if directory.is_dir() and any(directory.iterdir()) and not (directory / mark).is_file():
        raise RunError(
            f"{directory} is not empty and holds no {mark}.",
            "Choose another --out: kick writes into folders of its own.",
        )


def check_writable(directory: Path) -> None:
    """Raise RunError unless files can be made in `directory` (or in its nearest existing parent). Leaves nothing."""
    try:
        str(directory).encode()
    except UnicodeEncodeError as error:
        raise RunError(f"{directory!r} is no UTF-8.", "Choose another --out.") from error
    existing = directory
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise RunError(f"{directory} cannot be a folder: {existing} is a file.", "Choose another --out.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise RunError(f"{directory} cannot be written: no permission in {existing}.", "Choose another --out.")
    probe = existing / f".kick-write-test-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(
            f"{directory} cannot be written: {error.strerror} in {existing}.", "Choose another --out."
        ) from error
