"""Where rows come from: files that the package carries, a local mirror in the public files' own formats, or the hub.

A local mirror is searched for the names under which the public files are known; see docs/data.md.
"""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kick.errors import DataError, first_line

EMBEDDED = Path(__file__).parent / "data"


def find(root: Path | None, *candidates: str, suite: str) -> Path:
    """The first of `candidates` (relative paths) that exists under `root`. Raises DataError naming them all."""
    assert root is not None
    if not root.is_dir():
        raise DataError(f"no data folder {root}.", "--data takes a folder, 'embedded' or 'hub'.")
    for candidate in candidates:
        if (root / candidate).exists():
            return root / candidate
    raise DataError(f"{root} holds no data for the suite '{suite}'.", "Expected one of: " + ", ".join(candidates) + ".")


def read_csv(path: Path, columns: int) -> Iterator[tuple[int, list[str]]]:
    """(row number, cells) of a csv file without a header. Cells are text: "None" stays the word None."""
    with open(path, encoding="utf-8", newline="") as file:
        try:
            for number, row in enumerate(csv.reader(file), 1):
                if len(row) != columns:
                    raise DataError(f"row {number} of {path} has {len(row)} columns.", f"Expected {columns}.")
                yield number, row
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path} cannot be read: {error}.", "Expected a csv file in UTF-8.") from error


def hub_file(name: str, path: str, repo_type: str = "dataset") -> Path:
    """One file of a repository on the hub. Raises DataError if it cannot be had."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, path, repo_type=repo_type))
    except Exception as error:  # the hub's library raises many kinds; each means that the file cannot be had
        raise DataError(f"{path} of '{name}' cannot be read from the hub: {first_line(error)}", _OFFLINE) from error


def hub_rows(name: str, config: str | None = None, split: str = "test", **options: Any) -> Iterable[dict[str, Any]]:
    """Rows of a dataset on the Hugging Face hub. Raises DataError if it cannot be had."""
    from datasets import load_dataset

    try:
        return load_dataset(name, config, split=split, **options)
    except Exception as error:  # datasets raises many kinds; each means that the rows cannot be had
        raise DataError(f"the dataset '{name}' cannot be read from the hub: {first_line(error)}", _OFFLINE) from error


_OFFLINE = "Without a network, give --data DIR (a local mirror) or --data embedded (kick's own small sets)."
