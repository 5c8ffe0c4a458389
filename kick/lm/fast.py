"""The default LM: transformers models behind lm-eval's interface, with what requests share computed once.

Likelihoods: the tokens that all requests of a set begin with run once and their keys and values are kept; the rest is
packed into rows without padding (packing.py). Only the positions that are scored reach the vocabulary projection.
Generation: greedy, in batches that shrink as rows end.

What a call computes depends on that call's requests alone (a kept prefix gives the same numbers as a recomputed one),
so an interrupted evaluation that asks the same batches again gets the same answers.
"""

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from kick.errors import KickError
from kick.lm.packing import Packed, clusters, pack, shared_prefix
from kick.models import load_model, load_tokenizer

PACKED_TOKENS = 512
"""Tokens in a row: enough for full speed of the matrix units, few enough that the mask stays small."""

GENERATION_ROWS = 128
PLAIN_ROWS = 8
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
        self._device = model.device
        self._encode = lru_cache(maxsize=_REMEMBERED_TEXTS)(self._encode_uncached)  # a prompt is met once an option
        self._prefix: tuple[tuple[int, ...], DynamicCache] | None = None
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
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
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
        """Greedy completions. `until` strings end a row and are not part of it."""
        contexts = [self.tok_encode(request.args[0]) for request in requests]
        order = sorted(range(len(requests)), key=lambda index: (_options(requests[index]), tuple(contexts[index])))
        results: dict[int, str] = {}
        for start in range(0, len(order), GENERATION_ROWS):
            rows = order[start : start + GENERATION_ROWS]
            while rows:  # rows of one batch have the same options
                options = _options(requests[rows[0]])
                same = [index for index in rows if _options(requests[index]) == options]
                texts = self._generate([contexts[index] for index in same], *options)
                results |= dict(zip(same, texts, strict=True))
                rows = [index for index in rows if index not in results]
        return [results[index] for index in range(len(requests))]

    @torch.inference_mode()
    def _generate(
        self, contexts: list[list[int]], until: tuple[str, ...], max_new_tokens: int, min_new_tokens: int
    ) -> list[str]:
        room = self.max_length - max_new_tokens
        if room < 1:
            raise KickError(
                f"{max_new_tokens} new tokens do not fit a context of {self.max_length}.", "Ask for fewer new tokens."
            )
        contexts = [context[-room:] for context in contexts]
        length = 0
        if self.no_sharing is None and len(contexts) > 1:
            length = shared_prefix(contexts, min(map(len, contexts)) - 1)
        rests = [context[length:] for context in contexts]
        width = max(map(len, rests))
        tokens = torch.full((len(rests), width), self.eot_token_id)
        mask = torch.ones(len(rests), length + width, dtype=torch.long)
        for row, rest in enumerate(rests):  # padded on the left, between the prefix and what follows
            tokens[row, width - len(rest) :] = torch.tensor(rest)
            mask[row, length : length + width - len(rest)] = 0
        mask = mask.to(self.device)
        cache = DynamicCache(config=self.model.config)
        if length:
            cache = fork(self._keys_and_values(tuple(contexts[0][:length])))
            cache.batch_repeat_interleave(len(rests))
        position = (mask.cumsum(dim=1) - 1).clamp(min=0)

        made: list[list[int]] = [[] for _ in contexts]
        texts: list[str] = [""] * len(contexts)
        alive = list(range(len(contexts)))
        inputs, places = tokens.to(self.device), position[:, length:]
        while True:
            logits = self.model(
                input_ids=inputs,
                attention_mask=mask,
                position_ids=places,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            best = logits.argmax(dim=-1)
            going = []
            for row, (index, token) in enumerate(zip(alive, best.tolist(), strict=True)):
                ended, texts[index] = self._extend(made[index], token, until, max_new_tokens, min_new_tokens)
                if not ended:
                    going.append(row)
            if not going:
                return texts
            if len(going) < len(alive):
                keep = torch.tensor(going, device=self.device)
                cache.batch_select_indices(keep)
                mask, places, best = mask[keep], places[keep], best[keep]
                alive = [alive[row] for row in going]
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
            inputs, places = best[:, None], places[:, -1:] + 1

    def _extend(self, made: list[int], token: int, until: tuple[str, ...], limit: int, least: int) -> tuple[bool, str]:
        """Add a token to a completion: (has it ended, its text up to the first stop string)."""
        if token in self._end_tokens() and len(made) >= least:
            return True, self._text(made)
        made.append(token)
        text = self._text(made)
        stops = [place for stop in until if (place := text.find(stop)) >= 0]
        if stops:
            return True, text[: min(stops)]
        return len(made) >= limit, text

    def _end_tokens(self) -> set[int]:
        configured = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ids = configured if isinstance(configured, list) else [configured]
        return {token for token in (*ids, self.eot_token_id) if token is not None}

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

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


def _options(request: Any) -> tuple[tuple[str, ...], int, int]:
    """(stop strings, most and least new tokens) of a request. Raises KickError for anything but greedy decoding."""
    options = dict(request.args[1])
    until = options.get("until") or []
    if options.get("do_sample") or (options.get("temperature") or 0) > 0:
        raise KickError("the LM 'fast' decodes greedily; sampling was asked for.", "Set temperature to 0.")
    stops = tuple([until] if isinstance(until, str) else until)
    return stops, int(options.get("max_gen_toks", 256)), int(options.get("min_new_tokens", 0))
