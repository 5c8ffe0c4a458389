"""The default LM: transformers models behind lm-eval's interface, with what requests share computed once.

Likelihoods: the tokens that all requests of a set begin with run once and their keys and values are kept; the rest is
packed into rows without padding (packing.py). Only the positions that are scored reach the vocabulary projection.
Generation: in batches whose rows end by themselves (rows.py, generation.py).

What a call computes depends on that call's requests alone (a kept prefix gives the same numbers as a recomputed one),
and on `row_tokens` and the number of threads, which the record names: an interrupted evaluation that asks the same
batches again gets the same answers.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from kick.errors import KickError, ModelError
from kick.lm import attention, memory
from kick.lm.base import Scored, TokenLM, context_length
from kick.lm.generation import Completion, Decoding, batches_within, choose, row_seeds, stop_tokens
from kick.lm.lanes import lane_count, side_by_side
from kick.lm.packing import PREFIX_STEP, Packed, clusters, pack, pack_evenly, shared_prefix
from kick.lm.rows import NativeRows, RereadRow, RoomyRows
from kick.lm.runner import LOGITS_AT_ONCE, Runner, cached_bytes, fork
from kick.loading import load_model, load_tokenizer
from kick.meter import computes_on
from kick.spec import Spec

_AGREEMENT = {torch.float32: 1e-3, torch.float64: 1e-6}  # of log-likelihoods, computed in two ways
_HALF_DIVERGENCE = 0.05  # nats between next-token distributions, computed in two ways in half precision
_PROBE = ((7, 15), (11, 40), (13, 40))  # step, length: a stem and two rests that stand far from each other in a row
_HALVINGS_WITH_A_PREFIX = 4  # by how much rows are cut before what they follow is given up
_PADDED_AT_ONCE = 5  # rows' tokens of each lane, of prompts that are read in one padded batch: half of what is free
_NOT_SUPPORTED = (TypeError, ValueError, RuntimeError, IndexError, AttributeError)  # what a model raises that can't


class FastLM(TokenLM):
    """A causal language model of transformers behind lm-eval's LM interface.

    Where the model's cache or attention does not allow sharing (sliding windows, recurrent states), it computes each
    request by itself and `record()` says why.
    """

    class Params(Spec):
        row_tokens: int | None = Field(
            default=None,
            ge=memory.FEWEST_ROW_TOKENS,
            description="tokens computed at once, by default what memory allows; less where it runs out",
        )

    def __init__(self, model: Any, tokenizer: Any, path: Path | None = None, params: Params | None = None) -> None:
        super().__init__(tokenizer, context_length(model.config))
        self.model: Any = model
        self.path = path
        self.row_tokens = (params or self.Params()).row_tokens or memory.row_tokens(model)
        self._device = model.device
        self.runner: Any = Runner(model)
        self._like = DynamicCache()  # of a few tokens, once it is known that the model fills one
        self._bytes_per_token = memory.key_value_bytes(model)  # of its cache
        self._check_looks_back()
        self.halved = 0  # how often rows or a batch did not fit into memory
        self._batches = self._keeps_cache = self.finite = True
        self._shares_in_decoding = False
        self._alike = rotary_limit(model.config) or self.max_length
        self.no_sharing = self._why_no_sharing()
        if self.no_sharing is None:
            self._shares_in_decoding = self._can_share_in_decoding()
        else:
            self._batches = self._keeps_cache = self._can_step()

    @classmethod
    def from_checkpoint(cls, path: Path, params: Params, dtype: str, device: str, setting: str = "") -> "FastLM":
        del setting
        return cls(load_model(path, dtype, device), load_tokenizer(path), path, params)

    def close(self) -> None:
        self.model = self.runner = None
        memory.give_back(self.device.type)

    def record(self) -> dict[str, Any]:
        return {
            "name": "fast",
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            "computed_on": computes_on(str(self.model.device)),
            "attention": self.model.config._attn_implementation,
            "row_tokens": self.row_tokens,
            "threads": torch.get_num_threads(),
            "shares_prefixes": self.no_sharing is None,
            **({"why_not": self.no_sharing} if self.no_sharing else {}),
            **({"alone_beyond": self._alike} if self._alike < self.max_length else {}),
            **({} if self._batches else {"generates": "one row at a time"}),
            **({} if self.runner.plain_head else {"logits": "by the model's own head, as it rounds them"}),
            **({"out_of_memory": self.halved} if self.halved else {}),
            **({} if self.finite else {"not_finite": "log-likelihoods of a few tokens"}),
        }

    # Likelihoods

    @torch.inference_mode()
    def score(self, sequences: Sequence[Scored]) -> list[tuple[float, bool]]:
        lengths = [len(sequence.tokens) - 1 for sequence in sequences]
        together = [index for index, length in enumerate(lengths) if length <= self._alike]
        alone = [index for index, length in enumerate(lengths) if length > self._alike]
        if self.no_sharing is None:
            results = self._score_cluster(sequences, together, (), self.row_tokens)
        else:
            results = self._score_padded(sequences, together, 4 * self.row_tokens)
        results |= self._score_padded(sequences, alone, 1)
        return [results[index] for index in range(len(sequences))]

    def _score_cluster(
        self,
        sequences: Sequence[Scored],
        members: list[int],
        prefixes: tuple[int, ...],
        row_tokens: int,
        keep: bool = True,
    ) -> dict[int, tuple[float, bool]]:
        """Sequences with a beginning in common, which is computed once; then the rest in packed rows.

        prefixes: the lengths of what they share, each continuing the one before, the last one the whole. Those that
        share much more form clusters of their own, as long as all that is kept fits. keep: False to keep nothing.
        """
        length = max(prefixes, default=0)
        rests = [sequences[index].tokens[length:-1] for index in members]
        # the token before the first target has to be in the row: it predicts it
        unscored = [len(sequences[index].tokens) - sequences[index].n_targets - 1 - length for index in members]
        results: dict[int, tuple[float, bool]] = {}
        everything = [(0, list(range(len(members))))]
        for more, own in clusters(rests, unscored, row_tokens) if keep else everything:
            inside, deeper = [members[place] for place in own], (*prefixes, length + more)
            if more and sum(deeper) <= self._most_cached_tokens():  # what does not fit into a row is a stem to be kept
                results |= self._score_cluster(sequences, inside, deeper, row_tokens)
            else:
                rows = [
                    replace(row, paths={members[place]: path for place, path in row.paths.items()})
                    for row in pack_evenly(rests, own, row_tokens, lane_count(self.device))
                ]
                results |= self._score_rows(sequences, rows, prefixes, row_tokens)
        return results

    def _score_rows(
        self, sequences: Sequence[Scored], rows: list[Packed], prefixes: tuple[int, ...], row_tokens: int
    ) -> dict[int, tuple[float, bool]]:
        """Rows that follow the same prefix; where memory runs out, their sequences in rows of half as many tokens.

        Where that does not help either, it is the prefix and its copies that do not fit: then nothing is kept.
        """
        attempt: Any = (
            memory.none_if_out_of_memory if row_tokens >= 2 * memory.FEWEST_ROW_TOKENS else lambda work: work()
        )

        def score(row: Packed) -> dict[int, tuple[float, bool]] | None:
            return attempt(partial(self._score_row, sequences, row, prefixes, row_tokens))

        some = sequences[next(iter(rows[0].paths))].tokens
        ready = attempt(partial(self._prepare, some, prefixes, row_tokens))
        scored = side_by_side(score, rows, self._lanes(prefixes, rows)) if ready else [None] * len(rows)
        results: dict[int, tuple[float, bool]] = {}
        failed: list[int] = []
        for row, found in zip(rows, scored, strict=True):
            if found is None:
                failed += row.paths
            else:
                results |= found
        if failed:
            self._note_out_of_memory()
            keep = row_tokens > self.row_tokens // _HALVINGS_WITH_A_PREFIX
            results |= self._score_cluster(sequences, failed, prefixes if keep else (), row_tokens // 2, keep)
        return results

    def _score_row(
        self, sequences: Sequence[Scored], row: Packed, prefixes: tuple[int, ...], row_tokens: int
    ) -> dict[int, tuple[float, bool]]:
        members = list(row.paths)
        cache, length = self._after(sequences[members[0]].tokens, prefixes, row_tokens)
        # the last places of a path predict its last tokens
        counts = [sequences[index].n_targets for index in members]
        places = [place for index, n in zip(members, counts, strict=True) for place in row.paths[index][-n:]]
        targets = [token for index, n in zip(members, counts, strict=True) for token in sequences[index].tokens[-n:]]
        found = self.runner.run(row, cache, length, places, row_tokens)
        return dict(zip(members, self._add_up(found, torch.tensor(targets), counts), strict=True))

    def _prepare(self, tokens: Sequence[int], prefixes: tuple[int, ...], row_tokens: int) -> bool:
        """Compute what rows begin with, by all threads: in their lanes they find it. True, and no reference to it."""
        if prefixes:
            self.runner.keys_and_values(tokens, prefixes, row_tokens)
        return True

    def _lanes(self, prefixes: tuple[int, ...], rows: Sequence[Packed]) -> int:
        """How many of the rows after a prefix memory allows at a time.

        Each holds a copy of the prefix's keys and values and, read in pieces, its own; and what a piece sees of them.
        """
        longest = max(len(row.tokens) for row in rows)
        held = max(prefixes, default=0) + (longest if longest > self.row_tokens else 0)
        mask = min(longest, self.row_tokens) * (1 + self.model.dtype.itemsize)
        return memory.lanes_beside(self.model, held * (self._bytes_per_token + mask))

    def _after(
        self, tokens: Sequence[int], prefixes: tuple[int, ...], row_tokens: int
    ) -> tuple[DynamicCache | None, int]:
        """A cache after the longest of `prefixes` of `tokens`, which may grow, and its length; None after none."""
        if not prefixes:
            return None, 0
        return fork(self.runner.keys_and_values(tokens, prefixes, row_tokens)), prefixes[-1]

    def _add_up(self, found: Tensor, targets: Tensor, counts: list[int]) -> list[tuple[float, bool]]:
        """For each of the sequences, of which `counts` targets each stand in a row: its score."""
        values, greedy = (iter(own.tolist()) for own in self.runner.score(found, targets.to(self.device)))
        return [(sum(islice(values, n)), all(list(islice(greedy, n)))) for n in counts]

    def _score_padded(
        self, sequences: Sequence[Scored], members: Sequence[int], tokens: int
    ) -> dict[int, tuple[float, bool]]:
        """Without packing, in batches of so many `tokens`: a padded row for each sequence that differs but in the last.

        Options of one token share the row of their context.
        """
        owners: dict[tuple[int, ...], list[int]] = {}
        for index in members:
            owners.setdefault(tuple(sequences[index].tokens[:-1]), []).append(index)
        rows = sorted(owners, key=len)

        def score(batch: list[int]) -> list[dict[int, tuple[float, bool]]]:
            """For each row of the batch: the scores of its sequences."""
            inputs, mask = self._padded([rows[place] for place in batch], left=False)
            own = [(row, sequences[index]) for row, place in enumerate(batch) for index in owners[rows[place]]]
            places = [(row, len(s.tokens) - s.n_targets - 1 + i) for row, s in own for i in range(s.n_targets)]
            at, columns = torch.tensor(places, device=self.device).T
            targets = torch.tensor([token for _, s in own for token in s.tokens[-s.n_targets :]])
            found = self.runner.at({"input_ids": inputs, "attention_mask": mask, "use_cache": False}, at, columns)
            scores = iter(self._add_up(found, targets, [s.n_targets for _, s in own]))
            return [{index: next(scores) for index in owners[rows[place]]} for place in batch]

        results: dict[int, tuple[float, bool]] = {}
        for batch in batches_within([len(row) for row in rows], range(len(rows)), tokens):
            for scored in self._halving(batch, score):
                results |= scored
        return results

    def _padded(self, rows: Sequence[Sequence[int]], left: bool) -> tuple[Tensor, Tensor]:
        """Tokens [rows, longest] and their mask, padded at one side."""
        longest = max(map(len, rows))
        tokens = torch.zeros((len(rows), longest), dtype=torch.long)  # whatever pads, the mask hides
        mask = torch.zeros_like(tokens)
        for index, row in enumerate(rows):
            place = slice(longest - len(row), longest) if left else slice(0, len(row))
            tokens[index, place] = torch.tensor(row)
            mask[index, place] = 1
        return tokens.to(self.device), mask.to(self.device)

    @torch.inference_mode()
    def next_token_logprobs(self, text: str) -> Tensor:
        """Log-probabilities [tokens, vocabulary] (float32) at each token of `text`, the first after a prefix token."""
        tokens = [self.prefix_token_id, *self.tok_encode(text, add_special_tokens=False)]
        if len(tokens) - 1 > self.max_length:
            raise KickError(f"a text of {len(tokens) - 1} tokens in a context of {self.max_length}.", "Cut it smaller.")
        inputs = {"input_ids": torch.tensor([tokens[:-1]], device=self.device), "use_cache": False}
        columns = torch.arange(len(tokens) - 1, device=self.device)
        found = self.runner.at(inputs, torch.zeros_like(columns), columns)
        return self.runner.exact_logits(found).float().log_softmax(dim=-1)

    # Generation

    def complete(self, contexts: Sequence[list[int]], decoding: Decoding) -> list[str]:
        lengths = [len(context) + decoding.most for context in contexts]
        work = partial(self._generate_some, contexts, decoding, row_seeds(contexts, decoding.seed))
        # what begins alike is together; where nothing is shared, what is padded to the same length
        key = (lambda index: tuple(contexts[index])) if self.no_sharing is None else lengths.__getitem__
        order = sorted(range(len(contexts)), key=key)
        together = [index for index in order if lengths[index] <= self._alike]
        alone = [[index] for index in order if lengths[index] > self._alike]
        results: dict[int, str] = {}
        room = self._most_cached_tokens() if self._batches else 1
        batches: Iterable[list[int]] = batches_within(lengths, together, room)
        if self.no_sharing is not None:  # all prompts of a batch are read at once
            read = [len(context) for context in contexts]
            batches = chain.from_iterable(
                batches_within(read, batch, _PADDED_AT_ONCE * lane_count(self.device) * self.row_tokens)
                for batch in batches
            )
        for batch in chain(batches, alone):
            results |= dict(zip(batch, self._halving(batch, work), strict=True))
        return [results[index] for index in range(len(contexts))]

    @torch.inference_mode()
    def _generate_some(
        self, contexts: Sequence[list[int]], decoding: Decoding, seeds: list[int], chosen: list[int]
    ) -> list[str]:
        """Completions of the contexts at the places `chosen`."""
        ends = self._end_tokens() | stop_tokens(self.tokenizer, decoding)
        # random numbers begin anew, also where this is a second attempt
        rngs = [np.random.default_rng(seeds[index]) for index in chosen]
        completions = [Completion(decoding, ends, self._text, rng) for rng in rngs]
        alive = list(completions)  # in the order of `rows`
        alone = len(contexts[chosen[0]]) + decoding.most > self._alike
        read = self._read_padded if alone or self.no_sharing is not None else self._read
        rows, found = read([contexts[index] for index in chosen], decoding.most)
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
            found = self._last(rows.inputs(tokens))

    def _last(self, inputs: dict[str, Any]) -> Tensor:
        """What the head gets after the last token of each row."""
        n_rows, width = inputs["input_ids"].shape
        rows = torch.arange(n_rows, device=self.device)
        return self.runner.at(inputs, rows, torch.full_like(rows, width - 1))

    def _read(self, contexts: Sequence[list[int]], room: int) -> tuple[RoomyRows, Tensor]:
        """Prompts in packed rows, each shared beginning once: rows to go on from, and what the head gets after each."""
        most = self.row_tokens
        length = shared_prefix(contexts, min(map(len, contexts)) - 1) if len(contexts) > 1 else 0
        rests = [context[length:] for context in contexts]
        order = sorted(range(len(rests)), key=lambda index: tuple(rests[index]))
        shared = None
        if length and self._shares_in_decoding:
            shared = self.runner.keys_and_values(contexts[0], [length], most)
        prefixes = (length,) if length else ()
        before = length if shared is not None else 0  # tokens that stand once for all rows
        rows = RoomyRows(len(contexts), max(map(len, contexts)) - before, room, self._like, shared)

        def read(row: Packed) -> dict[int, Tensor]:
            cache, _ = self._after(contexts[0], prefixes, most)
            cache = cache or DynamicCache()
            after = self.runner.run(row, cache, length, [path[-1] for path in row.paths.values()], most)
            for index, path in row.paths.items():
                rows.fill(index, cache, [*range(before, length), *(length + place for place in path)])
            return dict(zip(row.paths, after, strict=True))

        self._prepare(contexts[0], prefixes, most)
        found: dict[int, Tensor] = {}
        packed = pack_evenly(rests, order, most, lane_count(self.device))
        for own in side_by_side(read, packed, self._lanes(prefixes, packed)):
            found |= own
        return rows, torch.stack([found[index] for index in range(len(contexts))])

    def _read_padded(self, contexts: Sequence[list[int]], room: int) -> tuple[NativeRows | RereadRow, Tensor]:
        """Prompts in one padded batch, into the model's own kind of cache; or one prompt, into none.

        Keys that were rotated by other frequencies than those of a longer row are of no use to it.
        """
        grows_out = len(contexts[0]) <= self._alike < len(contexts[0]) + room
        if not self._keeps_cache or grows_out:
            row = RereadRow(contexts[0], self.device)
            return row, self._last(row.inputs([]))
        tokens, mask = self._padded(contexts, left=True)
        cache = DynamicCache(config=self.model.config)
        inputs = {
            "input_ids": tokens,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
            "past_key_values": cache,
            "use_cache": True,
        }
        return NativeRows(cache, mask), self._last(inputs)

    def _end_tokens(self) -> set[int]:
        configured = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ids = configured if isinstance(configured, list) else [configured]
        return {token for token in (*ids, self.eot_token_id) if token is not None}

    # Memory

    def _most_cached_tokens(self) -> int:
        """How many tokens' keys and values a generation batch of several rows may hold, or the kept prefixes."""
        return memory.most_cached_tokens(self.model, self._bytes_per_token)

    def _halving(self, rows: list[int], work: Callable[[list[int]], list[Any]]) -> list[Any]:
        """`work(rows)`; where memory runs out, both halves one after the other."""
        found = memory.none_if_out_of_memory(partial(work, rows)) if len(rows) > 1 else work(rows)
        if found is not None:
            return found
        self._note_out_of_memory()
        half = len(rows) // 2
        return [*self._halving(rows[:half], work), *self._halving(rows[half:], work)]

    def _note_out_of_memory(self) -> None:
        self.halved += 1
        self.runner.forget()

    # What can the model do?

    @torch.inference_mode()
    def _check_looks_back(self) -> None:
        """Raise ModelError where a token changes what is said of those before it: then likelihoods mean nothing."""
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        tokens = [(9 * place + 4) % vocabulary for place in range(6)]
        columns = torch.arange(5, device=self.device)
        said = []
        for last in (tokens[-1], (tokens[-1] + 1) % vocabulary):
            inputs = {"input_ids": torch.tensor([[*tokens[:-1], last]], device=self.device), "use_cache": False}
            said.append(self.runner.logits(self.runner.at(inputs, torch.zeros_like(columns), columns)))
        if all(bool(logits.isfinite().all()) for logits in said) and not self._agree(*said):
            raise ModelError(
                f"a {self.model.config.model_type} model looks at the tokens after a place, too.",
                "kick asks causal language models, which see what comes before a token alone.",
            )

    @torch.inference_mode()
    def _why_no_sharing(self) -> str | None:
        """None if packed rows after a kept prefix give the same scores as whole rows; else the reason, in words."""
        if window := getattr(self.model.config, "window_size", None):
            return f"its attention has a window of {window} tokens in memory"
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        stem, one, other = ([(step * place + 3) % vocabulary for place in range(n)] for step, n in _PROBE)
        sequences = [Scored(stem + rest, 3) for rest in (one, other, one[:4])]
        members = range(len(sequences))
        alone = self._score_padded(sequences, members, 1)
        self.finite = all(math.isfinite(score) for score, _ in alone.values())
        try:
            cache = DynamicCache(config=self.model.config)
            self.model(input_ids=torch.tensor([stem], device=self.device), past_key_values=cache, use_cache=True)
            self._like = cache
            self._bytes_per_token = cached_bytes(cache) // len(stem) or self._bytes_per_token
            kinds = {type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer}
            if kinds:
                return f"its cache has layers of kind {', '.join(sorted(kinds))}"
            if not self.finite:  # there is nothing to compare, and nothing to get wrong
                return None
            rests = [sequence.tokens[len(stem) : -1] for sequence in sequences]

            def apart(rows: list[Packed]) -> float:
                """How far sequences in such rows after the kept stem are from themselves read whole."""
                found = [self._score_row(sequences, row, (len(stem),), self.row_tokens) for row in rows]
                return max(abs(row[index][0] - alone[index][0]) for row in found for index in row)

            difference = apart(pack(rests, members, sum(map(len, rests))))
            allowed = _AGREEMENT.get(self.model.dtype)
            if allowed is None:  # half precision rounds differently in each model: the measure is what a cache changes
                allowed = max(0.02, 4 * apart([own for index in members for own in pack(rests, [index], len(one))]))
            if not difference <= allowed:
                return f"packed rows differ by {difference:.2g} from whole ones"
        except _NOT_SUPPORTED as error:
            if memory.is_out_of_memory(error):
                raise
            return f"its attention does not take packed rows ({type(error).__name__}: {str(error)[:120]})"
        return None

    @torch.inference_mode()
    def _can_share_in_decoding(self) -> bool:
        """Whether rows decoded after one copy of a shared prefix come out as rows that hold it themselves."""
        if not attention.used_by(self.model) or self.max_length < PREFIX_STEP + 4:
            return False
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        prefix = [(5 * place + 2) % vocabulary for place in range(PREFIX_STEP)]
        found = []
        try:
            for self._shares_in_decoding in (False, True):
                rows, _ = self._read([[*prefix, 3, 4], [*prefix, 5]], 1)
                found.append(self.runner.logits(self._last(rows.inputs([6, 7]))))
        except _NOT_SUPPORTED as error:
            if memory.is_out_of_memory(error):
                raise
            return False
        return self._agree(*found)

    @torch.inference_mode()
    def _can_step(self) -> bool:
        """Whether a padded batch in the model's own cache goes on as each row read whole does.

        Recurrent states may take in padding, and some models keep nothing in a cache that they are given.
        """
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        contexts = [[(7 * place + 3) % vocabulary for place in range(n)] for n in (12, 7)]
        try:
            rows, _ = self._read_padded(contexts, 1)
            rows.drop(0)
            after = self.runner.logits(self._last(rows.inputs([5])))
        except _NOT_SUPPORTED as error:
            if memory.is_out_of_memory(error):
                raise
            return False
        return self._agree(after, self.runner.logits(self._last(RereadRow(contexts[1], self.device).inputs([5]))))

    def _agree(self, first: Tensor, second: Tensor) -> bool:
        """Whether logits [rows, vocabulary] give the same distributions, but for rounding.

        In half precision the unlikeliest tokens move by half a nat and mean nothing: there it is the divergence that
        counts. A place that is off by one gives ten times as much as is allowed.
        """
        p, q = first.log_softmax(-1), second.log_softmax(-1)
        allowed = _AGREEMENT.get(self.model.dtype)
        if allowed is not None:
            return bool((p - q).abs().max() <= allowed)
        return bool((q.exp() * (q - p)).sum(-1).max() <= _HALF_DIVERGENCE)


def rotary_limit(config: Any) -> int | None:
    """Tokens up to which rotary frequencies are the same for all rows: beyond, they depend on the longest in a call."""
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    limits = []
    for own in (rope, *rope.values()):
        if isinstance(own, dict) and own.get("rope_type") == "longrope":
            known = own.get("original_max_position_embeddings")
            limits.append(known or getattr(config, "original_max_position_embeddings", None))
    return min((limit for limit in limits if limit), default=None)


def drop(items: list[Any], place: int) -> None:
    """Take one out; the last one takes its place, as in the rows of a batch."""
    last = items.pop()
    if place < len(items):
        items[place] = last
