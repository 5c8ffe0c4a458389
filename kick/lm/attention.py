"""Attention on a CPU where torch's own kernel is slow: packed rows in bfloat16, and single tokens with grouped heads.

torch's fused kernel for CPUs takes 22 ms for 512 queries over 2,560 keys of a 9-head layer, with bfloat16 no less than
with float32; as two plain matrix products for each key head it is 13 ms, since those use the bfloat16 units. Scores and
probabilities are rounded to bfloat16 on the way, as in transformers' own eager attention; the mode is in the record.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "kick"
_FEWEST_QUERIES = 64  # below, the fused kernel is as fast
_SHARED = "_kick_shared"  # what a tensor of keys is told of those before it
_visible = 0


@contextmanager
def visible_prefix(length: int) -> Iterator[None]:
    """While it lasts, every query of a masked call sees the first `length` keys: their mask is not looked at."""
    global _visible
    _visible = length
    try:
        yield
    finally:
        _visible = 0


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """query [b, heads, q, d], key and value [b, key heads, k, d], additive mask [b, 1, q, k] -> [b, q, heads, d].

    By plain products where that is faster and means the same; else torch's fused attention.
    """
    special = [options.get(name) for name in ("softcap", "position_bias", "cache", "s_aux")]
    if query.shape[2] == 1 and not any(each is not None for each in special):
        shared = getattr(key, _SHARED, None)
        if shared is not None:
            return _after_shared(query, key, value, attention_mask, options.get("scaling"), *shared), None
        return _one_token(query, key, value, attention_mask, options.get("scaling")), None
    if (
        attention_mask is None
        or query.shape[0] != 1
        or query.shape[2] < _FEWEST_QUERIES
        or query.dtype != torch.bfloat16
        or attention_mask.dtype == torch.bool
        or any(each is not None for each in special)
    ):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    heads, queries, size = query.shape[1:]
    groups, keys = key.shape[1:3]
    rows = query[0].reshape(groups, heads // groups * queries, size)  # query head i reads key head i // (heads/groups)
    scale = options.get("scaling") or size**-0.5
    mask = attention_mask[0, :, :, _visible:]
    result = torch.empty_like(rows)
    for group in range(groups):
        scores = torch.mm(rows[group] * scale, key[0, group].T)  # [heads of the group * q, k]
        scores.view(-1, queries, keys)[:, :, _visible:] += mask
        torch.mm(scores.softmax(dim=-1), value[0, group], out=result[group])
    return result.view(1, heads, queries, size).transpose(1, 2).contiguous(), None


def _one_token(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """query [b, heads, 1, d] -> [b, 1, heads, d]: the heads that read one key head are its queries.

    transformers would copy keys and values once for each head instead, which is most of the time of a decoding step.
    """
    batch, heads, _, size = query.shape
    grouped = query.view(batch, key.shape[1], heads // key.shape[1], size)
    found = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
    return found.reshape(batch, 1, heads, value.shape[3])


def share(keys: Tensor, shared_keys: Tensor, shared_values: Tensor) -> None:
    """Say that before `keys` [rows, key heads, k, d] stand keys and values [1, key heads, prefix, d] of all rows."""
    setattr(keys, _SHARED, (shared_keys, shared_values))


def _after_shared(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    shared_key: Tensor,
    shared_value: Tensor,
) -> Tensor:
    """As `_one_token`, where all rows begin with the same tokens: their keys and values are there once, for all rows.

    mask [b, 1, 1, k] is about the rows' own keys; shared ones are visible to all.
    """
    batch, heads, _, size = query.shape
    grouped = query.view(batch, key.shape[1], heads // key.shape[1], size) * (scale or size**-0.5)
    own = (grouped @ key.transpose(-1, -2)).float()  # [b, key heads, heads of each, k]
    if mask is not None:
        own = own.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else own + mask
    before = torch.einsum("bgnd,gpd->bgnp", grouped, shared_key[0]).float()
    weights = torch.cat([before, own], dim=-1).softmax(dim=-1).to(value.dtype)
    prefix = before.shape[-1]
    found = torch.einsum("bgnp,gpd->bgnd", weights[..., :prefix], shared_value[0]) + weights[..., prefix:] @ value
    return found.reshape(batch, 1, heads, value.shape[3])


def use(model: Any) -> None:
    """Let `model` attend by this where it runs on a CPU with torch's fused attention."""
    if model.config._attn_implementation == "sdpa" and model.device.type == "cpu":
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def used_by(model: Any) -> bool:
    return model.config._attn_implementation == NAME


def wants_mask(model: Any) -> bool:
    """Whether plain products are used, which know causality from the mask alone."""
    return used_by(model) and model.dtype == torch.bfloat16
