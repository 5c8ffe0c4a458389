"""Perplexity and bits per byte on running text (WikiText-2, C4, or your own).

    kick evaluate MODEL --suite perplexity --data DIR --param text=wikitext2 --out RUN

The text is cut at white space into windows of about `window_bytes`; every token of a window is predicted from the
window's beginning on. Windows are the same bytes for every model, so that bits per byte compares models with different
tokenizers, and windows pair between settings. Perplexity is exp(total negative log-likelihood / total tokens).
A window of more tokens than the model's context is cut again, alike for all settings of a model. Papers cut by tokens
(2,048) instead: with the same context length the two differ by little, but they are not the same.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import Field

from kick.errors import DataError
from kick.jsonl import read_texts
from kick.lm import rolling_loglikelihoods
from kick.spec import Spec
from kick.suite import DataSource, Example, Metric, Sample, Suite

from . import sources

_FILES = {
    "wikitext2": ("ppl/wikitext-2-raw/wiki.test.raw", "wikitext-2-raw/wiki.test.raw", "wiki.test.raw"),
    "c4": ("ppl/c4/en/c4-validation.00000-of-00008.json.gz", "en/c4-validation.00000-of-00008.json.gz"),
}

C4_DOCUMENTS = 1100
"""How many documents of C4's first validation file are read, as papers on pruning do."""


class Perplexity(Suite):
    name = "perplexity"
    description = "perplexity and bits per byte on running text"
    scores_text = True
    metrics = (
        Metric("perplexity", value="nll", per="tokens", transform="exp", higher_is_better=False),
        Metric("bits_per_byte", value="bits", per="bytes", higher_is_better=False, unit="bits/byte"),
    )

    class Params(Spec):
        text: str = Field(
            default="auto",
            description="wikitext2, c4, embedded, or the path of a file; auto is what the data source has",
        )
        window_bytes: int = Field(default=4096, ge=64, description="size of a window")

    def examples(self, source: DataSource) -> list[Example]:
        name, text = self._text(source)
        windows = cut(text, self.params.window_bytes)
        if not windows:
            raise DataError(f"the text '{name}' of {source} is empty.", "Give a text with at least one word.")
        return [Example(f"{name}-{number:05d}", name, {"text": window}) for number, window in enumerate(windows)]

    def _text(self, source: DataSource) -> tuple[str, str]:
        """(name, text). Documents are joined by blank lines: most are shorter than a window."""
        text = self.params.text
        if text == "auto":
            text = "embedded" if source.kind == "embedded" else "wikitext2"
        if text == "embedded":
            return text, _join(read_texts(sources.EMBEDDED / "perplexity" / "text.jsonl"))
        if text not in _FILES:
            if not Path(text).is_file():
                raise DataError(
                    f"no text at {text}.", "`text` is auto, wikitext2, c4, embedded, or the path of a file."
                )
            return Path(text).stem, _join(read_texts(Path(text)))
        if source.kind == "embedded":
            raise DataError(f"{text} does not come with kick.", "Set data to hub or to a folder, or text to embedded.")
        if source.kind == "directory":
            rows = read_texts(sources.find(source.directory, *_FILES[text], suite="perplexity"))
        elif text == "wikitext2":
            lines = sources.hub_rows("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
            return text, "".join(line["text"] or " \n" for line in lines)  # the hub stores a line of one space as ""
        else:
            files = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
            found = sources.hub_rows("allenai/c4", split="validation", data_files=files, streaming=True)
            rows = (row["text"] for row in found)
        return text, _join(islice(rows, C4_DOCUMENTS))

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


def _join(documents: Iterable[str]) -> str:
    return "\n\n".join(documents)
