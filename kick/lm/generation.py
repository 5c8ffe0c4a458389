"""Decoding in batches that shrink as rows end.

Greedy, or sampled with a seed: a row's random numbers depend on the seed and its own prompt alone, never on who else is
in the batch.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor

from kick.errors import KickError

_NUCLEUS = 1024  # tokens that are sorted to find those that hold `top_p`; all of them where these do not

_OWN = ("until", "max_gen_toks", "min_new_tokens", "do_sample", "temperature", "top_k", "top_p", "seed")

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "length_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "min_p": (0,),
    "use_cache": (True, False),
}
"""Generation arguments that may be given, with the values that change nothing."""


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
        """From lm-eval's generation arguments. Raises KickError for what is not decoded here (beams, penalties)."""
        given = {key: value for key, value in options.items() if value is not None}
        given.setdefault("temperature", 1.0 if given.get("do_sample") else 0.0)
        normal: dict[str, Any] = dict(normalize_gen_kwargs(given))
        own = {name: normal.pop(name, None) for name in _OWN}
        for name, value in normal.items():
            if value not in _NEUTRAL.get(name, ()):
                what = "beam search is asked for" if name == "num_beams" else f"{name}={value!r} is asked for"
                raise KickError(
                    f"{what}; kick decodes greedily or samples by temperature, top_k and top_p.", f"Drop {name}."
                )
        top_p = 1.0 if own["top_p"] is None else float(own["top_p"])
        if not 0 < top_p <= 1:
            raise KickError(f"top_p={own['top_p']!r} is asked for.", "Expected a share above 0 and up to 1.")
        if own["temperature"] < 0:
            raise KickError(f"temperature={own['temperature']!r} is asked for.", "Expected 0 (greedy) or more.")
        sampling: dict[str, Any] = {}
        if own["do_sample"] and own["temperature"] > 0:
            sampling = {
                "temperature": float(own["temperature"]),
                "top_k": max(0, int(own["top_k"] or 0)),  # -1 means all, too
                "top_p": top_p,
                "seed": int(own["seed"] or 0),
            }
        return cls(
            until=tuple(stop for stop in own["until"] if stop),
            most=int(own["max_gen_toks"]),
            least=int(own["min_new_tokens"] or 0),
            **sampling,
        )

    def cut(self, text: str) -> str:
        """Up to the first stop string."""
        stops = [place for stop in self.until if (place := text.find(stop)) >= 0]
        return text[: min(stops)] if stops else text


class Completion:
    """The tokens of one row so far, watched for stop strings in the decoded tail."""

    def __init__(self, decoding: Decoding, ends: set[int], decode: Callable[[list[int]], str], rng: Any) -> None:
        self.decoding, self.ends, self.decode, self.rng = decoding, ends, decode, rng
        self.tokens: list[int] = []
        # a stop string ends in the last token and takes at most one token a byte; a few more for split characters
        self._tail = max((len(stop.encode("utf-8")) for stop in decoding.until), default=0) + 4

    def add(self, token: int) -> bool:
        """Whether the completion has ended with `token`."""
        if token in self.ends:
            return True
        self.tokens.append(token)
        if self.decoding.until:
            tail = self.decode(self.tokens[-self._tail :])
            if any(stop in tail for stop in self.decoding.until):
                return True
        return len(self.tokens) >= self.decoding.most

    def text(self) -> str:
        """Up to the first stop string."""
        return self.decoding.cut(self.decode(self.tokens))


def stop_tokens(tokenizer: Any, decoding: Decoding) -> set[int]:
    """Stop strings that are one special token each: a text without special tokens never shows them."""
    special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {special[stop] for stop in decoding.until if stop in special}


def choose(logits: Tensor, rows: Sequence[Completion], ends: Collection[int]) -> list[int]:
    """The next token of each row. logits [rows, vocabulary]; rows of one batch are decoded alike.

    ends: tokens that a row does not have before `least` others.
    """
    decoding = rows[0].decoding
    if short := [place for place, row in enumerate(rows) if len(row.tokens) < decoding.least]:
        where = torch.meshgrid(torch.tensor(short), torch.tensor(sorted(ends), dtype=torch.long), indexing="ij")
        logits = logits.index_put([index.to(logits.device) for index in where], logits.new_tensor(-torch.inf))
    if decoding.temperature == 0:
        return logits.argmax(dim=-1).tolist()
    probabilities = (logits.double() / decoding.temperature).softmax(dim=-1)
    uniform = torch.tensor([row.rng.random() for row in rows], dtype=torch.float64, device=logits.device)
    return sample(probabilities, decoding.top_k, decoding.top_p, uniform).tolist()


def sample(probabilities: Tensor, top_k: int, top_p: float, uniform: Tensor) -> Tensor:
    """For each row of probabilities [rows, vocabulary] the token at which their sum passes `uniform` [rows] of all.

    Only the `top_k` likeliest count (0: all), and of these the fewest that hold `top_p` of the probability, the
    likeliest first; of equals the one with the smaller number (at the edge of the top_k: any).

    >>> p = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64)
    >>> draw = lambda top_k, top_p, u: sample(p, top_k, top_p, torch.tensor([u], dtype=torch.float64)).item()
    >>> [draw(0, 1.0, u) for u in (0.0, 0.19, 0.6, 0.9)], [draw(2, 1.0, u) for u in (0.6, 0.7)], draw(0, 0.6, 0.99)
    ([0, 0, 1, 2], [1, 2], 2)
    """
    if top_k == 0 and top_p >= 1:
        return _pick(probabilities.cumsum(dim=-1), uniform)[:, 0]
    size = probabilities.shape[-1]
    count = min(top_k or _NUCLEUS, size)
    likeliest, order = _sorted(probabilities, count)
    if top_k == 0 and bool((likeliest.sum(dim=-1) < top_p).any()):
        likeliest, order = _sorted(probabilities, size)
    mass = likeliest.cumsum(dim=-1)
    held = mass[:, -1:] if top_k else mass.new_ones(len(mass), 1)
    outside = mass - likeliest >= top_p * held * (1 - 1e-12)
    return order.gather(-1, _pick(likeliest.masked_fill(outside, 0).cumsum(dim=-1), uniform))[:, 0]


def _sorted(probabilities: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row and their places, the largest first, of equals the earlier."""
    places = probabilities.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values
    likeliest, order = probabilities.gather(-1, places).sort(dim=-1, descending=True, stable=True)
    return likeliest, places.gather(-1, order)


def _pick(mass: Tensor, uniform: Tensor) -> Tensor:
    """[rows, 1]: where sums [rows, n] pass a share `uniform` [rows] of the last one."""
    wanted = uniform[:, None] * mass[:, -1:]
    return torch.searchsorted(mass, wanted, right=True).minimum((mass < mass[:, -1:]).sum(dim=-1, keepdim=True))


def row_seeds(contexts: Sequence[Sequence[int]], seed: int) -> list[int]:
    """The seed of each row's random numbers: from `seed`, its own tokens, and how often the same came before.

    Below 2^63, which every engine takes.
    """
    seen: dict[tuple[int, ...], int] = {}
    found = []
    for context in map(tuple, contexts):
        seen[context] = seen.get(context, -1) + 1
        name = f"{seed} {seen[context]} {','.join(map(str, context))}"
        found.append(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1)
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
