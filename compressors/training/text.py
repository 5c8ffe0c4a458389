"""Text to train on: domains, each an endless stream of packed sequences, mixed by weights that may change on the way.

Every draw is a function of the seed and the step alone, and every stream can be set back to any point: a run that was
stopped goes on with the very sequences that it would have seen. Each process draws the same batch and takes its share.
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from kick.calibration import begin_of_text, end_of_text, is_hub, is_text, open_hub, text_files
from kick.errors import ConfigError, DataError, unknown_name
from kick.files import sha256_of
from kick.jsonl import read_texts
from kick.settings import digest
from kick.spec import Spec

Tokens = NDArray[np.int32]
_HASHED = 2**31  # bytes of a domain; more would take minutes to read
_LOOKED_AT = 4_000_000  # characters of a domain
_WINDOW = 512  # sequences that are shuffled among each other


@dataclass(frozen=True)
class Batch:
    """`tokens` [sequences, length], int64; `labels` as well, -100 where no loss is counted; of each sequence `origin`
    says where it is from, and `lengths` how many tokens stand before its padding."""

    tokens: Tensor
    labels: Tensor
    origin: list[str]
    lengths: list[int]

    def __getitem__(self, rows: slice) -> "Batch":
        return Batch(self.tokens[rows], self.labels[rows], self.origin[rows], self.lengths[rows])

    @property
    def counted(self) -> int:
        """How many predictions enter the loss: of each labelled token but a sequence's first."""
        return int((self.labels[:, 1:] != -100).sum())


def find_domains(source: str | Mapping[str, str]) -> dict[str, str]:
    """Domains by name: as given; or the folders inside a folder; or one domain, `text`, that is everything.

    Raises DataError if there is nothing, a folder of a domain that is empty, or text beside folders.
    """
    if not isinstance(source, str):
        return dict(source)
    path = Path(source).expanduser()
    inside = sorted(path.iterdir()) if path.is_dir() else []
    folders = [child for child in inside if child.is_dir() and not child.name.startswith(".")]
    if not folders:
        return {"text": source}
    if beside := [child.name for child in inside if child.is_file() and is_text(child)]:
        raise DataError(
            f"{source} holds folders and, beside them, text: {beside[0]}.",
            "A folder for each domain and nothing else, or files alone.",
        )
    return {folder.name: str(folder) for folder in folders}


def open_documents(source: str, field: str = "text") -> Any:
    """The documents of `source`, as a `datasets` stream with one column, `text`: a file, a folder or a hub id.

    Raises DataError if there is no such thing.
    """
    from datasets import IterableDataset

    if is_hub(source):
        rows = open_hub(source)
        return rows.select_columns([field]).rename_columns({field: "text"} if field != "text" else {})
    return IterableDataset.from_generator(_read, gen_kwargs={"files": text_files(source), "field": field})


def _read(files: list[Path], field: str) -> Iterator[dict[str, str]]:
    for file in files:
        for text in read_texts(file, field):
            yield {"text": text}


