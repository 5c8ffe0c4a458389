"""Perplexity and bits per byte on running text (WikiText-2, C4, or your own).

    kick evaluate MODEL --suite perplexity --data DIR --param text=wikitext2

The text is cut at white space into windows of about `window_bytes`; every token of a window is predicted from the
window's beginning on. Windows are the same bytes for every model, so that bits per byte compares models with different
tokenizers, and windows pair between settings. Perplexity is exp(total negative log-likelihood / total tokens).
Papers cut by tokens (2,048) instead: with the same context length the two differ by little, but they are not the same.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from kick.errors import DataError
from kick.lm import rolling_loglikelihoods
from kick.suite import DataSource, Example, Metric, Sample, Suite

from . import sources

_FILES = {
    "wikitext2": ("ppl/wikitext-2-raw/wiki.test.raw", "wikitext-2-raw/wiki.test.raw", "wiki.test.raw"),
    "c4": ("ppl/c4/en/c4-validation.00000-of-00008.json.gz", "en/c4-validation.00000-of-00008.json.gz"),
}


class Perplexity(Suite):
    name = "perplexity"
    description = "perplexity and bits per byte on running text"
    metrics = (
        Metric("perplexity", value="nll", per="tokens", transform="exp", higher_is_better=False),
        Metric("bits_per_byte", value="bits", per="bytes", higher_is_better=False, unit="bits/byte"),
    )

    class Params(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        text: str = Field(default="wikitext2", description="wikitext2, c4, or the path of a text or .jsonl file")
        window_bytes: int = Field(default=4096, ge=64, description="size of a window")

    def examples(self, source: DataSource) -> list[Example]:
        windows = [
            (f"{name}-{number:05d}", name, window)
            for name, document in self._documents(source)
            for number, window in enumerate(cut(document, self.params.window_bytes))
        ]
        if not windows:
            raise DataError(f"the text '{self.params.text}' is empty.", "Give a text with at least one word.")
        return [Example(id, group, {"text": text}) for id, group, text in windows]

    def _documents(self, source: DataSource) -> list[tuple[str, str]]:
        """(name, text) pairs. Rows of a .jsonl file are joined by blank lines: most are shorter than a window."""
        text = self.params.text
        if text not in _FILES:
            return [(Path(text).stem, _read(Path(text)))]
        if source.kind == "embedded":
            return [("embedded", _read(sources.EMBEDDED / "perplexity" / "text.jsonl"))]
        if source.kind == "directory":
            return [(text, _read(sources.find(source.directory, *_FILES[text], suite="perplexity")))]
        if text == "wikitext2":
            rows = sources.hub_rows("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
            return [(text, "".join(row["text"] for row in rows))]
        data_file = "en/c4-validation.00000-of-00008.json.gz"
        rows = sources.hub_rows("allenai/c4", split="validation", data_files={"validation": data_file}, streaming=True)
        return [(text, "\n\n".join(row["text"] for row in islice(rows, 1100)))]

    def answer(self, lm: Any, examples: Sequence[Example]) -> Iterator[Sample]:
        texts = [example.content["text"] for example in examples]
        for example, text, value in zip(examples, texts, rolling_loglikelihoods(lm, texts), strict=True):
            tokens = len(lm.tok_encode(text, add_special_tokens=False))
            yield Sample(
                id=example.id,
                group=example.group,
                prompt=text,
                scores={
                    "nll": -value,
                    "tokens": float(tokens),
                    "bits": -value / math.log(2),
                    "bytes": float(len(text.encode("utf-8"))),
                },
                n_prompt_tokens=tokens,
                error=None if math.isfinite(value) else f"the log-likelihood is {value}",
            )


def cut(text: str, size: int) -> list[str]:
    """`text` in windows of about `size` bytes, cut at white space (a longer word stays whole); joined they are `text`.

    >>> cut("one two three", 8)
    ['one two', ' three']
    """
    windows: list[str] = []
    current: list[str] = []
    length = 0
    for word in _words(text):
        width = len(word.encode("utf-8"))
        if current and length + width > size:
            windows.append("".join(current))
            current, length = [], 0
        current.append(word)
        length += width
    if current:
        windows.append("".join(current))
    return windows if text.strip() else []


def _words(text: str) -> Iterator[str]:
    """Words with the white space before them; joined they are `text`."""
    start = 0
    in_word = False
    for place, character in enumerate(text):
        if character.isspace() and in_word:
            yield text[start:place]
            start = place
        in_word = not character.isspace()
    if start < len(text):
        yield text[start:]


def _read(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"no text at {path}.", "`text` is wikitext2, c4, or the path of a text or .jsonl file.")
    if not path.name.removesuffix(".gz").endswith((".jsonl", ".json")):
        return path.read_text(encoding="utf-8")
    documents = []
    for number, row in sources.read_jsonl(path):
        if not isinstance(row.get("text"), str):
            raise DataError(f"line {number} of {path} has no 'text'.", "Each row needs a text.")
        documents.append(row["text"])
    return "\n\n".join(documents)
