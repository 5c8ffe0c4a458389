"""Token sequences that begin alike, packed so that what they share is computed once.

`shared_prefix` is what a whole set of sequences begins with; its keys and values can be kept. `pack` lays what is left
into one row in which each distinct continuation of a prefix stands once (a trie, written depth first); a token attends
to its own ancestors alone. So the stem of a question is computed once for all its options, without padding.

Pure functions on lists of token ids.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapreplace
from itertools import pairwise

PREFIX_STEP = 64
"""Shared prefixes are cut to a multiple of this, so that sets which share the same long prefix find the same one."""

_WORTH = 0.25
"""Of a row's tokens: a shared beginning is kept where computing it again in each row would take as many or more."""

_NEARLY_FULL = 0.8  # of a row's tokens: it may end from here on
_TOGETHER = 1.15  # how much longer all cores take with one row than each with a row of its own, measured on two

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

    def chunks(self, size: int) -> Iterator[tuple[int, int, list[int]]]:
        """Cut the row into chunks of at most `size` tokens: yields (start, end, before).

        Tokens [start, end) attend to nothing earlier in the row but the places in `before`.

        A chunk that is more than half full ends before a token that has fewer ancestors than those around it.
        """
        start = 0
        while start < len(self.tokens):
            end = min(start + size, len(self.tokens))
            if end < len(self.tokens):
                end = min(range(end, start + size // 2, -1), key=self.depth.__getitem__)
            before, place = list[int](), self.parent[start]
            while place >= 0:  # the row is written depth first: whoever sees one of these, sees them by way of `start`
                before.append(place)
                place = self.parent[place]
            yield start, end, before[::-1]
            start = end

    def ends(self) -> list[int]:
        """[q]: the tokens that see token i, itself and those after it in its sequences, are [i, ends[i])."""
        ends = list(range(1, len(self.tokens) + 1))
        for place in reversed(range(len(ends))):
            if (parent := self.parent[place]) >= 0:
                ends[parent] = max(ends[parent], ends[place])
        return ends


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


def clusters(sequences: Sequence[Tokens], unscored: Sequence[int], fits: int) -> list[tuple[int, list[int]]]:
    """Which sequences to answer together: (length of their shared prefix, their indices).

    Two or more that begin with the same PREFIX_STEP tokens, none of them scored (`unscored` says how many a sequence
    has), form a cluster, where rows of `fits` tokens would compute much of that beginning again; all the others form
    one without a prefix.
    """
    heads: dict[tuple[int, ...], list[int]] = {}
    for index in sorted(range(len(sequences)), key=lambda index: tuple(sequences[index])):
        heads.setdefault(tuple(sequences[index][: max(0, min(PREFIX_STEP, unscored[index]))]), []).append(index)
    result, others = [], []
    for head, members in heads.items():
        shared = 0
        if len(head) == PREFIX_STEP and len(members) > 1:
            limit = min(unscored[index] for index in members)
            shared = shared_prefix([sequences[index] for index in members], limit)
        if shared and (_rows_for(_together(sequences, members), shared, fits) - 1) * shared >= _WORTH * fits:
            result.append((shared, members))
        else:
            others += members
    return [*result, (0, others)] if others else result


def pack(sequences: Sequence[Tokens], order: Sequence[int], max_tokens: int) -> list[Packed]:
    """Rows of at most `max_tokens` (a longer sequence has a row to itself) that hold `sequences` in the given order.

    Consecutive sequences share their common beginning; sequences in dictionary order share the most.
    """
    lengths, shared = [len(sequences[index]) for index in order], _shared_with_last(sequences, order)
    return [_row(sequences, order[own], shared[own]) for own in _rows(lengths, shared, max_tokens)]


def pack_evenly(sequences: Sequence[Tokens], order: Sequence[int], max_tokens: int, lanes: int) -> list[Packed]:
    """As `pack`, in those rows with which `lanes` that work side by side are done first.

    More rows give each lane something to do, but what they share is computed again in each. Little stays in one row:
    small parts are slower side by side than one after the other on all cores.
    """
    lengths, shared = [len(sequences[index]) for index in order], _shared_with_last(sequences, order)
    fewest = list(_rows(lengths, shared, max_tokens))
    total = sum(_new(lengths, shared))
    ways = [fewest]
    if total >= lanes * max_tokens // 4:
        wanted = -(-len(fewest) // lanes) * lanes
        sizes = range(-(-total // wanted), max_tokens, max(1, max_tokens // 32))
        even = (list(_rows(lengths, shared, size)) for size in sizes)
        ways = [*(rows for rows in even if len(rows) <= wanted), fewest]

    def span(rows: list[slice]) -> float:
        return _span([lengths[own.start] + sum(_new(lengths, shared, own)[1:]) for own in rows], lanes)

    return [_row(sequences, order[own], shared[own]) for own in min(ways, key=span)]


def _span(sizes: Sequence[int], lanes: int) -> float:
    """The makespan of rows of these sizes on `lanes` workers, in tokens computed by one lane.

    Fewer rows than lanes share the cores of all, at a loss.
    """
    busy = min(lanes, len(sizes))
    ends = [0] * busy
    for size in sizes:
        heapreplace(ends, ends[0] + size)
    return max(ends) * (_TOGETHER * busy / lanes if busy < lanes else 1.0)


def _shared_with_last(sequences: Sequence[Tokens], order: Sequence[int]) -> list[int]:
    """How many tokens each of `order` has in common with the one before it."""
    return [0, *(common_length(sequences[a], sequences[b]) for a, b in pairwise(order))]


def _together(sequences: Sequence[Tokens], order: Sequence[int]) -> int:
    """How many tokens a row of them all has."""
    return sum(_new([len(sequences[index]) for index in order], _shared_with_last(sequences, order)))


def _rows_for(tokens: int, shared: int, fits: int) -> int:
    """How many rows of `fits` tokens hold a trie of `tokens`, of which each holds `shared` again."""
    return 1 if tokens <= fits else -(-(tokens - shared) // max(1, fits - shared))


def _new(lengths: Sequence[int], shared: Sequence[int], own: slice = slice(None)) -> list[int]:
    """How many tokens each adds to a row that holds the one before it."""
    return [length - known for length, known in zip(lengths[own], shared[own], strict=True)]


def _rows(lengths: Sequence[int], shared: Sequence[int], max_tokens: int) -> Iterator[slice]:
    """Which consecutive sequences go into one row.

    What a row has in common with the one before is computed again: a row ends, once it is nearly full, where least is.
    """
    start = 0
    while start < len(lengths):
        end, size, ends = start + 1, lengths[start], []
        while end < len(lengths) and (shared[end] == lengths[end] or size + lengths[end] - shared[end] <= max_tokens):
            if size >= _NEARLY_FULL * max_tokens:
                ends.append(end)
            size += lengths[end] - shared[end]
            end += 1
        if end < len(lengths):
            end = min((end, *reversed(ends)), key=shared.__getitem__)  # of equals the last
        yield slice(start, end)
        start = end


def _row(sequences: Sequence[Tokens], order: Sequence[int], shared: Sequence[int]) -> Packed:
    row, path = Packed(), list[int]()
    for index, kept in zip(order, shared, strict=True):
        path = path[: kept if row.tokens else 0]
        for depth in range(len(path), len(sequences[index])):
            row.parent.append(path[-1] if path else -1)
            row.depth.append(depth)
            path.append(len(row.tokens))
            row.tokens.append(sequences[index][depth])
        row.paths[index] = list(path)
    return row
