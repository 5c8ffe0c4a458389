"""The default LM: transformers models behind lm-eval's interface, with what requests share computed once.

Likelihoods are the work of scorer.py, generation that of decoder.py; probe.py finds out what the model can do.

What a call computes depends on that call's requests alone (a kept prefix gives the same numbers as a recomputed one),
and on `row_tokens` and the number of threads, which the record names: an interrupted evaluation that asks the same
batches again gets the same answers.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from kick.errors import KickError
from kick.lm import memory, probe
from kick.lm.base import Scored, TokenLM, context_length
from kick.lm.decoder import Decoder
from kick.lm.generation import Decoding, batches_within, row_seeds
from kick.lm.lanes import lane_count
from kick.lm.runner import Runner
from kick.lm.scorer import Scorer
from kick.loading import load_model, load_tokenizer
from kick.meter import computes_on
from kick.spec import Spec

_PADDED_AT_ONCE = 5  # rows' tokens of each lane, of prompts that are read in one padded batch: half of what is free


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
        self.model: Any = model.eval()  # dropout would answer the same question differently each time
        self.path = path
        self._device = model.device
        self.runner = Runner(model, (params or self.Params()).row_tokens)
        probe.check_looks_back(self.runner)
        self._alike = probe.rotary_limit(model.config) or self.max_length
        self.scorer = Scorer(self.runner)
        sharing = probe.find_sharing(self.scorer)
        self.no_sharing, self.finite = sharing.why_not, sharing.finite
        self.decoder = Decoder(self.runner, tokenizer, sharing.like, self._end_tokens(), self._alike)
        if self.no_sharing is None:
            self.decoder.shares = probe.can_share_in_decoding(self.decoder, self.max_length)
        else:
            self.runner.keeps_cache = probe.can_go_on(self.decoder)
            self.runner.takes_pieces = self.runner.keeps_cache and probe.takes_pieces(self.runner)

    @classmethod
    def from_checkpoint(cls, path: Path, params: Params, dtype: str, device: str, setting: str = "") -> "FastLM":
        del setting
        return cls(load_model(path, dtype, device), load_tokenizer(path), path, params)

    def close(self) -> None:
        del self.model, self.runner, self.scorer, self.decoder
        memory.free_unreferenced(self.device.type)

    def record(self) -> dict[str, Any]:
        return {
            "name": "fast",
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            "computed_on": computes_on(str(self.model.device)),
            "attention": self.model.config._attn_implementation,
            "row_tokens": self.runner.row_tokens,
            "threads": torch.get_num_threads(),
            "shares_prefixes": self.no_sharing is None,
            **({"why_not": self.no_sharing} if self.no_sharing else {}),
            **({"alone_beyond": self._alike} if self._alike < self.max_length else {}),
            **({} if self.runner.keeps_cache else {"generates": "one row at a time"}),
            **({} if self.runner.plain_head else {"logits": "by the model's own head, as it rounds them"}),
            **({"out_of_memory": self.runner.halved} if self.runner.halved else {}),
            **({} if self.finite else {"not_finite": "log-likelihoods of a few tokens"}),
        }

    # Likelihoods

    @torch.inference_mode()
    def score(self, sequences: Sequence[Scored]) -> list[tuple[float, bool]]:
        lengths = [len(sequence.tokens) - 1 for sequence in sequences]
        together = [index for index, length in enumerate(lengths) if length <= self._alike]
        alone = [index for index, length in enumerate(lengths) if length > self._alike]
        if self.no_sharing is None:
            results = self.scorer.in_packed_rows(sequences, together)
        else:
            at_once = 4 * self.runner.row_tokens
            results = self.scorer.in_padded_rows(sequences, together, at_once, self.runner.takes_pieces)
        results |= self.scorer.in_padded_rows(sequences, alone, 1)
        return [results[index] for index in range(len(sequences))]

    @torch.inference_mode()
    def next_token_logprobs(self, text: str) -> Tensor:
        """Log-probabilities [tokens, vocabulary] (float32) at each token of `text`, the first after a prefix token."""
        tokens = [self.prefix_token_id, *self.tok_encode(text, add_special_tokens=False)]
        if len(tokens) - 1 > self.max_length:
            raise KickError(f"a text of {len(tokens) - 1} tokens in a context of {self.max_length}.", "Cut it smaller.")
        found = self.runner.whole(tokens[:-1], range(len(tokens) - 1))
        return self.runner.exact_logits(found).float().log_softmax(dim=-1)

    # Generation

    def complete(self, contexts: Sequence[list[int]], decoding: Decoding) -> list[str]:
        lengths = [len(context) + decoding.most for context in contexts]
        seeds = row_seeds(contexts, decoding.seed)

        def complete(batch: list[int]) -> list[str]:
            packed = self.no_sharing is None and lengths[batch[0]] <= self._alike
            own = [contexts[index] for index in batch], decoding, [seeds[index] for index in batch], packed
            work = partial(self.decoder.complete, *own)
            if len(batch) > 1 or not (packed or self.runner.takes_pieces):
                return work(self.runner.row_tokens)
            return self.runner.by_fewer_tokens(work)

        # what begins alike is together; where nothing is shared, what is padded to the same length
        key = (lambda index: tuple(contexts[index])) if self.no_sharing is None else lengths.__getitem__
        order = sorted(range(len(contexts)), key=key)
        together = [index for index in order if lengths[index] <= self._alike]
        alone = [[index] for index in order if lengths[index] > self._alike]
        results: dict[int, str] = {}
        room = self.runner.most_cached_tokens() if self.runner.keeps_cache else 1
        batches: Iterable[list[int]] = batches_within(lengths, together, room)
        if self.no_sharing is not None:  # all prompts of a batch are read at once
            read = [len(context) for context in contexts]
            at_once = _PADDED_AT_ONCE * lane_count(self.device) * self.runner.row_tokens
            batches = chain.from_iterable(batches_within(read, batch, at_once) for batch in batches)
        for batch in chain(batches, alone):
            results |= dict(zip(batch, self.runner.halving(batch, complete), strict=True))
        return [results[index] for index in range(len(contexts))]

    def _end_tokens(self) -> set[int]:
        configured = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ids = configured if isinstance(configured, list) else [configured]
        return {token for token in (*ids, self.eot_token_id) if token is not None}
