"""Token sequences that begin alike, packed so that what they share is computed once.

`shared_prefix` is what a whole set of sequences begins with; its keys and values can be kept. `pack` lays what is left
into one row in which each distinct continuation of a prefix stands once (a trie, written depth first); a token attends
to its own ancestors alone. So the stem of a question is computed once for all its options, without padding.

Pure functions on lists of token ids and arrays.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

PREFIX_STEP = 64
"""Shared prefixes are cut to a multiple of this, so that sets which share the same long prefix find the same one."""

Tokens = Sequence[int]


@dataclass
class Packed:
    """A trie of tokens in one row of q tokens.

    tokens [q]; depth [q], the place of each token in its sequence; parent [q], the row index of the token before it
    (-1: it follows the prefix); paths: for each sequence the row indices of its tokens, in order.
    """

    tokens: list[int] = field(default_factory=list)
    depth: list[int] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    paths: dict[int, list[int]] = field(default_factory=dict)

    @classmethod
    def chain(cls, tokens: Tokens) -> "Packed":
        """One sequence."""
        size = len(tokens)
        return cls(list(tokens), list(range(size)), list(range(-1, size - 1)), {0: list(range(size))})

    @property
    def is_chain(self) -> bool:
        """Whether each token follows the one before it in the row."""
        return all(parent == place - 1 for place, parent in enumerate(self.parent))

    def pieces(self, most: int) -> Iterator[tuple[int, "Packed"]]:
        """(start, piece): the row itself, or parts of at most `most` tokens where it is a longer chain."""
        if len(self.tokens) <= most or not self.is_chain:
            yield 0, self
            return
        for start in range(0, len(self.tokens), most):
            yield start, Packed.chain(self.tokens[start : start + most])

    def chunks(self, size: int) -> Iterator[tuple[int, int, int]]:
        """(start, end, first): of the row, tokens [start, end), at most `size`, attend to none before `first`."""
        roots: list[int] = []
        for place, parent in enumerate(self.parent):
            roots.append(place if parent < 0 else roots[parent])
        for start in range(0, len(roots), size):
            end = min(start + size, len(roots))
            yield start, end, min(roots[start:end])

    def attends(self, prefix_length: int) -> np.ndarray:
        """Boolean [q, prefix + q]: each token sees the prefix, its ancestors and itself."""
        size = len(self.tokens)
        seen = np.zeros((size, prefix_length + size), dtype=bool)
        seen[:, :prefix_length] = True
        for row, parent in enumerate(self.parent):
            if parent >= 0:
                seen[row, prefix_length:] = seen[parent, prefix_length:]
            seen[row, prefix_length + row] = True
        return seen


def common_length(first: Tokens, second: Tokens) -> int:
    """How many tokens two sequences have in common at their beginning."""
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return length


def shared_prefix(sequences: Sequence[Tokens], limit: int, step: int = PREFIX_STEP) -> int:
    """How many tokens all `sequences` begin with, at most `limit`, cut down to a multiple of `step`."""
    low, high = min(map(tuple, sequences)), max(map(tuple, sequences))  # all others lie between in dictionary order
    return min(common_length(low, high), limit) // step * step


def clusters(
    sequences: Sequence[Tokens], unscored: Sequence[int], least: int = PREFIX_STEP
) -> list[tuple[int, list[int]]]:
    """Which sequences to answer together: (length of their shared prefix, their indices in dictionary order).

    Two or more that begin with the same `least` tokens, none of them scored (`unscored` says how many a sequence has),
    form a cluster; all the others form one without a prefix.
    """
    heads: dict[tuple[int, ...], list[int]] = {}
    for index in sorted(range(len(sequences)), key=lambda index: tuple(sequences[index])):
        heads.setdefault(tuple(sequences[index][: max(0, min(least, unscored[index]))]), []).append(index)
    result, others = [], []
    for head, members in heads.items():
        if len(head) == least and len(members) > 1:
            limit = min(unscored[index] for index in members)
            shared = shared_prefix([sequences[index] for index in members], limit, min(least, PREFIX_STEP))
            result.append((shared, members))
        else:
            others += members
    return [*result, (0, others)] if others else result


def pack(sequences: Sequence[Tokens], order: Iterable[int], max_tokens: int) -> list[Packed]:
    """Rows of at most `max_tokens` (a longer sequence has a row to itself) that hold `sequences` in the given order.

    Consecutive sequences share their common beginning; sequences in dictionary order share the most.
    """
    rows: list[Packed] = []
    previous: Tokens = ()
    path: list[int] = []
    row = Packed()
    for index in order:
        sequence = sequences[index]
        shared = common_length(previous, sequence) if row.tokens else 0
        if row.tokens and len(row.tokens) + len(sequence) - shared > max_tokens:
            rows.append(row)
            row, shared = Packed(), 0
        path = path[:shared]
        for depth in range(shared, len(sequence)):
            row.parent.append(path[-1] if path else -1)
            row.depth.append(depth)
            path.append(len(row.tokens))
            row.tokens.append(sequence[depth])
        row.paths[index] = list(path)
        previous = sequence
    if row.paths:
        rows.append(row)
    return rows
