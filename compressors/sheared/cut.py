"""Masks become a smaller model: units with z = 0 are sliced away, what is left of z is folded into the weights.

Exact, also for fractional z, grouped-query attention and tied embeddings: the cut model gives the masked one's logits.
"""

from typing import Any

import torch
from torch import Tensor

from ..llama import ModelShape, parts, spread


@torch.no_grad()
def cut(model: Any, z: dict[str, Tensor], target: ModelShape, within: bool = False) -> Any:
    """A new model of shape `target` with what `z` leaves of `model`; layers with z = 0 go, the others are renumbered.

    Norms carry z_hidden; o_proj's columns z_head, down_proj's z_intermediate; the rows of both z_layer z_hidden.
    Embeddings and head are sliced, never scaled.
    """
    source = ModelShape.of(model.config)
    hidden = z["hidden"][0]
    dims = hidden.nonzero().flatten()
    layers = z["layer"][0].nonzero().flatten().tolist()
    small = type(model)(target.configuration(model.config, layers)).to(model.dtype).to(model.device).eval()
    embedding = model.get_input_embeddings().weight
    _fill(small.get_input_embeddings(), embedding[:, dims])
    if not model.config.tie_word_embeddings:
        _fill(small.get_output_embeddings(), model.get_output_embeddings().weight[:, dims])
    small.model.norm.weight.copy_(model.model.norm.weight[dims] * hidden[dims])
    for into, index in zip(small.model.layers, layers, strict=True):
        layer = model.model.layers[index]
        attention, mlp = parts(layer)
        attention_into, mlp_into = parts(into)
        heads = z["head"][index]
        queries = spread(heads, source.queries_per_key, source.kv_heads, source.head_dim, within)
        rows = queries.nonzero().flatten()
        keys = torch.ones_like(heads[:1]).expand(source.kv_heads) if within else heads
        key_rows = keys.repeat_interleave(source.head_dim).nonzero().flatten()
        channels = z["intermediate"][index].nonzero().flatten()
        width = z["intermediate"][index][channels]
        out = z["layer"][0, index] * hidden[dims]
        for name, units in (("q", rows), ("k", key_rows), ("v", key_rows)):
            _linear(getattr(attention_into, f"{name}_proj"), getattr(attention, f"{name}_proj"), units, dims)
        _linear(attention_into.o_proj, attention.o_proj, dims, rows, queries[rows], out)
        _linear(mlp_into.gate_proj, mlp.gate_proj, channels, dims)
        _linear(mlp_into.up_proj, mlp.up_proj, channels, dims)
        _linear(mlp_into.down_proj, mlp.down_proj, dims, channels, width, out)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            getattr(into, norm).weight.copy_(getattr(layer, norm).weight[dims] * hidden[dims])
    small.generation_config = model.generation_config
    return small


def _linear(
    into: Any,
    linear: Any,
    rows: Tensor,
    columns: Tensor,
    column_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> None:
    weight = linear.weight[rows][:, columns]
    bias = None if linear.bias is None else linear.bias[rows]
    if column_scale is not None:
        weight = weight * column_scale
    if row_scale is not None:
        weight = weight * row_scale[:, None]
        bias = None if bias is None else bias * row_scale
    _fill(into, weight)
    if bias is not None:
        into.bias.copy_(bias)


def _fill(module: Any, weight: Tensor) -> None:
    module.weight.copy_(weight)
