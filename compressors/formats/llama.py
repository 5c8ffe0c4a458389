"""What Sheared LLaMA, AST and LLM-Pruner leave behind in Llama checkpoints: composer's names, rotary buffers,
configurations that do not fit the tensors.

Whatever the tensors say is taken for true, since they are what was trained: a declared number that does not fit them is
put right and noted; tensors that contradict each other are an error that says which.
"""

import re
from typing import Any

from torch import Tensor

from kick.errors import INCOMPLETE, ModelError

from .files import Foreign

_COMPOSER = {
    r"^model\.transformer\.wte\.": "model.embed_tokens.",
    r"^model\.transformer\.ln_f\.": "model.norm.",
    r"^model\.transformer\.output\.": "lm_head.",
    r"^model\.transformer\.blocks\.(\d+)\.attn\.w([qkv])\.": r"model.layers.\1.self_attn.\2_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.attn\.out_proj\.": r"model.layers.\1.self_attn.o_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.ln_1\.": r"model.layers.\1.input_layernorm.",
    r"^model\.transformer\.blocks\.(\d+)\.ln_2\.": r"model.layers.\1.post_attention_layernorm.",
    r"^model\.transformer\.blocks\.(\d+)\.mlp\.": r"model.layers.\1.mlp.",
    r"^model\.transformer\.blocks\.(\d+)\.": r"model.layers.\1.",  # buffers
}
_ROTARY = ("*.rotary_emb.inv_freq", "*.rotary_emb.cos_cached", "*.rotary_emb.sin_cached", "*.attn.rotary_emb.*")


def rename_composer(model: Foreign) -> None:
    """Names as composer gives them become those of transformers. Raises ModelError for masks that were not applied."""
    if not any(name.startswith("model.transformer.blocks.") for name in model.tensors):
        return
    masks = [name for name in model.tensors if ".l0_module." in name]
    if masks:
        raise ModelError(
            f"{model.path} still holds the masks of its pruning, such as '{masks[0]}'.",
            "Cut it to shape first (Sheared LLaMA's post_pruning_processing).",
        )
    renamed = {}
    for name, tensor in model.tensors.items():
        for pattern, replacement in _COMPOSER.items():
            name, times = re.subn(pattern, replacement, name)
            if times:
                break
        renamed[name] = tensor
    model.tensors = renamed
    model.notes.append("composer's names were mapped")


def fit_configuration(model: Foreign, dense_head_dim: int | None = None) -> None:
    """Make the configuration of a Llama-like model say what its tensors are; the widest layer, where they differ.

    dense_head_dim: that of the model it was made from, which pruning does not change; used where nothing else tells.
    """
    dropped = {name: model.tensors[name] for name in model.tensors if name.endswith("rotary_emb.inv_freq")}
    if count := len(model.drop(_ROTARY)):
        model.notes.append(f"{count} leftover rotary buffers were dropped")
    layers = _layers(model.tensors)
    if not layers:
        return
    _declare(model, "num_hidden_layers", len(layers))
    _declare(model, "vocab_size", model.tensors["model.embed_tokens.weight"].shape[0])
    _declare(model, "hidden_size", model.tensors["model.embed_tokens.weight"].shape[1])
    head_dim = _head_dim(model, layers, next(iter(dropped.values()), None), dense_head_dim)
    heads = {q.shape[0] // head_dim for q, *_ in layers.values()}
    key_heads = {k.shape[0] // head_dim for _, k, _ in layers.values()}
    shared = {q.shape[0] / k.shape[0] for q, k, _ in layers.values()}
    for index, (q, k, _) in layers.items():
        if q.shape[0] % head_dim or k.shape[0] % head_dim or q.shape[0] % k.shape[0]:
            raise ModelError(
                f"{model.path}: layer {index} has {q.shape[0]} rows of queries and {k.shape[0]} of keys.",
                f"Neither heads of {head_dim} nor whole groups of them: the checkpoint is incomplete.",
            )
    if len(shared) > 1:
        raise ModelError(
            f"{model.path}: its layers share a key head among {sorted(map(int, shared))} query heads.",
            "transformers knows one number for all layers.",
        )
    _declare(model, "num_attention_heads", max(heads))
    _declare(model, "num_key_value_heads", max(key_heads))
    widths = {up.shape[0] for *_, up in layers.values() if up is not None}
    if widths:
        _declare(model, "intermediate_size", max(widths))


def _layers(tensors: dict[str, Tensor]) -> dict[int, tuple[Tensor, Tensor, Tensor | None]]:
    """The weights of q_proj, k_proj and up_proj of each layer; empty for a model whose layers are not like Llama's."""
    if "model.embed_tokens.weight" not in tensors:
        return {}
    indices = {int(match[1]) for name in tensors if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    found = {}
    for index in sorted(indices):
        prefix = f"model.layers.{index}."
        query, key, output = (tensors.get(f"{prefix}self_attn.{part}_proj.weight") for part in "qko")
        if query is None or key is None or output is None or output.shape[1] != query.shape[0]:
            return {}  # a hybrid, or attention of another kind
        found[index] = (query, key, tensors.get(f"{prefix}mlp.up_proj.weight"))
    if missing := sorted(set(range(max(indices, default=-1) + 1)) - indices):
        raise ModelError(
            f"layer {missing[0]} of {max(indices) + 1} is missing.",
            INCOMPLETE,
        )
    return found


def _head_dim(
    model: Foreign, layers: dict[int, tuple[Tensor, Tensor, Tensor | None]], rotary: Tensor | None, dense: int | None
) -> int:
    """As declared, or as a leftover rotary buffer says, or hidden size by heads if that fits, or the dense model's."""
    config = model.config
    if config.get("head_dim"):
        return int(config["head_dim"])
    rows, heads, hidden = layers[0][0].shape[0], config.get("num_attention_heads"), config["hidden_size"]
    if rotary is not None and config.get("model_type") == "llama":  # elsewhere it may turn a part of a head
        found, why = 2 * rotary.numel(), "by its rotary buffer"
    elif heads and rows == hidden and rows % heads == 0:
        found, why = rows // heads, ""
    elif dense and all(query.shape[0] % dense == 0 for query, *_ in layers.values()):
        found, why = dense, "as in the dense model"
    else:
        raise ModelError(
            f"{model.path}: {rows} rows of queries for a hidden size of {hidden} and {heads} heads, and no head_dim.",
            "Add head_dim to its config.json.",
        )
    config["head_dim"] = found
    if why:
        model.notes.append(f"head_dim was missing; {why} it is {found}")
    return found


def _declare(model: Foreign, key: str, value: Any) -> None:
    if model.config.get(key) != value:
        if key in model.config:
            model.notes.append(f"{key} was declared {model.config[key]}; by the tensors it is {value}")
        model.config[key] = value
