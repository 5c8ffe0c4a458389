"""What all LMs have in common: lm-eval's interface in terms of tokens.

An LM tokenises by the model's own tokenizer and answers two things: `score`, the log-likelihood of the last tokens of a
sequence, and `complete`, what follows a context. A text is tokenised once, also when many models of one tokenizer are
asked the same.
"""

import hashlib
import itertools
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from kick.errors import KickError, ModelError
from kick.lm.generation import Decoding
from kick.lm.memory import total_bytes
from kick.lm.packing import common_length

_REMEMBERED_SHARE = 0.02  # of all memory, for tokens of four bytes each: MMLU with five examples takes some 400 MB
_TOKENISED_AT_ONCE = 2_000  # texts: what a tokenizer knows of each takes many times its tokens
_CONTEXT_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length")


class Scored(NamedTuple):
    """The last `n_targets` of `tokens` are scored, each given all before it; 0 < n_targets < len(tokens)."""

    tokens: list[int]
    n_targets: int


class TokenLM(TemplateLM):
    """A causal language model behind lm-eval's LM interface. A subclass gives `score` and `complete`."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._max_length = max_length
        self._encoder = Encoder(tokenizer)

    @classmethod
    def check(cls, params: Any, settings: Iterable[str]) -> dict[str, str]:
        """Raise ConfigError for what can be seen to be wrong before a model is loaded. settings: their names.

        What decides answers besides kick and its own interpreter: versions of engines.
        """
        del params, settings
        return {}

    @classmethod
    def leaves_room_for_another(cls, params: Any, device: str) -> bool:
        """Whether two such LMs, of two models, can stand on one device at a time."""
        del params, device
        return True

    @classmethod
    def gpus(cls, params: Any) -> int:
        """How many GPUs one model spreads over."""
        del params
        return 1

    @abstractmethod
    def score(self, sequences: Sequence[Scored]) -> list[tuple[float, bool]]:
        """For each: (natural-log likelihood of its scored tokens, whether each of them is the likeliest)."""

    @abstractmethod
    def complete(self, contexts: Sequence[list[int]], decoding: Decoding) -> list[str]:
        """For each context: what follows, up to the first stop string, which is not part of it."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What belongs into the record of an evaluation: name, dtype, device, what was fallen back to."""

    def close(self) -> None:
        """Give back what the LM holds. It is not asked afterwards."""

    # The model and its tokenizer

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands in front of a text that follows nothing. Raises ModelError where there is no such token."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise ModelError(
            f"the tokenizer of {self.tokenizer.name_or_path} has no token for the beginning or the end of a text.",
            "Name one in its tokenizer_config.json: bos_token or eos_token.",
        )

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
        return self._encoder([(string, add_special_tokens)])[0]

    def _text(self, tokens: list[int]) -> str:
        """What was generated, without special tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    # Requests

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As lm-eval has it: spaces that end a context belong to the continuation; an empty one is a prefix token.

        Where lm-eval is left without a token to score, since text and context melt into one token ("The riv", "er"),
        the tokens that only the whole text has are scored.
        """
        pairs = []
        for context, continuation in (request.args for request in requests):
            kept = context.rstrip()
            pairs.append((kept, context[len(kept) :] + continuation))
        wholes = self._encoder([(context + more, None if context else False) for context, more in pairs])
        contexts = self._encoder([(context, None) if context else ("", False) for context, _ in pairs])
        asked = []
        for pair, context, whole in zip(pairs, contexts, wholes, strict=True):
            if pair[0] and len(whole) <= len(context) and pair[1]:  # it melted into the last tokens of the context
                known = min(common_length(context, whole), len(whole) - 1)
                asked.append((pair, whole[:known] or [self.prefix_token_id], whole[known:]))
            elif pair[0]:
                asked.append((pair, context, whole[len(context) :]))
            elif whole[:1] == [self.prefix_token_id]:
                asked.append((pair, whole[:1], whole[1:]))
            else:
                asked.append((pair, [self.prefix_token_id], whole))
        return self._loglikelihood_tokens(asked)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For each (_, context tokens, continuation tokens); contexts lose their beginning where they are too long."""
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise KickError(
                f"a continuation of {longest} tokens in a context of {self.max_length}.",
                "Score whole texts by windows (loglikelihood_rolling), or ask a model with a longer context.",
            )
        sequences = [
            Scored(((context or [self.prefix_token_id]) + continuation)[-(self.max_length + 1) :], len(continuation))
            for _, context, continuation in requests
        ]
        asked = [index for index, sequence in enumerate(sequences) if sequence.n_targets]
        results = [(0.0, True)] * len(sequences)  # nothing is certain to follow
        for index, result in zip(asked, self.score([sequences[index] for index in asked]), strict=True):
            results[index] = result
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Each text's total log-likelihood; a text longer than the context is cut into windows without overlap."""
        windows: list[tuple[tuple[str, str], list[int], list[int]]] = []
        owners: list[int] = []
        for owner, tokens in enumerate(self._encoder([(request.args[0], False) for request in requests])):
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                context, continuation = make_disjoint_window(window)
                windows.append((("", ""), list(context), list(continuation)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Completions. `until` strings end a row and are not part of it."""
        contexts = self._encoder([(request.args[0], None) for request in requests])
        by_decoding: dict[Decoding, list[int]] = {}
        for index, request in enumerate(requests):
            by_decoding.setdefault(Decoding.of(dict(request.args[1])), []).append(index)
        results = [""] * len(requests)
        for decoding, members in by_decoding.items():
            if decoding.most < 1:
                continue
            room = self.max_length - decoding.most
            if room < 1:
                raise KickError(
                    f"{decoding.most} new tokens do not fit a context of {self.max_length}.",
                    "Ask for fewer new tokens.",
                )
            own = [contexts[index][-room:] or [self.prefix_token_id] for index in members]
            texts = self.complete(own, decoding)
            for index, text in zip(members, texts, strict=True):
                results[index] = text
        return results


def context_length(config: Any) -> int:
    """Tokens, by the configuration of a model; that of a model of several kinds of input is in a part of its own."""
    own = config.get_text_config()
    named = (getattr(own, name, None) for name in _CONTEXT_LENGTHS)
    return next((length for length in named if isinstance(length, int)), 2048)


def room_of_engine(context: int) -> int:
    """What can be asked of an engine's context, in tokens: a sequence takes one more than what the model reads, and
    engines always generate one."""
    return context - 2


def _appended(tokenizer: Any) -> int:
    """How many special tokens a tokenizer puts after a text."""
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    if not plain:  # it knows no "a"
        return 0
    start = next((place for place in range(len(whole)) if whole[place : place + len(plain)] == plain), len(whole))
    return max(0, len(whole) - start - len(plain))


class Encoder:
    """Text to token ids, remembered: a prompt is met once an option, a question once a setting."""

    _remembered: ClassVar[OrderedDict[tuple[str, str, bool | None], np.ndarray]] = OrderedDict()
    _held = 0  # tokens, and what texts take as many bytes as
    _numbers = itertools.count()

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        identity = backend.to_str() if backend is not None else f"tokenizer {next(self._numbers)} of this process"
        self._key = hashlib.sha256(f"{tokenizer.bos_token} {identity}".encode()).hexdigest()
        self._at_end = _appended(tokenizer)

    def __call__(self, texts: Sequence[tuple[str, bool | None]]) -> list[list[int]]:
        """Token ids of each (text, with special tokens?); None: as the tokenizer begins a text, unless this one does.

        What a tokenizer puts at the end of a text would stand between a context and what follows it, and is left out.
        """
        bos = self.tokenizer.bos_token
        asked = [(t, False if special is None and bos and t.startswith(bos) else special) for t, special in texts]
        known = {key: ids for key in asked if (ids := self._recall(key)) is not None}
        for special in (None, True, False):
            new = list(dict.fromkeys(key for key in asked if key[1] is special and key not in known))
            if new:
                options = {} if special is None else {"add_special_tokens": special}
                found: list[list[int]] = []
                for start in range(0, len(new), _TOKENISED_AT_ONCE):
                    texts_of = [text for text, _ in new[start : start + _TOKENISED_AT_ONCE]]
                    found += self.tokenizer(texts_of, verbose=False, **options)["input_ids"]
                if special is not False and self._at_end:
                    found = [own[: -self._at_end] for own in found]
                known |= {key: np.array(own, dtype=np.int32) for key, own in zip(new, found, strict=True)}
                self._remember({key: known[key] for key in new})
        lists = {key: ids.tolist() for key, ids in known.items()}  # one for all requests of a text
        return [lists[key] for key in asked]

    def _recall(self, key: tuple[str, bool | None]) -> np.ndarray | None:
        found = self._remembered.get((self._key, *key))
        if found is not None:
            self._remembered.move_to_end((self._key, *key))
        return found

    def _remember(self, new: dict[tuple[str, bool | None], np.ndarray]) -> None:
        for key, ids in new.items():
            self._remembered[(self._key, *key)] = ids
            Encoder._held += ids.size + len(key[0]) // 4
        most = _REMEMBERED_SHARE * total_bytes(torch.device("cpu")) / 4
        while Encoder._held > most:
            (_, text, _), ids = self._remembered.popitem(last=False)
            Encoder._held -= ids.size + len(text) // 4
