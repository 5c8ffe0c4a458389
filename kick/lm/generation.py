"""Decoding in batches that shrink as rows end.

Greedy, or sampled with a seed: a row's random numbers depend on the seed and its own prompt alone, never on who else is
in the batch.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from kick.errors import KickError


@dataclass(frozen=True, order=True)
class Decoding:
    """How one request is decoded. `most` and `least` are new tokens; temperature 0 is greedy."""

    until: tuple[str, ...]
    most: int
    least: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    @classmethod
    def of(cls, options: dict[str, Any]) -> "Decoding":
        """From lm-eval's generation arguments. Raises KickError for what is not decoded here (beams)."""
        if (options.get("num_beams") or 1) > 1:
            raise KickError("beam search is asked for; the LM 'fast' decodes greedily or samples.", "Drop num_beams.")
        until = options.get("until") or []
        temperature = float(options.get("temperature") or 0.0)
        if options.get("do_sample") is False:
            temperature = 0.0
        elif options.get("do_sample") and options.get("temperature") is None:
            temperature = 1.0
        return cls(
            until=tuple([until] if isinstance(until, str) else until),
            most=int(options.get("max_gen_toks", 256)),
            least=int(options.get("min_new_tokens", 0)),
            temperature=temperature,
            top_k=int(options.get("top_k") or 0) if temperature else 0,
            top_p=float(options.get("top_p") or 1.0) if temperature else 1.0,
            seed=int(options.get("seed") or 0) if temperature else 0,
        )


class Completion:
    """The tokens of one row so far, watched for stop strings in the decoded tail."""

    def __init__(self, decoding: Decoding, ends: set[int], decode: Callable[[list[int]], str], rng: Any) -> None:
        self.decoding, self.ends, self.decode, self.rng = decoding, ends, decode, rng
        self.tokens: list[int] = []
        # a stop string ends in the last token and takes at most one token a byte; a few more for split characters
        self._tail = max((len(stop.encode("utf-8")) for stop in decoding.until), default=0) + 4

    def add(self, token: int) -> bool:
        """Whether the completion has ended with `token`."""
        if token in self.ends and len(self.tokens) >= self.decoding.least:
            return True
        self.tokens.append(token)
        if self.decoding.until:
            tail = self.decode(self.tokens[-self._tail :])
            if any(stop in tail for stop in self.decoding.until):
                return True
        return len(self.tokens) >= self.decoding.most

    def text(self) -> str:
        """Up to the first stop string."""
        text = self.decode(self.tokens)
        stops = [place for stop in self.decoding.until if (place := text.find(stop)) >= 0]
        return text[: min(stops)] if stops else text


def choose(logits: Tensor, rows: Sequence[Completion]) -> list[int]:
    """The next token of each row. logits [rows, vocabulary]; rows of one batch are decoded alike."""
    decoding = rows[0].decoding
    if decoding.temperature == 0:
        return logits.argmax(dim=-1).tolist()
    probabilities = (logits.double() / decoding.temperature).softmax(dim=-1).cpu().numpy()
    return [
        sample(own, decoding.top_k, decoding.top_p, row.rng.random())
        for own, row in zip(probabilities, rows, strict=True)
    ]


def sample(probabilities: np.ndarray, top_k: int, top_p: float, uniform: float) -> int:
    """The token at which the cumulated probability passes `uniform`, the likeliest tokens first.

    Only the `top_k` likeliest count (0: all), and of these the fewest that hold `top_p` of the probability.

    >>> p = np.array([0.2, 0.5, 0.3])
    >>> [sample(p, 0, 1.0, u) for u in (0.0, 0.49, 0.6, 0.9)], sample(p, 1, 1.0, 0.9), sample(p, 0, 0.6, 0.99)
    ([1, 1, 2, 0], 1, 2)
    """
    order = np.argsort(-probabilities, kind="stable")[: top_k or None]
    mass = probabilities[order].cumsum()
    kept = int(np.searchsorted(mass, top_p * mass[-1] * (1 - 1e-12))) + 1
    return int(order[min(np.searchsorted(mass[:kept], uniform * mass[kept - 1], side="right"), kept - 1)])


def row_seeds(contexts: Sequence[Sequence[int]], seed: int) -> list[int]:
    """The seed of each row's random numbers: from `seed`, its own tokens, and how often the same came before."""
    seen: dict[tuple[int, ...], int] = {}
    found = []
    for context in map(tuple, contexts):
        seen[context] = seen.get(context, -1) + 1
        name = f"{seed} {seen[context]} {','.join(map(str, context))}"
        found.append(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
    return found


def batches_within(lengths: Sequence[int], order: Iterable[int], tokens: int) -> Iterator[list[int]]:
    """`order` cut into batches: the longest length times the number of rows is at most `tokens`, or it is one row."""
    batch: list[int] = []
    longest = 0
    for index in order:
        longest = max(longest, lengths[index])
        if batch and longest * (len(batch) + 1) > tokens:
            yield batch
            batch, longest = [], lengths[index]
        batch.append(index)
    if batch:
        yield batch
