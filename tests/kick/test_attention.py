"""Attention on a CPU, in parts, against its definition."""

import pytest
import torch
from lm_reference import attends
from transformers.models.llama.modeling_llama import eager_attention_forward

from kick.lm import attention
from kick.lm.packing import pack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("prefix", [0, 1, 192])
@pytest.mark.parametrize("size", [7, 50, 128])
def test_attention_in_parts_is_attention(dtype, prefix, size):
    """Against the definition in float64; in bfloat16 it is closer than transformers' eager attention."""
    torch.manual_seed(0)
    words = [[1, 2, 3, 4, *range(10, 40)], [1, 2, 3, 9, *range(50, 80)], [5, *range(80, 108)], [6, 7, 8], [6, 7, 9, 9]]
    (row,) = pack(words, range(len(words)), 1000)
    n = len(row.tokens)
    seen = attends(row, prefix)[None, None]
    exact = torch.randn(1, 9, n, 64), torch.randn(1, 3, prefix + n, 64), torch.randn(1, 3, prefix + n, 64)
    rounded = [tensor.to(dtype) for tensor in exact]

    def mask(dtype):
        return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)

    query, key, value = (tensor.double() for tensor in rounded)
    key, value = (tensor.repeat_interleave(3, dim=1) for tensor in (key, value))
    weights = (query @ key.mT * 0.1).masked_fill(~seen, -torch.inf).softmax(dim=-1)
    expected = (weights @ value).transpose(1, 2)
    module = type("Module", (), {"num_key_value_groups": 3, "is_causal": True, "layer_idx": 0, "training": False})()
    with attention.packed_row(attention.PackedRow(prefix, row.chunks(size))):
        attention.attention(module, *(tensor[:, :3] for tensor in rounded), mask(dtype), scaling=0.1)
        own, _ = attention.attention(module, *rounded, mask(dtype), scaling=0.1)  # a layer with other heads than that
    assert attention._calls.row is None
    assert (own.dtype, own.shape) == (dtype, expected.shape)
    difference = (own.double() - expected).abs().max()
    if dtype == torch.bfloat16:
        eager, _ = eager_attention_forward(module, *rounded, mask(dtype), scaling=0.1)
        assert difference <= 1.5 * (eager.double() - expected).abs().max()
    else:
        assert difference < (2e-6 if dtype == torch.float32 else 1e-12)
