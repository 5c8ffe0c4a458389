"""Reading rows and texts: .jsonl and plain text, also .gz. Errors name the file and the line."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from kick.errors import DataError


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of a .jsonl file. Lines end at \\n alone: text may hold other separators (U+2028, U+0085)."""
    with _open(path) as file:
        for number, line in enumerate(_lines(file, path), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"line {number} of {path} is not JSON: {error}.", "One JSON object a line.") from error
            if not isinstance(row, dict):
                raise DataError(f"line {number} of {path} is not a JSON object.", "One JSON object a line.")
            yield number, row


def read_texts(path: Path, text_field: str = "text") -> Iterator[str]:
    """The documents of a file: each row's text of a .jsonl file, or the whole of any other."""
    if not path.name.removesuffix(".gz").endswith((".jsonl", ".json")):
        with _open(path) as file:
            yield "".join(_lines(file, path))
        return
    for number, row in read_jsonl(path):
        if not isinstance(row.get(text_field), str):
            raise DataError(
                f"line {number} of {path} has no text '{text_field}'.", "Name the right field, or mend the row."
            )
        yield row[text_field]


def _lines(file: IO[str], path: Path) -> Iterator[str]:
    try:
        yield from file
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:  # gzip raises several
        raise DataError(f"{path} cannot be read: {error}.", "Expected UTF-8 text, plain or .gz.") from error


def _open(path: Path) -> IO[str]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8", newline="\n")