class Stream:
    """Sequences of one domain without end: documents tokenised, joined by the end-of-text token and cut.

    The first `held_out` sequences' documents are kept back, for `held`. Sequences are shuffled within windows. Raises
    DataError for a domain without text, or with too little to hold anything back.
    """

    def __init__(
        self, name: str, source: str, tokenizer: Any, length: int, seed: int, held_out: int = 0, field: str = "text"
    ) -> None:
        self.name, self.tokenizer, self.length = name, tokenizer, length
        self.seed = [seed, zlib.crc32(name.encode())]
        documents = open_documents(source, field)
        self.held: Tokens = np.empty((0, length), dtype=np.int32)
        if held_out:
            self.held, used = self._hold_out(documents, held_out)
            documents = documents.skip(used)
        self.documents = documents
        self._first = documents.state_dict()  # of the documents: where an epoch begins
        self._window: Tokens = self.held[:0]
        self._begin: dict[str, Any] = {"number": -1, "documents": self._first, "carried": []}
        self._next = {**self._begin, "number": 0}
        self._rows: Iterator[list[int]]
        self._seek(self._first)
        first = next(self._rows, None)
        if first is None:
            raise self._nothing()
        self._rows = chain([first], self._rows)
        self._at = 0
        self.taken = 0  # sequences so far

    def take(self) -> Tokens:
        """The next sequence [length]."""
        if self._at == len(self._window):
            self._open(self._next)
        self._at += 1
        self.taken += 1
        return self._window[self._at - 1]

    def state(self) -> dict[str, Any]:
        """Where it stands, for `restore`."""
        return {"window": self._begin, "at": self._at, "taken": self.taken}

    def restore(self, state: dict[str, Any]) -> None:
        if state["window"]["number"] >= 0:
            self._open(state["window"])
        self._at, self.taken = state["at"], state["taken"]

    def _open(self, begin: dict[str, Any]) -> None:
        """Read the window that starts at `begin`, and remember where the one after it starts."""
        if begin is not self._next:  # else the documents stand there already
            self._seek(begin["documents"])
        self._begin, carried = begin, list(begin["carried"])
        read = 1  # documents since the first one, or as good as one where it began in the middle
        wanted = _WINDOW * self.length
        while len(carried) < wanted:
            tokens = next(self._rows, None)
            if tokens is not None:
                read += 1
                carried += tokens
            elif read:  # all documents were read: from the first again
                read = 0
                self._seek(self._first)
            else:
                raise self._nothing()
        found = np.array(carried[:wanted], dtype=np.int32).reshape(_WINDOW, self.length)
        left = {"documents": self.documents.state_dict(), "carried": carried[wanted:]}
        self._next = {"number": begin["number"] + 1, **left}
        order = np.random.default_rng([*self.seed, begin["number"]]).permutation(_WINDOW)
        self._window, self._at = found[order], 0

    def _nothing(self) -> DataError:
        beside = f" beside the {len(self.held)} sequences that are held out" if len(self.held) else ""
        return DataError(f"the domain '{self.name}' holds no text{beside}.", "Leave it out, or give it documents.")

    def _seek(self, place: dict[str, Any]) -> None:
        """Go on with the documents at `place`; what stands before it is read over, which takes its time."""
        self.documents.load_state_dict(place)
        self._rows = self._tokenised(self.documents)

    def _hold_out(self, documents: Any, wanted: int) -> tuple[Tokens, int]:
        """`wanted` sequences of the first rows, and of how many; those without text count as well.

        Of each document no more than one sequence's tokens, so that none stands for its domain; where documents are too
        few for that, of each as much more as it takes.
        """
        enough, most, whole = wanted * self.length, self.length, False
        while not whole:
            tokens: list[int] = []
            used, rows, whole = 0, iter(documents), True
            while len(tokens) < enough and (row := next(rows, None)) is not None:
                found = self._tokens(row["text"])
                whole = whole and len(found) <= most
                tokens += found[:most]
                used += 1
            something_is_left = whole or any(row["text"] for row in rows)
            if len(tokens) >= enough and something_is_left:
                return np.array(tokens[:enough], dtype=np.int32).reshape(wanted, self.length), used
            most *= 2
        raise DataError(
            f"the domain '{self.name}' holds {len(tokens):,} tokens; {wanted} x {self.length} are to be held out.",
            "Ask for fewer, or give it more text.",
        )

    def _tokenised(self, documents: Iterable[dict[str, str]]) -> Iterator[list[int]]:
        return (tokens for row in documents if (tokens := self._tokens(row["text"])))

    def _tokens(self, text: str) -> list[int]:
        """Of one document, with what begins and ends it; none of an empty one."""
        return document_tokens(text, self.tokenizer) if text else []


def document_tokens(text: str, tokenizer: Any) -> list[int]:
    """Of one document, with what begins and ends it."""
    inside = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return begin_of_text(tokenizer) + inside + end_of_text(tokenizer)


