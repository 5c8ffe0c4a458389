"""Generation in batches whose rows end by themselves: prompts are read, then every row gets a token at a time.

Prompts are read in packed rows, what all begin with once, and stand in rows that grow in place (rows.py); those of
models that allow no packing in one padded batch. What a row's next token is, and when it ends, says generation.py.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from kick.lm.generation import Completion, Decoding, choose, stop_tokens
from kick.lm.lanes import lane_count, side_by_side
from kick.lm.packing import Packed, pack_evenly, shared_prefix
from kick.lm.rows import NativeRows, RereadRow, RoomyRows
from kick.lm.runner import LOGITS_AT_ONCE, Runner


class Decoder:
    """Completes contexts by `runner`.

    like: a cache of some tokens, if the model fills one. ends: tokens that end a text. alike: the length up to which
    a row's keys are rotated as those of any other.

    What probe.py finds out is set afterwards: `shares`, whether rows may be decoded after one copy of what they begin
    with.
    """

    def __init__(self, runner: Runner, tokenizer: Any, like: DynamicCache, ends: set[int], alike: int) -> None:
        self.runner = runner
        self.tokenizer = tokenizer
        self.ends = ends
        self.shares = False
        self._like = like
        self._alike = alike

    @torch.inference_mode()
    def complete(
        self, contexts: Sequence[list[int]], decoding: Decoding, seeds: list[int], packed: bool, most: int
    ) -> list[str]:
        """What follows each context of a batch. seeds: one for each. packed: whether prompts are read in such rows.

        most: tokens of a prompt that are read at once.
        """
        ends = self.ends | stop_tokens(self.tokenizer, decoding)
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        # random numbers begin anew, also where this is a second attempt
        completions = [Completion(decoding, ends, decode, np.random.default_rng(seed)) for seed in seeds]
        alive = list(completions)  # in the order of `rows`
        read = self.read_packed if packed else self.read_padded
        rows, found = read(contexts, decoding.most, most)
        while True:
            parts = [slice(at, at + LOGITS_AT_ONCE) for at in range(0, len(alive), LOGITS_AT_ONCE)]
            tokens = [token for own in parts for token in choose(self.runner.logits(found[own]), alive[own], ends)]
            ended = [row for row, (own, token) in enumerate(zip(alive, tokens, strict=True)) if own.add(token)]
            for row in reversed(ended):
                rows.drop(row)
                drop(alive, row)
                drop(tokens, row)
            if not alive:
                return [completion.text() for completion in completions]
            found = self.last(rows.inputs(tokens))

    def last(self, inputs: dict[str, Any]) -> Tensor:
        """What the head gets after the last token of each row."""
        n_rows, width = inputs["input_ids"].shape
        rows = torch.arange(n_rows, device=self.runner.device)
        return self.runner.at(inputs, rows, torch.full_like(rows, width - 1))

    def read_packed(self, contexts: Sequence[list[int]], room: int, most: int) -> tuple[RoomyRows, Tensor]:
        """Prompts in packed rows, each shared beginning once: rows to go on from, and what the head gets after each."""
        length = shared_prefix(contexts, min(map(len, contexts)) - 1) if len(contexts) > 1 else 0
        rests = [context[length:] for context in contexts]
        order = sorted(range(len(rests)), key=lambda index: tuple(rests[index]))
        shared = None
        if length and self.shares:
            shared = self.runner.keys_and_values(contexts[0], [length], most)
        prefixes = (length,) if length else ()
        before = length if shared is not None else 0  # tokens that stand once for all rows
        rows = RoomyRows(len(contexts), max(map(len, contexts)) - before, room, self._like, shared)

        def read(row: Packed) -> dict[int, Tensor]:
            cache, _ = self.runner.after(contexts[0], prefixes, most)
            cache = cache or DynamicCache()
            after = self.runner.run(row, cache, length, [path[-1] for path in row.paths.values()], most)
            for index, path in row.paths.items():
                rows.fill(index, cache, [*range(before, length), *(length + place for place in path)])
            return dict(zip(row.paths, after, strict=True))

        self.runner.prepare(contexts[0], prefixes, most)
        found: dict[int, Tensor] = {}
        packed = pack_evenly(rests, order, most, lane_count(self.runner.device))
        for own in side_by_side(read, packed, self.runner.lanes(prefixes, packed)):
            found |= own
        return rows, torch.stack([found[index] for index in range(len(contexts))])

    def read_padded(self, contexts: Sequence[list[int]], room: int, most: int) -> tuple[NativeRows | RereadRow, Tensor]:
        """Prompts in one padded batch, into the model's own kind of cache; one prompt also in pieces, or into none.

        Keys that were rotated by other frequencies than those of a longer row are of no use to it.
        """
        length = len(contexts[0])
        alike = length <= self._alike
        if not self.runner.keeps_cache or (alike and length + room > self._alike):
            row = RereadRow(contexts[0], self.runner.device)
            return row, self.last(row.inputs([]))
        cache = DynamicCache(config=self.runner.model.config)
        if len(contexts) == 1 and length > most and self.runner.takes_pieces and alike:
            found = self.runner.by_pieces(contexts[0], cache, [length - 1], most)
            mask = torch.ones((1, length), dtype=torch.long, device=self.runner.device)
            return NativeRows(cache, mask), found
        tokens, mask = self.runner.padded(contexts, left=True)
        inputs = {
            "input_ids": tokens,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
            "past_key_values": cache,
            "use_cache": True,
        }
        return NativeRows(cache, mask), self.last(inputs)


def drop(items: list[Any], place: int) -> None:
    """Take one out; the last one takes its place, as in the rows of a batch."""
    last = items.pop()
    if place < len(items):
        items[place] = last
