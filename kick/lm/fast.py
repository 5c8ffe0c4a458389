"""The default LM: transformers models behind lm-eval's interface, with what requests share computed once.

Likelihoods: the tokens that all requests of a set begin with run once and their keys and values are kept; the rest is
packed into rows without padding (packing.py). Only the positions that are scored reach the vocabulary projection.
Generation: in batches that shrink as rows end (generation.py).

What a call computes depends on that call's requests alone (a kept prefix gives the same numbers as a recomputed one),
so an interrupted evaluation that asks the same batches again gets the same answers.
"""

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from kick.errors import KickError
from kick.lm import attention
from kick.lm.base import Scored, TokenLM
from kick.lm.generation import (
    Completion,
    Decoding,
    batches_within,
    choose,
    groups_by_length,
    merge,
    random_numbers,
)
from kick.lm.packing import PREFIX_STEP, Packed, clusters, pack, shared_prefix
from kick.models import load_model, load_tokenizer

CACHE_SHARE = 0.15
"""Of the machine's memory that keys and values of a generation batch may take: fixed, so that batches are too."""

_FEWEST_TOKENS = 16  # in a row, after halving
_LOGITS_AT_ONCE = 128  # positions whose logits are in memory at a time
_LIKELIEST = 16  # tokens of a position whose logits are computed exactly in half precision
_AGREEMENT = {torch.float32: 1e-3, torch.float64: 1e-6}  # log-likelihoods with and without packing; half precision 0.25


