"""The inside of blocks built like Llama's (Mistral, Qwen2, SmolLM2): what structured pruning takes apart.

Under grouped-query attention transformers lays the query heads of a key head side by side: query head i reads key head
i // queries_per_key.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kick import adapters, shapes
from kick.errors import ConfigError, LevelError


def refuse_remains(model: nn.Module, method: str) -> None:
    """Raise ConfigError where an earlier stage left `model` what taking its blocks apart would lose or trip over."""
    adapters.refuse_attached(model, method)
    if shapes.table_of(model):
        raise ConfigError(
            f"{method}, on a model whose layers differ in width.", "Prune with uniform: true in the stage before."
        )


@dataclass(frozen=True)
class ModelShape:
    """`heads` are query heads; `kv_heads` key and value heads; all of `head_dim`, which pruning leaves."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> "ModelShape":
        """Of a Llama-like configuration. Raises LevelError for any other."""
        try:
            heads = config.num_attention_heads
            return cls(
                config.num_hidden_layers,
                config.hidden_size,
                config.intermediate_size,
                heads,
                getattr(config, "num_key_value_heads", None) or heads,
                getattr(config, "head_dim", None) or config.hidden_size // heads,
            )
        except AttributeError as error:
            raise LevelError(
                f"a {config.model_type} model is not built like Llama: {error}.",
                "Methods that work linear by linear take it: wanda, sparsegpt, ast.",
            ) from error

    @property
    def queries_per_key(self) -> int:
        return self.heads // self.kv_heads

    def configuration(self, source: Any, kept_layers: Sequence[int] | None = None) -> Any:
        """`source`, a configuration, with this shape. kept_layers: which of its layers these are; the first ones."""
        config = copy.deepcopy(source)
        keep_layers(config, kept_layers or range(self.layers))
        config.hidden_size, config.intermediate_size = self.hidden, self.intermediate
        config.num_attention_heads, config.num_key_value_heads = self.heads, self.kv_heads
        config.head_dim = self.head_dim
        return config

    def __str__(self) -> str:
        return f"{self.layers} x {self.hidden} x {self.intermediate} x {self.heads} heads"


def keep_layers(config: Any, kept: Sequence[int]) -> None:
    """Leave in a configuration what it says of each of the layers `kept`: their kind of attention, or of rotation."""
    for key, value in config.to_dict().items():
        if "layer" in key and isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(config, key, [value[index] for index in kept])
    config.num_hidden_layers = len(kept)


_PARTS = {f"self_attn.{part}_proj" for part in "qkvo"} | {f"mlp.{part}_proj" for part in ("gate", "up", "down")}
_NORMS = ("input_layernorm", "post_attention_layernorm")


def parts(layer: Any) -> tuple[Any, Any]:
    """(attention, MLP) of a Llama-like decoder layer. Raises LevelError for any other, also one that has more parts."""
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    wanted = [(attention, f"{part}_proj") for part in "qkvo"] + [
        (mlp, f"{part}_proj") for part in ("gate", "up", "down")
    ]
    missing = [name for owner, name in wanted if not isinstance(getattr(owner, name, None), nn.Linear)]
    missing += [name for name in _NORMS if getattr(layer, name, None) is None]
    if missing:
        raise LevelError(
            f"{type(layer).__name__} has no {missing[0]}.", "Models built like Llama (Mistral, Qwen2, SmolLM2) only."
        )
    if not hasattr(layer.input_layernorm, "variance_epsilon"):
        raise LevelError(
            f"{type(layer).__name__} has norms of kind {type(layer.input_layernorm).__name__}.",
            "Models with Llama's RMSNorm (Mistral, Qwen2, SmolLM2) only.",
        )
    owners = dict.fromkeys(name.rpartition(".")[0] for name, _ in layer.named_parameters())
    if more := [owner for owner in owners if owner not in _PARTS and owner not in _NORMS]:
        raise LevelError(f"{type(layer).__name__} has a {more[0].rpartition('.')[2]}.", "Models built like Llama only.")
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
