"""Calibration text: documents -> token batches, seeded and fingerprinted.

Documents are shuffled by the seed, cut into segments of at most one sequence, and packed with an end-of-text token
between them. Every document gives one segment before any gives a second, so that a long one does not fill the sample.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from kick.errors import DataError
from kick.jsonl import read_texts
from kick.meter import processor
from kick.spec import Seed, Spec

if TYPE_CHECKING:
    from torch import Tensor


_EMBEDDED = Path(__file__).parent / "data" / "calibration.jsonl"
_HOW_ELSE = "One of several configurations is named after a colon. Without a network, give local files or 'embedded'."


class CalibrationSpec(Spec):
    """What to calibrate on. `source` is `embedded`, a text or .jsonl file (also .gz), a folder of these, or a hub id.

    LLM-KICK used 128 samples of 2,048 tokens of C4; the embedded text holds about 16,000 tokens.
    """

    source: str = "embedded"
    samples: int = Field(default=32, ge=1)
    sequence_length: int = Field(default=512, ge=8)
    seed: Seed = 0
    text_field: str = "text"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="in which the blocks run while statistics are gathered; auto: the model's own, or bfloat16 on a "
        "CPU that is faster in it. Statistics and solvers are in float32 or better.",
    )


@dataclass(frozen=True)
class Calibration:
    """`tokens` [samples, sequence_length], int64; `fingerprint` identifies exactly these tokens.

    `precision`: the spec's, with auto decided.
    """

    tokens: "Tensor"
    fingerprint: str
    spec: CalibrationSpec
    precision: str = "float32"

    def record(self) -> dict[str, Any]:
        return {
            **self.spec.model_dump(mode="json"),
            "precision": self.precision,
            "tokens": self.tokens.numel(),
            "fingerprint": self.fingerprint,
        }


def draw(spec: CalibrationSpec, tokenizer: Any, dtype: str = "float32", device: str = "cpu") -> Calibration:
    """Tokenise as much of the source as `spec` asks for, for a model in `dtype` on `device`.

    Raises DataError if the source holds fewer tokens than that.
    """
    import torch

    documents = read_documents(spec.source, spec.text_field)
    wanted = spec.samples * spec.sequence_length
    stream: list[int] = []
    for segment in _segments(documents, spec, tokenizer):
        stream += segment
        if len(stream) >= wanted:
            break
    if len(stream) < wanted:
        raise DataError(
            f"calibration asks for {spec.samples} x {spec.sequence_length} = {wanted:,} tokens; "
            f"'{spec.source}' holds {len(stream):,}.",
            "Ask for fewer samples, shorter ones, or give a larger source.",
        )
    tokens = np.array(stream[:wanted], dtype=np.int64).reshape(spec.samples, spec.sequence_length)
    fingerprint = hashlib.sha256(tokens.tobytes()).hexdigest()[:16]
    return Calibration(torch.from_numpy(tokens), fingerprint, spec, precision_of(spec, dtype, device))


def precision_of(spec: CalibrationSpec, dtype: str, device: str) -> str:
    """What `spec` asks for; for auto bfloat16 on a CPU that multiplies it faster, else `dtype`.

    From what the CPU is: a run and whoever resumes it must decide alike, which a measurement may not.
    Intel's AVX-512 multiplies no more bfloat16 than float32 in a cycle (measured: half), AMD's twice as much.
    """
    import torch

    if spec.precision != "auto":
        return spec.precision
    if device != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return dtype
    able = torch.cpu.get_capabilities()
    gains = able.get("amx_bf16") or (able.get("avx512_bf16") and not processor().startswith("Intel"))
    return "bfloat16" if gains else dtype


def _segments(documents: list[str], spec: CalibrationSpec, tokenizer: Any) -> Iterator[list[int]]:
    """Segments of at most one sequence, each closed by the end-of-text token: one of each document, then the rest."""
    rng = np.random.default_rng(spec.seed)
    begin, end = begin_of_text(tokenizer), end_of_text(tokenizer)
    left_over: list[list[int]] = []
    for index in rng.permutation(len(documents)):
        tokens = tokenizer(documents[index], add_special_tokens=False, verbose=False)["input_ids"]
        length = max(1, spec.sequence_length - len(begin) - len(end))
        segments = [begin + tokens[start : start + length] + end for start in range(0, len(tokens), length)]
        if not segments:
            continue
        first = int(rng.integers(len(segments)))
        yield segments.pop(first)
        left_over += segments
    for index in rng.permutation(len(left_over)):
        yield left_over[index]


def end_of_text(tokenizer: Any) -> list[int]:
    return [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []


def begin_of_text(tokenizer: Any) -> list[int]:
    """The begin-of-text token, for tokenizers that put it in front of every prompt: activations hang on it."""
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def read_documents(source: str, text_field: str = "text") -> list[str]:
    """The documents of `source`, in a fixed order. Raises DataError if there is none or a row has no text."""
    if is_hub(source):
        return _read_hub(source, text_field)
    return [document for file in text_files(source) for document in read_texts(file, text_field)]


def text_files(source: str) -> list[Path]:
    """The local files that hold the documents of `source`, in a fixed order. Raises DataError if there is none."""
    if source == "embedded":
        return [_EMBEDDED]
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(
            f"no text source '{source}'.",
            "Expected 'embedded', a text or .jsonl file, a folder, or a hub id (owner/name[:CONFIGURATION]).",
        )
    inside = sorted(p for p in path.rglob("*") if p.is_file() and is_text(p))
    if not inside:
        raise DataError(f"the folder {source} holds no .txt, .raw or .jsonl file.", "Text is one of these, or .gz.")
    return inside


def is_hub(source: str) -> bool:
    """Whether `source` is written like a hub id (owner/name) and is nothing on this disk."""
    looks_like_id = source.count("/") == 1 and not source.startswith((".", "/", "~"))
    return looks_like_id and not Path(source).exists()


def is_text(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith((".txt", ".raw", ".jsonl", ".json"))


_CONFIGURATIONS = {"allenai/c4": "en", "Salesforce/wikitext": "wikitext-2-raw-v1"}  # where none is the default


def open_hub(source: str) -> Any:
    """The train split of a hub dataset, `owner/name` or `owner/name:CONFIGURATION`, streamed. Raises DataError."""
    from datasets import load_dataset

    name, _, configuration = source.partition(":")
    try:
        return load_dataset(name, configuration or _CONFIGURATIONS.get(name), split="train", streaming=True)
    except Exception as error:  # datasets raises many kinds; each means that the text cannot be had
        raise DataError(f"the dataset '{source}' cannot be read from the hub: {error}", _HOW_ELSE) from error


def _read_hub(source: str, text_field: str) -> list[str]:
    """Documents of a hub dataset: enough for any calibration, without the whole download."""
    rows = open_hub(source)
    try:
        return [row[text_field] for row in islice(rows, 10_000)]
    except Exception as error:  # a stream is read only now, and a field may be missing
        raise DataError(f"the dataset '{source}' cannot be read from the hub: {error!r}", _HOW_ELSE) from error