class FastLM(TokenLM):
    """A causal language model of transformers behind lm-eval's LM interface.

    Where the model's cache or attention does not allow sharing (sliding windows, recurrent states), it computes each
    request by itself and `record()` says why.
    """

    class Params(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        row_tokens: int = Field(
            default=1024, ge=_FEWEST_TOKENS, description="tokens computed at once; less where memory runs out"
        )

    def __init__(self, model: Any, tokenizer: Any, path: Path | None = None, params: Params | None = None) -> None:
        super().__init__(tokenizer, getattr(model.config, "max_position_embeddings", None) or 2048)
        self.model = model
        self.path = path
        self.params = params or self.Params()
        attention.use(model)
        self._device = model.device
        self._prefixes: list[tuple[list[int], DynamicCache]] = []  # each continues the one before
        self._bytes_per_cached_token = 1
        self._plain_head = False
        self.halved = 0  # rows and batches that did not fit into memory
        self.no_sharing = self._why_no_sharing()

    @classmethod
    def from_checkpoint(cls, path: Path, params: Params, dtype: str, device: str) -> "FastLM":
        return cls(load_model(path, dtype, device), load_tokenizer(path), path, params)

    def record(self) -> dict[str, Any]:
        return {
            "name": "fast",
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            "attention": self.model.config._attn_implementation,
            "row_tokens": self.params.row_tokens,
            "shares_prefixes": self.no_sharing is None,
            **({"why_not": self.no_sharing} if self.no_sharing else {}),
            **({"out_of_memory": self.halved} if self.halved else {}),
        }

    # Likelihoods

    @torch.inference_mode()
    def score(self, sequences: Sequence[Scored]) -> list[tuple[float, bool]]:
        results: dict[int, tuple[float, bool]] = {}
        if self.no_sharing is None:
            everything = list(range(len(sequences)))
            results = self._score_cluster(sequences, everything, (), self.params.row_tokens, PREFIX_STEP)
        else:
            lengths = [len(sequence.tokens) for sequence in sequences]
            order = sorted(range(len(sequences)), key=lambda index: lengths[index])
            for batch in batches_within(lengths, order, 4 * self.params.row_tokens):
                values = self._halving(batch, partial(self._score_padded, sequences))
                results |= dict(zip(batch, values, strict=True))
        return [results[index] for index in range(len(sequences))]

    def _score_cluster(
        self, sequences: Sequence[Scored], members: list[int], prefixes: tuple[int, ...], row_tokens: int, least: int
    ) -> dict[int, tuple[float, bool]]:
        """Sequences with a beginning in common, which is computed once; then the rest in packed rows.

        prefixes: the lengths of what they share, each continuing the one before, the last one the whole. Those that
        share at least `least` tokens more form clusters of their own.
        """
        length = max(prefixes, default=0)
        rests = [sequences[index].tokens[length:-1] for index in members]
        unscored = [len(sequences[index].tokens) - sequences[index].n_targets - length for index in members]
        results: dict[int, tuple[float, bool]] = {}
        for more, own in clusters(rests, unscored, least):
            inside = [members[place] for place in own]
            if more:  # what does not fit into a row is a stem to be kept
                results |= self._score_cluster(sequences, inside, (*prefixes, length + more), row_tokens, row_tokens)
            else:
                for row in pack(rests, own, row_tokens):
                    named = replace(row, paths={members[place]: path for place, path in row.paths.items()})
                    results |= self._score_row_or_halves(sequences, named, prefixes, row_tokens)
        return results

    def _score_row_or_halves(
        self, sequences: Sequence[Scored], row: Packed, prefixes: tuple[int, ...], row_tokens: int
    ) -> dict[int, tuple[float, bool]]:
        """One packed row; where memory runs out, its sequences in rows of half as many tokens."""
        members = list(row.paths)
        try:
            prefix = None
            for length in prefixes:
                prefix = self._keys_and_values(sequences[members[0]].tokens[:length], row_tokens)
            return self._score_row(sequences, row, prefix, max(prefixes, default=0), row_tokens)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if row_tokens < 2 * _FEWEST_TOKENS or not _is_out_of_memory(error):
                raise
        self._note_out_of_memory()
        return self._score_cluster(sequences, members, prefixes, row_tokens // 2, row_tokens // 2)

    def _score_row(
        self, sequences: Sequence[Scored], row: Packed, prefix: DynamicCache | None, length: int, row_tokens: int
    ) -> dict[int, tuple[float, bool]]:
        """The sequences of one packed row, after a prefix of `length` tokens that is read and not changed."""
        # the last places of a path predict its last tokens
        places = [place for index, path in row.paths.items() for place in path[-sequences[index].n_targets :]]
        targets = [token for index in row.paths for token in sequences[index].tokens[-sequences[index].n_targets :]]
        values, greedy = self._run(row, fork(prefix) if prefix else None, length, places, targets, row_tokens)
        results = {}
        start = 0
        for index in row.paths:
            end = start + sequences[index].n_targets
            results[index] = (float(values[start:end].sum()), bool(greedy[start:end].all()))
            start = end
        return results

    def _keys_and_values(self, tokens: list[int], row_tokens: int) -> DynamicCache:
        """The cache after `tokens`. Kept, with those that it continues, until another begins."""
        while self._prefixes and self._prefixes[-1][0] != tokens[: len(self._prefixes[-1][0])]:
            self._prefixes.pop()
        known, cache = self._prefixes[-1] if self._prefixes else ([], DynamicCache())
        if len(known) < len(tokens):
            cache = fork(cache)
            self._run(Packed.chain(tokens[len(known) :]), cache, len(known), [], [], row_tokens)
            self._prefixes.append((tokens, cache))
        return cache

    def _run(
        self,
        row: Packed,
        cache: DynamicCache | None,
        length: int,
        places: list[int],
        targets: list[int],
        row_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        """A row after the `length` tokens in `cache`, which grows by it; a row of more than `row_tokens` in pieces.

        places [p] in the row and the token [p] that follows each -> its log-likelihood [p], is it the likeliest [p].
        """
        if len(row.tokens) > row_tokens and cache is None:
            cache = DynamicCache()
        found = []
        for start, piece in row.pieces(row_tokens):
            inside = [i for i, place in enumerate(places) if start <= place < start + len(piece.tokens)]
            inputs = self._inputs(piece, cache, length + start)
            columns = torch.tensor([places[i] - start for i in inside], dtype=torch.long, device=self.device)
            wanted = torch.tensor([targets[i] for i in inside], dtype=torch.long, device=self.device)
            with attention.visible_prefix(length + start):
                found.append(self._scored(inputs, torch.zeros_like(columns), columns, wanted))
        return torch.cat([values for values, _ in found]), torch.cat([greedy for _, greedy in found])

    def _inputs(self, row: Packed, cache: DynamicCache | None, length: int) -> dict[str, Any]:
        """What the model is called with for a packed row after the `length` tokens in `cache`."""
        mask = None
        if length or not row.is_chain or attention.used_by(self.model):
            seen = torch.from_numpy(row.attends(length)).to(self.device)
            mask = torch.zeros(seen.shape, dtype=self.model.dtype, device=self.device)
            mask = mask.masked_fill_(~seen, torch.finfo(self.model.dtype).min)[None, None]
        return {
            "input_ids": torch.tensor([row.tokens], device=self.device),
            "position_ids": torch.tensor([row.depth], device=self.device) + length,
            "attention_mask": mask,
            "past_key_values": cache,
            "use_cache": cache is not None,
        }

    def _scored(self, inputs: dict[str, Any], rows: Tensor, columns: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log-likelihood [p] of token targets [p] after place columns [p] of rows [p], is it the likeliest [p].

        No more than _LOGITS_AT_ONCE rows of logits are in memory, where the head is no more than its linear.
        """
        if self._plain_head:
            hidden = self._body(**inputs).last_hidden_state[rows, columns]
            head = self.model.get_output_embeddings()
            pieces = zip(hidden.split(_LOGITS_AT_ONCE), targets.split(_LOGITS_AT_ONCE), strict=True)
            logits = (exact_where_it_counts(head(own), own, head, t) for own, t in pieces)
        else:
            kept = columns.unique() if len(columns) else columns.new_zeros(1)
            whole = self.model(**inputs, logits_to_keep=kept).logits
            logits = iter(whole[rows, torch.searchsorted(kept, columns)].split(_LOGITS_AT_ONCE))
        found = [score_tokens(own, t) for own, t in zip(logits, targets.split(_LOGITS_AT_ONCE), strict=True)]
        return torch.cat([values for values, _ in found]), torch.cat([greedy for _, greedy in found])

    @property
    def _body(self) -> Any:
        """The model without its head."""
        return getattr(self.model, self.model.base_model_prefix)

    def _score_padded(self, sequences: Sequence[Scored], members: list[int]) -> list[tuple[float, bool]]:
        """Without any sharing: one padded row a request."""
        longest = max(len(sequences[index].tokens) for index in members) - 1
        tokens = torch.full((len(members), longest), self.eot_token_id)
        mask = torch.zeros_like(tokens)
        places: list[tuple[int, int, int]] = []
        for row, index in enumerate(members):
            own, count = sequences[index]
            tokens[row, : len(own) - 1] = torch.tensor(own[:-1])
            mask[row, : len(own) - 1] = 1
            places += [(row, len(own) - count - 1 + i, own[len(own) - count + i]) for i in range(count)]
        rows, columns, targets = torch.tensor(places, device=self.device).T
        inputs = {"input_ids": tokens.to(self.device), "attention_mask": mask.to(self.device), "use_cache": False}
        values, greedy = self._scored(inputs, rows, columns, targets)
        counts = [sequences[index].n_targets for index in members]
        pairs = zip(values.split(counts), greedy.split(counts), strict=True)
        return [(float(own.sum()), bool(likeliest.all())) for own, likeliest in pairs]

    @torch.inference_mode()
    def next_token_logprobs(self, text: str) -> Tensor:
        """Log-probabilities [tokens, vocabulary] (float32) at each token of `text`, the first after a prefix token."""
        tokens = [self.prefix_token_id, *self.tok_encode(text, add_special_tokens=False)]
        if len(tokens) - 1 > self.max_length:
            raise KickError(f"a text of {len(tokens) - 1} tokens in a context of {self.max_length}.", "Cut it smaller.")
        logits = self.model(input_ids=torch.tensor([tokens[:-1]], device=self.device), use_cache=False).logits[0]
        return logits.float().log_softmax(dim=-1)

    # Generation

    def complete(self, contexts: Sequence[list[int]], decoding: Decoding) -> list[str]:
        order = sorted(range(len(contexts)), key=lambda index: tuple(contexts[index]))  # what begins alike is together
        lengths = [len(context) + decoding.most for context in contexts]
        work = partial(self._generate_some, contexts, decoding, random_numbers(contexts, decoding.seed))
        results: dict[int, str] = {}
        for batch in batches_within(lengths, order, self._most_cached_tokens()):
            results |= dict(zip(batch, self._halving(batch, work), strict=True))
        return [results[index] for index in range(len(contexts))]

    @torch.inference_mode()
    def _generate_some(
        self, contexts: Sequence[list[int]], decoding: Decoding, rngs: list[Any], chosen: list[int]
    ) -> list[str]:
        """Completions of the contexts at the places `chosen`."""
        ends = self._end_tokens()
        rows = [Completion(decoding, ends, self._text, rngs[index]) for index in chosen]
        alive = list(range(len(rows)))
        logits, mask, cache = self._read([contexts[index] for index in chosen])
        places = mask.sum(dim=1, keepdim=True) - 1
        while True:
            tokens = choose(logits, [rows[index] for index in alive])
            going = [
                row for row, (index, token) in enumerate(zip(alive, tokens, strict=True)) if not rows[index].add(token)
            ]
            if not going:
                return [row.text() for row in rows]
            if len(going) < len(alive):
                keep = torch.tensor(going, device=self.device)
                cache.batch_select_indices(keep)
                mask, places = mask[keep], places[keep]
                alive, tokens = [alive[row] for row in going], [tokens[row] for row in going]
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
            places = places + 1
            logits = self.model(
                input_ids=torch.tensor(tokens, device=self.device)[:, None],
                attention_mask=mask,
                position_ids=places,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]

    def _read(self, contexts: list[list[int]]) -> tuple[Tensor, Tensor, DynamicCache]:
        """All prompts: (logits [rows, vocabulary] after each, mask [rows, width], cache).

        What all begin with is read once. The rest is read in groups of similar length, whose caches are then put
        together, padded on the left; models without sharing are read in one padded batch.
        """
        length = 0
        if self.no_sharing is None and len(contexts) > 1:
            length = shared_prefix(contexts, min(map(len, contexts)) - 1)
        rests = [context[length:] for context in contexts]
        groups = groups_by_length([len(rest) for rest in rests]) if self.no_sharing is None else [[*range(len(rests))]]
        caches, logits, widths = [], [], []
        mask = torch.zeros(len(rests), length + max(map(len, rests)), dtype=torch.long, device=self.device)
        for members in groups:
            width = max(len(rests[index]) for index in members)
            tokens = torch.full((len(members), width), self.eot_token_id)
            own = torch.ones(len(members), length + width, dtype=torch.long)
            for row, index in enumerate(members):  # padded between the prefix and what follows
                tokens[row, width - len(rests[index]) :] = torch.tensor(rests[index])
                own[row, length : length + width - len(rests[index])] = 0
                mask[index, mask.shape[1] - len(rests[index]) :] = 1
            cache = DynamicCache(config=self.model.config)
            if length:
                prefix = self._keys_and_values(list(contexts[0][:length]), self.params.row_tokens)
                cache = fork(prefix)
                cache.batch_repeat_interleave(len(members))
            own = own.to(self.device)
            output = self.model(
                input_ids=tokens.to(self.device),
                attention_mask=own,
                position_ids=(own.cumsum(dim=1) - 1).clamp(min=0)[:, length:],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            caches.append(cache)
            logits.append(output.logits[:, -1])
            widths.append(width)
        mask[:, :length] = 1
        whole = merge(caches, widths, length) if len(groups) > 1 else caches[0]
        order = [index for members in groups for index in members]
        if order != sorted(order):
            back = torch.tensor(order, device=self.device).argsort()
            whole.batch_select_indices(back)
            return torch.cat(logits)[back], mask, whole
        return torch.cat(logits), mask, whole

    def _end_tokens(self) -> set[int]:
        configured = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ids = configured if isinstance(configured, list) else [configured]
        return {token for token in (*ids, self.eot_token_id) if token is not None}

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    # Memory

    def _most_cached_tokens(self) -> int:
        """How many tokens' keys and values a generation batch may hold."""
        if self.device.type == "cuda":
            memory = torch.cuda.get_device_properties(self.device).total_memory
        else:
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return max(self.max_length, int(CACHE_SHARE * memory / self._bytes_per_cached_token))

    def _halving(self, rows: list[int], work: Callable[[list[int]], list[Any]]) -> list[Any]:
        """`work(rows)`; where memory runs out, both halves one after the other."""
        try:
            return work(rows)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if len(rows) == 1 or not _is_out_of_memory(error):
                raise
        self._note_out_of_memory()
        half = len(rows) // 2
        return [*self._halving(rows[:half], work), *self._halving(rows[half:], work)]

    def _note_out_of_memory(self) -> None:
        self.halved += 1
        self._prefixes.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # May prefixes be shared at all?

    @torch.inference_mode()
    def _why_no_sharing(self) -> str | None:
        """None if packed rows after a kept prefix give the same scores as whole rows; else the reason, in words."""
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        tokens = [(7 * place + 3) % vocabulary for place in range(24)]
        self._plain_head = self._has_plain_head(tokens)
        sequences = [Scored(t, 3) for t in (tokens[:20], [*tokens[:18], tokens[22], tokens[23]], tokens[:19])]
        alone = [self._score_padded(sequences, [index])[0] for index in range(len(sequences))]
        try:
            cache = DynamicCache(config=self.model.config)
            self.model(input_ids=torch.tensor([tokens[:15]], device=self.device), past_key_values=cache, use_cache=True)
            self._bytes_per_cached_token = _cached_bytes(cache) // 15 or 1
            kinds = {type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer}
            if kinds:
                return f"its cache has layers of kind {', '.join(sorted(kinds))}"
            (row,) = pack([sequence.tokens[15:-1] for sequence in sequences], range(3), self.params.row_tokens)
            for index, (value, _) in self._score_row(sequences, row, cache, 15, self.params.row_tokens).items():
                difference = abs(value - alone[index][0])
                if not difference <= _AGREEMENT.get(self.model.dtype, 0.25):
                    return f"packed rows differ by {difference:.2g} from whole ones"
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
            return f"its attention does not take packed rows ({type(error).__name__}: {str(error)[:120]})"
        return None

    def _has_plain_head(self, tokens: list[int]) -> bool:
        """Whether logits are one linear of what the model gives without its head: some scale or cap them besides."""
        inputs = {"input_ids": torch.tensor([tokens], device=self.device), "use_cache": False}
        head = self.model.get_output_embeddings()
        if type(head) is not torch.nn.Linear or head._forward_hooks:
            return False
        try:
            own = head(self._body(**inputs).last_hidden_state)
        except (TypeError, RuntimeError, AttributeError):
            return False
        return torch.equal(own, self.model(**inputs).logits)


def score_tokens(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logits [p, vocabulary], targets [p] -> float32 log-probabilities [p], and [p] whether each is the likeliest."""
    logits = logits.float()
    chosen = logits.gather(1, targets[:, None])[:, 0]
    return chosen - logits.logsumexp(dim=1), logits.argmax(dim=1) == targets


def exact_where_it_counts(logits: Tensor, hidden: Tensor, head: Any, targets: Tensor) -> Tensor:
    """Logits [p, vocabulary] in float32: those of the targets [p] and of the likeliest tokens computed in it.

    In half precision a logit of 20 is rounded to a sixteenth or an eighth, by which options would tie or change
    places. hidden [p, d] is what the linear `head` made `logits` of.
    """
    if logits.dtype in (torch.float32, torch.float64):
        return logits
    ids = torch.cat([logits.topk(min(_LIKELIEST, logits.shape[1]), dim=1).indices, targets[:, None]], dim=1)
    exact = torch.einsum("pd,pkd->pk", hidden.float(), head.weight[ids].float())  # [p, k]
    if head.bias is not None:
        exact += head.bias[ids].float()
    return logits.float().scatter(1, ids, exact)


def fork(cache: DynamicCache) -> DynamicCache:
    """A cache that can grow without changing `cache`: the tensors are shared, a longer one is a new tensor."""
    grown = copy.copy(cache)
    grown.layers = [copy.copy(layer) for layer in cache.layers]
    return grown


def _cached_bytes(cache: DynamicCache) -> int:
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
