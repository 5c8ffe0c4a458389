"""Attention on a CPU for what this package asks: rows packed after a prefix, and single tokens with grouped heads.

Packed rows: all queries see all of the prefix, and little of the row itself. torch's fused kernel, given both with one
mask, computes every pair of them and reads the mask besides. Here it runs once over the prefix, without a mask, and for
each chunk of the row over the few keys that the chunk can see; the two parts are averaged by the probability mass of
each (the merging step of FlashAttention, arXiv 2205.14135 section 3.1).
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "kick"
_SHARED = "_kick_shared"  # what a tensor of keys is told of those before it
_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""torch's fused kernel, which also gives the logarithm of each query's mass: query, key and value [b, heads, n, d]."""


class PackedRow:
    """What the queries of one row see: the first `prefix` keys, and of the row's own keys those that a mask says.

    chunks: (start, end, before), queries [start, end) see at most each other and the row's own keys `before`.
    """

    def __init__(self, prefix: int, chunks: Iterable[tuple[int, int, Sequence[int]]]) -> None:
        self.prefix = prefix
        self._given = chunks
        self._parts: dict[int, list[tuple[int, int, Tensor, Tensor]]] = {}

    @cached_property
    def _chunks(self) -> list[tuple[int, int, Tensor]]:
        """(start, end, the row's own keys that its queries may see): made when first asked for, on a GPU never."""
        return [(start, end, torch.tensor([*before, *range(start, end)])) for start, end, before in self._given]

    def parts(self, mask: Tensor, repeated: int) -> list[tuple[int, int, Tensor, Tensor]]:
        """For each chunk: start, end, the row's own keys that it may see [k], a mask [1, 1, repeated x q, k] of these.

        mask [1, 1, row, prefix + row]: the same for all layers, so the parts are cached by the number of query heads
        per key head.
        """
        if repeated not in self._parts:
            self._parts[repeated] = [
                (start, end, keys, mask[:, :, start:end, self.prefix + keys].repeat(1, 1, repeated, 1))
                for start, end, keys in self._chunks
            ]
        return self._parts[repeated]


class _Calls(threading.local):
    row: PackedRow | None = None


_calls = _Calls()


@contextmanager
def packed_row(row: PackedRow) -> Iterator[None]:
    """While it lasts, masked calls of this thread are about this row."""
    _calls.row = row
    try:
        yield
    finally:
        _calls.row = None


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """query [b, heads, q, d], key and value [b, key heads, k, d], additive mask [b, 1, q, k] -> [b, q, heads, d].

    In parts where that is faster and means the same; else torch's fused attention.
    """
    special = any(options.get(name) is not None for name in ("softcap", "position_bias", "cache", "s_aux"))
    if query.shape[2] == 1 and not special:
        shared = getattr(key, _SHARED, None)
        if shared is not None:
            return _after_shared(query, key, value, attention_mask, options.get("scaling"), *shared), None
        return _one_token(query, key, value, attention_mask, options.get("scaling")), None
    row = _calls.row
    if (
        row is None
        or attention_mask is None
        or attention_mask.dtype == torch.bool
        or attention_mask.shape[1] != 1  # of each head its own
        or query.shape[0] != 1
        or query.shape[2:] != (key.shape[2] - row.prefix, value.shape[3])
        or special
    ):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return _in_parts(query, key, value, attention_mask, options.get("scaling"), row), None


def _in_parts(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None, row: PackedRow) -> Tensor:
    """query [1, heads, q, d], key and value [1, key heads, prefix + q, d], mask [1, 1, q, prefix + q].

    The heads that read one key head are folded into its queries.
    """
    heads, queries, size = query.shape[1:]
    groups, prefix = key.shape[1], row.prefix
    repeated = heads // groups
    result = query.new_empty(1, queries, heads, size)
    if prefix:
        folded = query.reshape(1, groups, repeated * queries, size)
        before, before_mass = _fused(folded, key[:, :, :prefix], value[:, :, :prefix], scale=scale)
        before, before_mass = before.reshape(query.shape), before_mass.reshape(1, heads, queries)
    own_key, own_value = key[:, :, prefix:], value[:, :, prefix:]
    for start, end, keys, visible in row.parts(mask, repeated):
        folded = query[:, :, start:end].reshape(1, groups, repeated * (end - start), size)
        own, mass = _fused(folded, own_key[:, :, keys], own_value[:, :, keys], attn_mask=visible, scale=scale)
        own, mass = own.reshape(1, heads, end - start, size), mass.reshape(1, heads, end - start)
        if prefix:
            share = torch.sigmoid(before_mass[:, :, start:end] - mass)[..., None]  # of the prefix, in float32
            own = own.to(share.dtype).lerp(before[:, :, start:end].to(share.dtype), share)
        result[:, start:end] = own.transpose(1, 2)
    return result


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
