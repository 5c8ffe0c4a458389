"""The default LM: transformers models behind lm-eval's interface, with what requests share computed once.

Likelihoods: the tokens that all requests of a set begin with run once and their keys and values are kept; the rest is
packed into rows without padding (packing.py). Only the positions that are scored reach the vocabulary projection.
Generation: in batches that shrink as rows end (generation.py).

What a call computes depends on that call's requests alone (a kept prefix gives the same numbers as a recomputed one),
so an interrupted evaluation that asks the same batches again gets the same answers.
"""

import copy
import os
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from kick.errors import KickError
from kick.lm import attention
from kick.lm.generation import (
    Completion,
    Decoding,
    batches_within,
    choose,
    groups_by_length,
    merge,
    random_numbers,
)
from kick.lm.packing import Packed, clusters, pack, shared_prefix
from kick.models import load_model, load_tokenizer

PACKED_TOKENS = 512
"""Tokens in a row: enough for full speed of the matrix units, few enough that the mask stays small."""

PLAIN_ROWS = 8
CACHE_SHARE = 0.15
"""Of the machine's memory that keys and values of a generation batch may take: fixed, so that batches are too."""

_REMEMBERED_TEXTS = 1024
_AGREEMENT = {torch.float32: 1e-3, torch.float64: 1e-6}  # log-likelihoods with and without packing; half precision 0.25


