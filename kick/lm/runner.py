"""Forward passes of one model, as memory allows: packed rows after a kept prefix, and logits where they count.

What "the head gets" is what logits are made of: hidden states where the model's head is one linear, with or without a
scale or a cap behind it, which then runs on a few positions at a time; else the logits themselves.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from kick.lm import attention, memory
from kick.lm.packing import Packed

_QUERIES_AT_ONCE = 256  # of a packed row: more see more keys that few of them need, fewer fill the units worse
LOGITS_AT_ONCE = 128  # positions whose logits are in memory at a time
_WORDS_AT_ONCE = 16_384  # of the vocabulary, whose rows of the head are in memory in float32 at a time
_LIKELIEST = 16  # tokens of a position whose logits are computed exactly in half precision


class Runner:
    """Runs `model`; remembers the keys and values of the beginnings that it was asked for last.

    row_tokens: computed at once, by default what memory allows.

    What probe.py finds out of a model without packed rows is set afterwards: `keeps_cache`, whether it goes on from its
    own kind of cache, several rows at a time; `takes_pieces`, whether it also does by several tokens at a time.
    """

    def __init__(self, model: Any, row_tokens: int | None = None) -> None:
        self.model = model
        self.device = model.device
        self.row_tokens = row_tokens or memory.row_tokens(model)
        self.bytes_per_token = memory.key_value_bytes(model)  # of its cache
        self.halved = 0  # how often rows or a batch did not fit into memory
        attention.use(model)
        self.keeps_cache = True
        self.takes_pieces = False
        self._prefixes: list[tuple[list[int], int, DynamicCache]] = []  # each continues the one before
        self._behind_head = self._find_behind_head()
        self.plain_head = self._behind_head is not None

    # Memory

    def lanes(self, prefixes: Sequence[int], rows: Sequence[Packed]) -> int:
        """How many of the rows after a prefix memory allows at a time.

        Each holds a copy of the prefix's keys and values and, read in pieces, its own; and what a piece sees of them.
        """
        longest = max(len(row.tokens) for row in rows)
        held = max(prefixes, default=0) + (longest if longest > self.row_tokens else 0)
        mask = min(longest, self.row_tokens) * (1 + self.model.dtype.itemsize)
        return memory.lanes_beside(self.model, held * (self.bytes_per_token + mask))

    def measure(self, cache: DynamicCache, tokens: int) -> None:
        """What a token takes in a cache, as this one of `tokens` shows."""
        self.bytes_per_token = cached_bytes(cache) // tokens or self.bytes_per_token

    def most_cached_tokens(self) -> int:
        """How many tokens' keys and values a generation batch of several rows may hold, or the kept prefixes."""
        return memory.most_cached_tokens(self.model, self.bytes_per_token)

    def halving(self, rows: list[int], work: Callable[[list[int]], list[Any]]) -> list[Any]:
        """`work(rows)`; where memory runs out, both halves one after the other."""
        found = memory.none_if_out_of_memory(partial(work, rows)) if len(rows) > 1 else work(rows)
        if found is not None:
            return found
        self.note_out_of_memory()
        half = len(rows) // 2
        return [*self.halving(rows[:half], work), *self.halving(rows[half:], work)]

    def by_fewer_tokens(self, work: Callable[[int], list[Any]]) -> list[Any]:
        """`work(row_tokens)`; where memory runs out, with half as many, and so on."""
        most = self.row_tokens
        while most >= 2 * memory.FEWEST_ROW_TOKENS:
            found = memory.none_if_out_of_memory(partial(work, most))
            if found is not None:
                return found
            self.note_out_of_memory()
            most //= 2
        return work(most)

    def note_out_of_memory(self) -> None:
        self.halved += 1
        self.forget()

    def forget(self) -> None:
        """Free the kept prefixes, and what a failed attempt left behind."""
        self._prefixes.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # What is kept

    def keys_and_values(self, tokens: Sequence[int], prefixes: Sequence[int], most: int) -> DynamicCache:
        """The cache after the longest of `prefixes`, lengths of beginnings of `tokens` that continue each other.

        To be read only. The last ones asked for are kept, each as computed in pieces of `most` tokens from the one
        before it in `prefixes`, and from no other: so that what comes out does not depend on what was asked earlier, to
        the last bit.
        """
        for depth, length in enumerate(prefixes):
            wanted = list(tokens[:length])
            if depth < len(self._prefixes) and self._prefixes[depth][:2] == (wanted, most):
                continue
            del self._prefixes[depth:]
            known, _, cache = self._prefixes[-1] if self._prefixes else ([], most, DynamicCache())
            cache = fork(cache)
            self.run(Packed.chain(wanted[len(known) :]), cache, len(known), [], most)
            self._prefixes.append((wanted, most, cache))
        return self._prefixes[len(prefixes) - 1][2]

    def prepare(self, tokens: Sequence[int], prefixes: Sequence[int], most: int) -> bool:
        """Compute what rows begin with, by all threads: in their lanes they find it. True, and no reference to it."""
        if prefixes:
            self.keys_and_values(tokens, prefixes, most)
        return True

    def after(self, tokens: Sequence[int], prefixes: Sequence[int], most: int) -> tuple[DynamicCache | None, int]:
        """A cache after the longest of `prefixes` of `tokens`, which may grow, and its length; None after none."""
        if not prefixes:
            return None, 0
        return fork(self.keys_and_values(tokens, prefixes, most)), prefixes[-1]

    # Forward passes

    def run(self, row: Packed, cache: DynamicCache | None, length: int, places: list[int], most: int) -> Tensor:
        """A row after the `length` tokens in `cache`, which grows by it; a chain of more than `most` tokens in pieces.

        What the head gets at `places` of the row, in any order and with any of them twice: [p, d] or [p, vocabulary].
        """
        if len(row.tokens) > most and cache is None:
            cache = DynamicCache()
        distinct, back = torch.tensor(places, dtype=torch.long, device=self.device).unique(return_inverse=True)
        found = []
        for start, piece in row.pieces(most):
            columns = distinct[(distinct >= start) & (distinct < start + len(piece.tokens))] - start
            with attention.packed_row(attention.PackedRow(length + start, piece.chunks(_QUERIES_AT_ONCE))):
                found.append(self.at(self._inputs(piece, cache, length + start), torch.zeros_like(columns), columns))
        whole = torch.cat(found)
        return whole if len(distinct) == len(places) and places == sorted(places) else whole[back]

    def _inputs(self, row: Packed, cache: DynamicCache | None, length: int) -> dict[str, Any]:
        mask = None
        if length or not row.is_chain:
            mask = mask_of(row, length, self.model.dtype, self.device)[None, None]
        return {
            "input_ids": torch.tensor([row.tokens], device=self.device),
            "position_ids": torch.tensor([row.depth], device=self.device) + length,
            "attention_mask": mask,
            "past_key_values": cache,
            "use_cache": cache is not None,
        }

    def whole(self, tokens: Sequence[int], columns: Sequence[int]) -> Tensor:
        """What the head gets at `columns` of one row by itself, read at once and into no cache."""
        inputs = {"input_ids": torch.tensor([list(tokens)], device=self.device), "use_cache": False}
        places = torch.tensor(columns, dtype=torch.long, device=self.device)
        return self.at(inputs, torch.zeros_like(places), places)

    def by_pieces(self, tokens: Sequence[int], cache: DynamicCache, places: list[int], most: int) -> Tensor:
        """A whole row into the model's own kind of `cache`, `most` tokens at a time: what the head gets at `places`."""
        distinct, back = torch.tensor(places, dtype=torch.long, device=self.device).unique(return_inverse=True)
        found = []
        for start in range(0, len(tokens), most):
            piece = torch.tensor([tokens[start : start + most]], device=self.device)
            end = start + piece.shape[1]
            columns = distinct[(distinct >= start) & (distinct < end)] - start
            inputs = {
                "input_ids": piece,
                "attention_mask": torch.ones((1, end), dtype=torch.long, device=self.device),
                "position_ids": torch.arange(start, end, device=self.device)[None],
                "past_key_values": cache,
                "use_cache": True,
            }
            found.append(self.at(inputs, torch.zeros_like(columns), columns))
        return torch.cat(found)[back]

    def padded(self, rows: Sequence[Sequence[int]], left: bool) -> tuple[Tensor, Tensor]:
        """Tokens [rows, longest] and their mask, padded at one side."""
        longest = max(map(len, rows))
        tokens = torch.zeros((len(rows), longest), dtype=torch.long)  # whatever pads, the mask hides
        mask = torch.zeros_like(tokens)
        for index, row in enumerate(rows):
            place = slice(longest - len(row), longest) if left else slice(0, len(row))
            tokens[index, place] = torch.tensor(row)
            mask[index, place] = 1
        return tokens.to(self.device), mask.to(self.device)

    def at(self, inputs: dict[str, Any], rows: Tensor, columns: Tensor) -> Tensor:
        """What the head gets at place columns [p] of rows [p], when the model is called with `inputs`."""
        if self.plain_head:
            return self._body(**inputs).last_hidden_state[rows, columns]
        kept = columns.unique() if len(columns) else columns.new_zeros(1)
        logits = self.model(**inputs, logits_to_keep=kept).logits
        if logits.shape[1] == len(kept):
            columns = torch.searchsorted(kept, columns.contiguous())  # else the model takes no such wish: all are there
        return logits[rows, columns]

    def logits(self, found: Tensor, targets: Tensor | None = None) -> Tensor:
        """[p, vocabulary] in float32 (or the model's double), from what the head gets.

        In half precision a logit of 20 is rounded to a sixteenth or an eighth, by which options would tie or change
        places: those of the likeliest tokens and of targets [p] are computed again in float32.
        """
        if self._behind_head is None:
            return found if found.dtype == torch.float64 else found.float()
        head = self.model.get_output_embeddings()
        logits = head(found.to(head.weight.dtype))
        if logits.dtype in (torch.float32, torch.float64):
            return self._behind_head(logits)
        ids = logits.topk(min(_LIKELIEST, logits.shape[1]), dim=1).indices
        if targets is not None:
            ids = torch.cat([ids, targets[:, None]], dim=1)
        exact = torch.einsum("pd,pkd->pk", found.float(), head.weight[ids].float())  # [p, k]
        if head.bias is not None:
            exact += head.bias[ids].float()
        return self._behind_head(logits.float().scatter(1, ids, exact))

    def exact_logits(self, found: Tensor) -> Tensor:
        """As `logits`, of the whole vocabulary computed in float32: for what compares whole distributions."""
        if self._behind_head is None or found.dtype in (torch.float32, torch.float64):
            return self.logits(found)
        head = self.model.get_output_embeddings()
        parts = [found.float() @ rows.float().T for rows in head.weight.split(_WORDS_AT_ONCE)]
        logits = torch.cat(parts, dim=1)
        return self._behind_head(logits if head.bias is None else logits + head.bias.float())

    def score(self, found: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """From what the head gets at p places: log-likelihood of targets [p], whether each is the likeliest [p]."""
        pieces = zip(found.split(LOGITS_AT_ONCE), targets.split(LOGITS_AT_ONCE), strict=True)
        scored = [score_tokens(self.logits(own, wanted), wanted) for own, wanted in pieces]
        return torch.cat([values for values, _ in scored]), torch.cat([greedy for _, greedy in scored])

    @property
    def _body(self) -> Any:
        """The model without its head."""
        return getattr(self.model, self.model.base_model_prefix)

    @torch.inference_mode()
    def _find_behind_head(self) -> Callable[[Tensor], Tensor] | None:
        """What becomes of the product of what the body gives and the head: itself, scaled, or capped.

        None where it is something else: then logits are the model's business.
        """
        head = self.model.get_output_embeddings()
        if type(head) is not torch.nn.Linear or head._forward_hooks:
            return None
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        inputs = {"input_ids": torch.arange(8, device=self.device)[None] % vocabulary, "use_cache": False}
        try:
            own = head(self._body(**inputs).last_hidden_state.to(head.weight.dtype))
        except (TypeError, RuntimeError, AttributeError) as error:
            if memory.is_out_of_memory(error):
                raise
            return None
        logits = self.model(**inputs).logits
        ways = _ways_behind_head(self.model.config)
        return next((way for way in ways if torch.equal(way(own).to(logits.dtype), logits)), None)


def mask_of(row: Packed, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive [q, length + q], made where it is used: a token sees what it follows, its ancestors and itself."""
    size = len(row.tokens)
    place, ends = torch.arange(size, device=device), torch.tensor(row.ends(), device=device)
    seen = (place[None, :] <= place[:, None]) & (place[:, None] < ends[None, :])
    mask = torch.zeros((size, length + size), dtype=dtype, device=device)
    mask[:, length:].masked_fill_(~seen, torch.finfo(dtype).min)
    return mask


def _ways_behind_head(config: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    """As the models of transformers have it that name such a number in their configuration."""
    config = config.get_text_config()
    yield lambda logits: logits
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
        yield lambda logits: torch.tanh(logits / cap) * cap
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        yield lambda logits: logits / divisor
    if factor := getattr(config, "logit_scale", None):  # Cohere
        yield lambda logits: logits * factor


def score_tokens(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logits [p, vocabulary], targets [p] -> log-probabilities [p], and [p] whether each is the likeliest."""
    chosen = logits.gather(1, targets[:, None])[:, 0]
    return chosen - logits.logsumexp(dim=1), logits.argmax(dim=1) == targets


def fork(cache: DynamicCache) -> DynamicCache:
    """A cache that can grow without changing `cache`: the tensors are shared, a longer one is a new tensor."""
    grown = copy.copy(cache)
    grown.layers = [copy.copy(layer) for layer in cache.layers]
    return grown


def cached_bytes(cache: DynamicCache) -> int:
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
