"""Log-likelihoods of the last tokens of sequences, with what they begin with computed once.

The tokens that all sequences of a set begin with run once and their keys and values are kept; the rest is packed into
rows without padding (packing.py). Only the positions that are scored reach the vocabulary projection. Models whose
cache or attention does not allow that get padded rows.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from kick.lm import memory
from kick.lm.base import Scored
from kick.lm.generation import batches_within
from kick.lm.lanes import lane_count, side_by_side
from kick.lm.packing import Packed, clusters, pack_evenly
from kick.lm.runner import Runner

_HALVINGS_WITH_A_PREFIX = 4  # by how much rows are cut before what they follow is given up

Score = tuple[float, bool]
"""(natural-log likelihood of the scored tokens, whether each of them is the likeliest)."""


class Scorer:
    """Scores sequences by `runner`. Results are by the place of a sequence among those given."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def in_packed_rows(self, sequences: Sequence[Scored], members: list[int]) -> dict[int, Score]:
        """The sequences at the places `members`."""
        return self._cluster(sequences, members, (), self.runner.row_tokens)

    def _cluster(
        self,
        sequences: Sequence[Scored],
        members: list[int],
        prefixes: tuple[int, ...],
        row_tokens: int,
        keep: bool = True,
    ) -> dict[int, Score]:
        """Sequences with a beginning in common, which is computed once; then the rest in packed rows.

        prefixes: the lengths of what they share, each continuing the one before, the last one the whole. Those that
        share much more form clusters of their own, as long as all that is kept fits. keep: False to keep nothing.
        """
        length = max(prefixes, default=0)
        rests = [sequences[index].tokens[length:-1] for index in members]
        # the token before the first target has to be in the row: it predicts it
        unscored = [len(sequences[index].tokens) - sequences[index].n_targets - 1 - length for index in members]
        results: dict[int, Score] = {}
        everything = [(0, list(range(len(members))))]
        for more, own in clusters(rests, unscored, row_tokens) if keep else everything:
            inside, deeper = [members[place] for place in own], (*prefixes, length + more)
            if more and sum(deeper) <= self.runner.most_cached_tokens():  # a stem to keep: rows do not hold its cluster
                results |= self._cluster(sequences, inside, deeper, row_tokens)
            else:
                rows = [
                    replace(row, paths={members[place]: path for place, path in row.paths.items()})
                    for row in pack_evenly(rests, own, row_tokens, lane_count(self.runner.device))
                ]
                results |= self._rows(sequences, rows, prefixes, row_tokens)
        return results

    def _rows(
        self, sequences: Sequence[Scored], rows: list[Packed], prefixes: tuple[int, ...], row_tokens: int
    ) -> dict[int, Score]:
        """Rows that follow the same prefix; where memory runs out, their sequences in rows of half as many tokens.

        Where that does not help either, it is the prefix and its copies that do not fit: then nothing is kept.
        """
        attempt: Any = (
            memory.none_if_out_of_memory if row_tokens >= 2 * memory.FEWEST_ROW_TOKENS else lambda work: work()
        )

        def score(row: Packed) -> dict[int, Score] | None:
            return attempt(partial(self.in_a_row, sequences, row, prefixes, row_tokens))

        some = sequences[next(iter(rows[0].paths))].tokens
        ready = attempt(partial(self.runner.prepare, some, prefixes, row_tokens))
        scored = side_by_side(score, rows, self.runner.lanes(prefixes, rows)) if ready else [None] * len(rows)
        results: dict[int, Score] = {}
        failed: list[int] = []
        for row, found in zip(rows, scored, strict=True):
            if found is None:
                failed += row.paths
            else:
                results |= found
        if failed:
            self.runner.note_out_of_memory()
            keep = row_tokens > self.runner.row_tokens // _HALVINGS_WITH_A_PREFIX
            results |= self._cluster(sequences, failed, prefixes if keep else (), row_tokens // 2, keep)
        return results

    def in_a_row(
        self, sequences: Sequence[Scored], row: Packed, prefixes: tuple[int, ...], row_tokens: int
    ) -> dict[int, Score]:
        """The sequences of one packed row after the tokens that they all begin with, the longest of `prefixes`."""
        members = list(row.paths)
        cache, length = self.runner.after(sequences[members[0]].tokens, prefixes, row_tokens)
        # the last places of a path predict its last tokens
        counts = [sequences[index].n_targets for index in members]
        places = [place for index, n in zip(members, counts, strict=True) for place in row.paths[index][-n:]]
        targets = [token for index, n in zip(members, counts, strict=True) for token in sequences[index].tokens[-n:]]
        found = self.runner.run(row, cache, length, places, row_tokens)
        return dict(zip(members, self._add_up(found, torch.tensor(targets), counts), strict=True))

    def _add_up(self, found: Tensor, targets: Tensor, counts: list[int]) -> list[Score]:
        """For each of the sequences, of which `counts` targets each stand in a row: its score."""
        values, greedy = (iter(own.tolist()) for own in self.runner.score(found, targets.to(self.runner.device)))
        return [(sum(islice(values, n)), all(list(islice(greedy, n)))) for n in counts]

    def in_padded_rows(
        self, sequences: Sequence[Scored], members: Sequence[int], tokens: int, pieces: bool = False
    ) -> dict[int, Score]:
        """Padded batches of at most `tokens` tokens. Sequences that differ only in their last token share one row.

        pieces: whether a row of more than `tokens` is read piece by piece.
        """
        owners: dict[tuple[int, ...], list[int]] = {}
        for index in members:
            owners.setdefault(tuple(sequences[index].tokens[:-1]), []).append(index)
        rows = sorted(owners, key=len)

        def score(batch: list[int]) -> list[dict[int, Score]]:
            """For each row of the batch: the scores of its sequences."""
            own = [(row, sequences[index]) for row, place in enumerate(batch) for index in owners[rows[place]]]
            places = [(row, len(s.tokens) - s.n_targets - 1 + i) for row, s in own for i in range(s.n_targets)]
            at, columns = torch.tensor(places, device=self.runner.device).T
            targets = torch.tensor([token for _, s in own for token in s.tokens[-s.n_targets :]])
            if pieces and len(rows[batch[0]]) > tokens:
                cache = DynamicCache(config=self.runner.model.config)
                found = self.runner.by_pieces(rows[batch[0]], cache, columns.tolist(), self.runner.row_tokens)
            else:
                inputs, mask = self.runner.padded([rows[place] for place in batch], left=False)
                found = self.runner.at({"input_ids": inputs, "attention_mask": mask, "use_cache": False}, at, columns)
            scores = iter(self._add_up(found, targets, [s.n_targets for _, s in own]))
            return [{index: next(scores) for index in owners[rows[place]]} for place in batch]

        results: dict[int, Score] = {}
        for batch in batches_within([len(row) for row in rows], range(len(rows)), tokens):
            for scored in self.runner.halving(batch, score):
                results |= scored
        return results