class FastLM(TemplateLM):
    """A causal language model of transformers behind lm-eval's LM interface.

    Where the model's cache or attention does not allow sharing (sliding windows, recurrent states), it computes each
    request by itself and `record()` says why.
    """

    def __init__(self, model: Any, tokenizer: Any, path: Path | None = None) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.path = path
        attention.use(model)
        self._device = model.device
        self._encode = lru_cache(maxsize=_REMEMBERED_TEXTS)(self._encode_uncached)  # a prompt is met once an option
        self._prefix: tuple[tuple[int, ...], DynamicCache] | None = None
        self.halved = 0  # batches that did not fit into memory
        self._bytes_per_cached_token = 1
        self.no_sharing = self._why_no_sharing()

    @classmethod
    def from_checkpoint(cls, path: Path, dtype: str, device: str) -> "FastLM":
        return cls(load_model(path, dtype, device), load_tokenizer(path), path)

    def record(self) -> dict[str, Any]:
        """What belongs into the record of an evaluation."""
        return {
            "name": "fast",
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            "attention": self.model.config._attn_implementation,
            "shares_prefixes": self.no_sharing is None,
            **({"why_not": self.no_sharing} if self.no_sharing else {}),
        }

    # The parts of lm-eval's interface that describe the model and its tokenizer

    @property
    def max_length(self) -> int:
        return getattr(self.model.config, "max_position_embeddings", None) or 2048

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        if self.tokenizer.bos_token_id is not None:
            return self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    @property
    def has_chat_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of `string`; None leaves special tokens to the tokenizer, unless the text begins with one."""
        bos = self.tokenizer.bos_token
        if add_special_tokens is None and bos and string.startswith(bos):
            add_special_tokens = False
        return list(self._encode(string, add_special_tokens))

    def _encode_uncached(self, string: str, add_special_tokens: bool | None) -> tuple[int, ...]:
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return tuple(self.tokenizer(string, verbose=False, **options)["input_ids"])

    # Likelihoods

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Each text's total log-likelihood; a text longer than the context is cut into windows without overlap."""
        windows: list[tuple[tuple[str, str], list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                context, continuation = make_disjoint_window(window)
                windows.append((("", ""), list(context), list(continuation)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        return totals

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For each (_, context tokens, continuation tokens): (log-likelihood, is it the greedy continuation)."""
        sequences, targets = [], []
        for _, context, continuation in requests:
            if not continuation:
                raise KickError("a request with an empty continuation.", "There is nothing to score.")
            sequences.append((context + continuation)[-(self.max_length + 1) :][:-1])
            targets.append(continuation[-self.max_length :])
        results: dict[int, tuple[float, bool]] = {}
        if self.no_sharing is not None:
            order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
            for start in range(0, len(order), PLAIN_ROWS):
                results |= self._score_rows(sequences, targets, order[start : start + PLAIN_ROWS])
        else:
            unscored = [len(sequence) - len(target) for sequence, target in zip(sequences, targets, strict=True)]
            for length, members in clusters(sequences, unscored):
                results |= self._score_cluster(sequences, targets, members, length)
        return [results[index] for index in range(len(requests))]

    def _score_cluster(
        self, sequences: list[list[int]], targets: list[list[int]], members: list[int], length: int
    ) -> dict[int, tuple[float, bool]]:
        """Requests that begin with the same `length` tokens: these once, then the rest in packed rows."""
        prefix = self._keys_and_values(tuple(sequences[members[0]][:length])) if length else None
        rests = [sequence[length:] for sequence in sequences]
        results = {}
        for row in pack(rests, members, PACKED_TOKENS):
            # the last len(target) tokens of each path predict the target
            places = [row.paths[index][-len(targets[index]) :] for index in row.paths]
            flat = [place for path in places for place in path]
            logits = self._forward_packed(row, prefix, length, flat)
            wanted = torch.tensor([token for index in row.paths for token in targets[index]], device=logits.device)
            values, greedy = score_tokens(logits, wanted)
            start = 0
            for index in row.paths:
                end = start + len(targets[index])
                results[index] = (float(values[start:end].sum()), bool(greedy[start:end].all()))
                start = end
        return results

    def _forward_packed(self, row: Packed, prefix: DynamicCache | None, length: int, places: list[int]) -> Tensor:
        """Logits [len(places), vocabulary] of a packed row after a prefix of `length` tokens."""
        seen = torch.from_numpy(row.attends(length)).to(self.device)
        mask = torch.zeros(seen.shape, dtype=self.model.dtype, device=self.device)
        mask.masked_fill_(~seen, torch.finfo(self.model.dtype).min)
        with attention.visible_prefix(length):
            output = self.model(
                input_ids=torch.tensor([row.tokens], device=self.device),
                position_ids=torch.tensor([row.depth], device=self.device) + length,
                attention_mask=mask[None, None],
                past_key_values=fork(prefix) if prefix is not None else None,
                use_cache=prefix is not None,
                logits_to_keep=torch.tensor(places, device=self.device),
            )
        return output.logits[0]

    def _keys_and_values(self, tokens: tuple[int, ...]) -> DynamicCache:
        """The cache after `tokens`; the last one asked for is kept."""
        if self._prefix is None or self._prefix[0] != tokens:
            self._prefix = None  # freed before the next one is made
            cache = DynamicCache()
            self.model(
                input_ids=torch.tensor([tokens], device=self.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            self._prefix = (tokens, cache)
        return self._prefix[1]

    def _score_rows(
        self, sequences: list[list[int]], targets: list[list[int]], members: list[int]
    ) -> dict[int, tuple[float, bool]]:
        """Without any sharing: one padded row a request."""
        longest = max(len(sequences[index]) for index in members)
        tokens = torch.full((len(members), longest), self.eot_token_id)
        mask = torch.zeros_like(tokens)
        for row, index in enumerate(members):
            tokens[row, : len(sequences[index])] = torch.tensor(sequences[index])
            mask[row, : len(sequences[index])] = 1
        first = min(len(sequences[index]) - len(targets[index]) for index in members)
        kept = torch.arange(first, longest, device=self.device)
        logits = self.model(
            input_ids=tokens.to(self.device), attention_mask=mask.to(self.device), use_cache=False, logits_to_keep=kept
        ).logits
        results = {}
        for row, index in enumerate(members):
            end = len(sequences[index]) - first
            wanted = torch.tensor(targets[index], device=self.device)
            values, greedy = score_tokens(logits[row, end - len(wanted) : end], wanted)
            results[index] = (float(values.sum()), bool(greedy.all()))
        return results

    @torch.inference_mode()
    def next_token_logprobs(self, text: str) -> Tensor:
        """Log-probabilities [tokens, vocabulary] (float32) at each token of `text`, the first after a prefix token."""
        tokens = [self.prefix_token_id, *self.tok_encode(text, add_special_tokens=False)]
        if len(tokens) - 1 > self.max_length:
            raise KickError(f"a text of {len(tokens) - 1} tokens in a context of {self.max_length}.", "Cut it smaller.")
        logits = self.model(input_ids=torch.tensor([tokens[:-1]], device=self.device), use_cache=False).logits[0]
        return logits.float().log_softmax(dim=-1)

    # Generation

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Completions. `until` strings end a row and are not part of it."""
        contexts = [self.tok_encode(request.args[0]) for request in requests]
        by_decoding: dict[Decoding, list[int]] = {}
        for index, request in enumerate(requests):
            by_decoding.setdefault(Decoding.of(dict(request.args[1])), []).append(index)
        results: dict[int, str] = {}
        for decoding, members in by_decoding.items():
            own = [self._cut(contexts[index], decoding) for index in members]
            order = sorted(range(len(own)), key=lambda index: tuple(own[index]))  # what begins alike comes together
            lengths = [len(context) + decoding.most for context in own]
            rngs = random_numbers(own, decoding.seed)
            work = partial(self._generate_some, own, decoding, rngs)
            for batch in batches_within(lengths, order, self._most_cached_tokens()):
                results |= {members[row]: text for row, text in zip(batch, self._halving(batch, work), strict=True)}
        return [results[index] for index in range(len(requests))]

    def _cut(self, context: list[int], decoding: Decoding) -> list[int]:
        room = self.max_length - decoding.most
        if room < 1:
            raise KickError(
                f"{decoding.most} new tokens do not fit a context of {self.max_length}.", "Ask for fewer new tokens."
            )
        return context[-room:]

    @torch.inference_mode()
    def _generate_some(
        self, contexts: list[list[int]], decoding: Decoding, rngs: list[Any], chosen: list[int]
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
                cache = fork(self._keys_and_values(tuple(contexts[0][:length])))
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
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.halved += 1
        half = len(rows) // 2
        return [*self._halving(rows[:half], work), *self._halving(rows[half:], work)]

    # May prefixes be shared at all?

    @torch.inference_mode()
    def _why_no_sharing(self) -> str | None:
        """None if packed rows after a kept prefix give the same scores as whole rows; else the reason, in words."""
        self.no_sharing = None
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        tokens = [(7 * place + 3) % vocabulary for place in range(24)]
        sequences = [tokens[:20], [*tokens[:18], tokens[22], tokens[23]], tokens[:19]]
        targets = [sequence[-3:] for sequence in sequences]
        alone: dict[int, tuple[float, bool]] = {}
        for index in range(len(sequences)):
            alone |= self._score_rows(sequences, targets, [index])
        try:
            cache = DynamicCache(config=self.model.config)
            self.model(input_ids=torch.tensor([tokens[:16]], device=self.device), past_key_values=cache, use_cache=True)
            self._bytes_per_cached_token = _cached_bytes(cache) // 16 or 1
            kinds = {type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer}
            if kinds:
                return f"its cache has layers of kind {', '.join(sorted(kinds))}"
            (row,) = pack([sequence[16:] for sequence in sequences], range(len(sequences)), PACKED_TOKENS)
            for index, path in row.paths.items():
                logits = self._forward_packed(row, cache, 16, path[-3:])
                values, _ = score_tokens(logits, torch.tensor(targets[index], device=self.device))
                difference = abs(float(values.sum()) - alone[index][0])
                if not difference <= _AGREEMENT.get(self.model.dtype, 0.25):
                    return f"packed rows differ by {difference:.2g} from whole ones"
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
            return f"its attention does not take packed rows ({type(error).__name__}: {str(error)[:120]})"
        return None


def score_tokens(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logits [p, vocabulary], targets [p] -> float32 log-probabilities [p], and [p] whether each is the likeliest."""
    logits = logits.float()
    chosen = logits.gather(1, targets[:, None])[:, 0]
    return chosen - logits.logsumexp(dim=1), logits.argmax(dim=1) == targets


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
