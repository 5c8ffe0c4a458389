"""The inside of blocks built like Llama's (Mistral, Qwen2, SmolLM2): what structured pruning takes apart.

Under grouped-query attention transformers lays the query heads of a key head side by side: query head i reads key head
i // queries_per_key.
"""

from typing import Any

from torch import Tensor, nn

from kick.errors import LevelError


def parts(layer: Any) -> tuple[Any, Any]:
    """(attention, MLP) of a Llama-like decoder layer. Raises LevelError for any other."""
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    wanted = [(attention, f"{part}_proj") for part in "qkvo"] + [
        (mlp, f"{part}_proj") for part in ("gate", "up", "down")
    ]
    missing = [name for owner, name in wanted if not isinstance(getattr(owner, name, None), nn.Linear)]
    norms = ("input_layernorm", "post_attention_layernorm")
    missing += [name for name in norms if getattr(layer, name, None) is None]
    if missing:
        raise LevelError(
            f"{type(layer).__name__} has no {missing[0]}.", "Models built like Llama (Mistral, Qwen2, SmolLM2) only."
        )
    for extra in ("q_norm", "k_norm", "pre_feedforward_layernorm"):
        if hasattr(attention, extra) or hasattr(layer, extra):
            raise LevelError(f"{type(layer).__name__} has a {extra}.", "Models built like Llama only.")
    return attention, mlp


def spread(z_head: Tensor, queries_per_key: int, kv_heads: int, head_dim: int, within: bool) -> Tensor:
    """z of a layer's heads -> [heads * head_dim]: transformers lays the query heads of a key head side by side."""
    heads = z_head.repeat(kv_heads) if within else z_head.repeat_interleave(queries_per_key)
    return heads.repeat_interleave(head_dim)


def layers_of(model: Any) -> Any:
    """The decoder layers, each checked to be like Llama's. Raises LevelError for another architecture."""
    inner = getattr(model, "model", None)
    if not all(hasattr(inner, name) for name in ("layers", "embed_tokens", "norm")):
        raise LevelError(f"{type(model).__name__} is not built like Llama.", "Mistral, Qwen2 and SmolLM2 are.")
    assert inner is not None
    for layer in inner.layers:
        parts(layer)
    return inner.layers
