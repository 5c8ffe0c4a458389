"""What can a model do? Found out by asking it a few tokens in two ways, once it is loaded.

No list of architectures: what gives the same numbers is used, and where it does not, the reason is put in words.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from kick.errors import ModelError
from kick.lm import attention, memory
from kick.lm.base import Scored
from kick.lm.decoder import Decoder
from kick.lm.packing import PREFIX_STEP, Packed, pack
from kick.lm.rows import RereadRow
from kick.lm.runner import Runner
from kick.lm.scorer import Score, Scorer

_AGREEMENT = {torch.float32: 1e-3, torch.float64: 1e-6}  # of log-likelihoods, computed in two ways
_HALF_DIVERGENCE = 0.05  # nats between next-token distributions, computed in two ways in half precision
_TOKENS = ((7, 15), (11, 40), (13, 40))  # step, length: a stem and two rests that stand far from each other in a row
_NOT_SUPPORTED = (TypeError, ValueError, RuntimeError, IndexError, AttributeError)  # what a model raises that can't


@dataclass
class Sharing:
    """Whether sequences may share what they begin with, and what was seen on the way.

    why_not: None if packed rows after a kept prefix give the scores of whole rows; else the reason, in words. finite:
    whether scores are numbers. like: a cache of some tokens, as the model fills it; empty where it fills none.
    """

    why_not: str | None = None
    finite: bool = True
    like: DynamicCache = field(default_factory=DynamicCache)


@torch.inference_mode()
def check_looks_back(runner: Runner) -> None:
    """Raise ModelError where a token changes what is said of those before it: then likelihoods mean nothing."""
    vocabulary = _vocabulary(runner)
    tokens = [(9 * place + 4) % vocabulary for place in range(6)]
    lasts = (tokens[-1], (tokens[-1] + 1) % vocabulary)
    said = [runner.logits(runner.whole([*tokens[:-1], last], range(5))) for last in lasts]
    if all(bool(logits.isfinite().all()) for logits in said) and not _agree(runner.model.dtype, *said):
        raise ModelError(
            f"a {runner.model.config.model_type} model looks at the tokens after a place, too.",
            "kick asks causal language models, which see what comes before a token alone.",
        )


@torch.inference_mode()
def find_sharing(scorer: Scorer) -> Sharing:
    """Score a few sequences that begin alike in padded rows and in packed ones."""
    runner, found = scorer.runner, Sharing()
    if window := getattr(runner.model.config, "window_size", None):
        return Sharing(f"its attention has a window of {window} tokens in memory")
    stem, *rests = ([(step * place + 3) % _vocabulary(runner) for place in range(n)] for step, n in _TOKENS)
    sequences = [Scored(stem + rest, 3) for rest in (*rests, rests[0][:4])]
    alone = scorer.in_padded_rows(sequences, range(len(sequences)), 1)
    found.finite = all(math.isfinite(score) for score, _ in alone.values())
    try:
        cache = DynamicCache(config=runner.model.config)
        runner.model(input_ids=torch.tensor([stem], device=runner.device), past_key_values=cache, use_cache=True)
        found.like = cache
        runner.measure(cache, len(stem))
        kinds = {type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer}
        if kinds:
            found.why_not = f"its cache has layers of kind {', '.join(sorted(kinds))}"
        elif cache.get_seq_length() != len(stem):
            found.why_not = "it keeps no keys and values of what it read"
        elif found.finite:  # else there is nothing to compare, and nothing to get wrong
            found.why_not = _why_unlike(scorer, sequences, len(stem), alone)
    except _NOT_SUPPORTED as error:
        if memory.is_out_of_memory(error):
            raise
        found.why_not = f"its attention does not take packed rows ({type(error).__name__}: {str(error)[:120]})"
    return found


def _why_unlike(scorer: Scorer, sequences: Sequence[Scored], shared: int, alone: dict[int, Score]) -> str | None:
    """In words, where sequences in packed rows after their first `shared` tokens score unlike whole ones, `alone`."""
    rests = [sequence.tokens[shared:-1] for sequence in sequences]
    members = range(len(sequences))

    def apart(rows: list[Packed]) -> float:
        found = [scorer.in_a_row(sequences, row, (shared,), scorer.runner.row_tokens) for row in rows]
        return max(abs(row[index][0] - alone[index][0]) for row in found for index in row)

    difference = apart(pack(rests, members, sum(map(len, rests))))
    allowed = _AGREEMENT.get(scorer.runner.model.dtype)
    if allowed is None:  # half precision rounds differently in each model: the measure is what a cache changes
        if not _goes_on(scorer.runner, sequences[0].tokens, shared):
            return "what follows kept keys and values is not what follows the tokens themselves"
        longest = max(map(len, rests))
        allowed = max(0.02, 4 * apart([own for index in members for own in pack(rests, [index], longest)]))
    return None if difference <= allowed else f"packed rows differ by {difference:.2g} from whole ones"


def _goes_on(runner: Runner, tokens: list[int], shared: int) -> bool:
    """Whether one row after the keys and values of its first `shared` tokens gives the distributions of a whole row.

    In half precision, on average over its places: some move further.
    """
    whole = runner.whole(tokens, range(shared, len(tokens)))
    cache, length = runner.after(tokens, (shared,), runner.row_tokens)
    rest = Packed.chain(tokens[shared:])
    after = runner.run(rest, cache, length, list(range(len(rest.tokens))), runner.row_tokens)
    return bool(_divergence(runner.logits(whole), runner.logits(after)).mean() <= _HALF_DIVERGENCE)


@torch.inference_mode()
def can_share_in_decoding(decoder: Decoder, max_length: int) -> bool:
    """Whether rows decoded after one copy of a shared prefix come out as rows that hold it themselves.

    Sets `decoder.shares` to try both; the caller sets it to what comes out.
    """
    runner = decoder.runner
    if not attention.used_by(runner.model) or max_length < PREFIX_STEP + 4:
        return False
    prefix = [(5 * place + 2) % _vocabulary(runner) for place in range(PREFIX_STEP)]
    found = []
    try:
        for decoder.shares in (False, True):
            rows, _ = decoder.read_packed([[*prefix, 3, 4], [*prefix, 5]], 1, runner.row_tokens)
            found.append(runner.logits(decoder.last(rows.inputs([6, 7]))))
    except _NOT_SUPPORTED as error:
        if memory.is_out_of_memory(error):
            raise
        return False
    return _agree(runner.model.dtype, *found)


@torch.inference_mode()
def can_go_on(decoder: Decoder) -> bool:
    """Whether a padded batch in the model's own cache goes on as each row read whole does.

    Recurrent states may take in padding, and some models keep nothing in a cache that they are given.
    """
    runner = decoder.runner
    contexts = [[(7 * place + 3) % _vocabulary(runner) for place in range(n)] for n in (12, 7)]
    try:
        rows, _ = decoder.read_padded(contexts, 1, runner.row_tokens)
        rows.drop(0)
        after = runner.logits(decoder.last(rows.inputs([5])))
    except _NOT_SUPPORTED as error:
        if memory.is_out_of_memory(error):
            raise
        return False
    whole = runner.logits(decoder.last(RereadRow(contexts[1], runner.device).inputs([5])))
    return _agree(runner.model.dtype, after, whole)


@torch.inference_mode()
def takes_pieces(runner: Runner) -> bool:
    """Whether a row that is read a few tokens at a time gives what it gives when it is read at once.

    Some recurrent states begin anew wherever several tokens come at a time.
    """
    tokens = [(7 * place + 3) % _vocabulary(runner) for place in range(12)]
    places = list(range(len(tokens)))
    whole = runner.logits(runner.whole(tokens, places))
    try:
        cache = DynamicCache(config=runner.model.config)
        read = runner.logits(runner.by_pieces(tokens, cache, places, 5))
    except _NOT_SUPPORTED as error:
        if memory.is_out_of_memory(error):
            raise
        return False
    return _agree(runner.model.dtype, whole, read)


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


def _agree(dtype: torch.dtype, first: Tensor, second: Tensor) -> bool:
    """Whether logits [rows, vocabulary] of a model of `dtype` give the same distributions, but for rounding.

    In half precision the unlikeliest tokens move by half a nat and mean nothing: there it is the divergence that
    counts. A place that is off by one gives ten times as much as is allowed.
    """
    allowed = _AGREEMENT.get(dtype)
    if allowed is not None:
        return bool((first.log_softmax(-1) - second.log_softmax(-1)).abs().max() <= allowed)
    return bool(_divergence(first, second).max() <= _HALF_DIVERGENCE)


def _divergence(first: Tensor, second: Tensor) -> Tensor:
    """Of the distributions by the first logits from those by the second, in nats [rows]."""
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    return (q.exp() * (q - p)).sum(-1)


def _vocabulary(runner: Runner) -> int:
    return runner.model.get_input_embeddings().weight.shape[0]