class Mixture:
    """Batches in which each sequence's domain is drawn by `weights`, which need not sum to one.

    Raises UnknownNameError for a weight of a domain that is not there.
    """

    def __init__(self, streams: Mapping[str, Stream], weights: Mapping[str, float] | None, seed: int) -> None:
        self.streams = dict(streams)
        for name in weights or {}:
            if name not in self.streams:
                raise unknown_name("domain", name, self.streams)
        self.weights = normalised(weights or dict.fromkeys(self.streams, 1.0), self.streams)
        self.seed = seed

    def batch(self, step: int, size: int) -> Batch:
        names = list(self.streams)
        rng = np.random.default_rng([self.seed, step])
        drawn = rng.choice(len(names), size=size, p=[self.weights[name] for name in names])
        origin, rows = [], []
        for name in (names[index] for index in drawn):
            origin.append(f"{name} {self.streams[name].taken}")
            rows.append(self.streams[name].take())
        tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
        return Batch(tokens, tokens, origin, [tokens.shape[1]] * len(tokens))

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "streams": {name: stream.state() for name, stream in self.streams.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights = state["weights"]
        for name, stream in self.streams.items():
            stream.restore(state["streams"][name])


def normalised(weights: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """`weights` of `names`, zero where none is given, as shares of their sum. Raises ConfigError for a bad one."""
    found = {name: float(weights.get(name, 0.0)) for name in names}
    if min(found.values()) < 0 or not sum(found.values()):
        raise ConfigError(f"domain weights {found}.", "They are zero or more, and not all zero.")
    return {name: weight / sum(found.values()) for name, weight in found.items()}


def open_mixture(
    data: str | Mapping[str, str],
    tokenizer: Any,
    length: int,
    seed: int,
    *,
    weights: Mapping[str, float] | None = None,
    held_out: int = 0,
    validation: str | Mapping[str, str] | None = None,
    field: str = "text",
) -> Mixture:
    """The mixture of all domains of `data`. `held_out` sequences of each are kept back, from `validation` where given.

    Raises DataError for a domain that is empty or has no validation text.
    """
    domains = find_domains(data)
    apart = find_domains(validation) if validation else {}
    streams = {}
    for name, source in domains.items():
        streams[name] = Stream(name, source, tokenizer, length, seed, 0 if apart else held_out, field)
        if apart and held_out:
            if name not in apart:
                raise unknown_name("validation text for the domain", name, apart)
            streams[name].held = Stream(name, apart[name], tokenizer, length, seed, held_out, field).held
    return Mixture(streams, weights, seed)


class TextData(Spec):
    """Text to train on, by domains."""

    data: str | dict[str, str] = Field(
        default="embedded",
        description="a file, a folder, a hub id; a folder of folders: each is a domain; or domains by name",
    )
    weights: dict[str, float] = Field(default={}, description="of the domains at the start; equal if not given")
    text_field: str = "text"

    def open(self, tokenizer: Any, length: int, seed: int, **more: Any) -> Mixture:
        return open_mixture(
            self.data, tokenizer, length, seed, weights=self.weights or None, field=self.text_field, **more
        )

    def fingerprint(self) -> str:
        """Identity of the text that is trained on."""
        return fingerprint(self.data)

    def beginnings(self) -> Iterator[str]:
        """The first documents of each domain that is on this disk, to see whether they are scored as well."""
        return beginnings(self.data, self.text_field)


def beginnings(source: str | Mapping[str, str], field: str = "text") -> Iterator[str]:
    """Documents of each local domain, up to some millions of characters."""
    for domain in find_domains(source).values():
        if is_hub(domain):
            continue
        left = _LOOKED_AT
        for row in _read(text_files(domain), field):
            yield row["text"][:left]
            left -= len(row["text"])
            if left <= 0:
                break


def fingerprint(source: str | Mapping[str, str]) -> str:
    """Identity of text: its files' contents; of large files names and sizes, of what is on the hub its id."""
    found: list[Any] = []
    for name, domain in find_domains(source).items():
        if is_hub(domain):
            found.append([name, domain])
            continue
        files = text_files(domain)
        large = sum(file.stat().st_size for file in files) > _HASHED
        found.append([name, [[file.name, file.stat().st_size if large else sha256_of(file)] for file in files]])
    return digest(found)
