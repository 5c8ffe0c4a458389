"""GGUF: one file for llama.cpp and everything built on it. Llama-architecture models, F16 or Q8_0.

Weights are stored dense: a pruned model's zeros are in it, but take their room; Q8_0 rounds once more.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import torch

from kick import __version__
from kick.checkpoint import Checkpoint
from kick.errors import CheckpointError
from kick.export import check_plain
from kick.files import safe_name
from kick.loading import load_model, load_tokenizer

_QUANTIZED = {"float16": gguf.GGMLQuantizationType.F16, "q8_0": gguf.GGMLQuantizationType.Q8_0}
_BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OUTSIDE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def write(checkpoint: Checkpoint, out: Path, dtype: str) -> Path:
    """One .gguf file: `out`, or in the directory `out`, by the setting's name.

    dtype: float16 (auto) or q8_0, for matrices; norms are float32.
    """
    if out.suffix != ".gguf":
        out = out / f"{safe_name(checkpoint.record['setting_name'])}.gguf"
    dtype = "float16" if dtype == "auto" else dtype
    if dtype not in _QUANTIZED:
        raise CheckpointError(f"GGUF files are not written in '{dtype}'.", f"Expected {' or '.join(_QUANTIZED)}.")
    check_plain(checkpoint, "GGUF")
    model: Any = load_model(checkpoint.path, "float32", "cpu")
    if model.config.model_type != "llama":
        raise CheckpointError(
            f"GGUF export takes models of Llama's architecture; this one is of {model.config.model_type}'s.",
            "--format hf takes any.",
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    writer = gguf.GGUFWriter(partial, "llama")
    try:
        _write_shape(writer, model.config, checkpoint.record["setting_name"])
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if dtype == "q8_0" else gguf.LlamaFileType.MOSTLY_F16)
        _write_vocabulary(writer, load_tokenizer(checkpoint.path), model.config.vocab_size)
        for name, weight in _tensors(model):
            kind = _QUANTIZED[dtype] if weight.ndim > 1 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return out


def _write_shape(writer: gguf.GGUFWriter, config: Any, name: str) -> None:
    writer.add_name(name)
    writer.add_description(f"written by kick {__version__}")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.rope_parameters.get("rope_type", "default") != "default":
        raise CheckpointError(
            f"GGUF export with rotary embeddings of the type '{config.rope_parameters['rope_type']}'.",
            "Only the default type.",
        )
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)


def _write_vocabulary(writer: gguf.GGUFWriter, tokenizer: Any, size: int) -> None:
    """Tokens and merges of a byte-level BPE tokenizer."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if described["type"] != "BPE" or described.get("byte_fallback"):
        raise CheckpointError("GGUF export of this tokenizer.", "Byte-level BPE tokenizers only.")
    special = set(tokenizer.all_special_ids) | {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    tokens = [names.get(index, f"[unused{index}]") for index in range(size)]
    added = tokenizer.added_tokens_decoder

    def kind(index: int) -> gguf.TokenType:
        if index not in names:
            return gguf.TokenType.UNUSED
        if index in special:
            return gguf.TokenType.CONTROL
        return gguf.TokenType.USER_DEFINED if index in added else gguf.TokenType.NORMAL

    types = [kind(index) for index in range(size)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in described["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for add, index in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
    ):
        if index is not None:
            add(index)
    plain = tokenizer("a")["input_ids"]  # as this tokenizer does it by itself
    writer.add_add_bos_token(bool(plain) and plain[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(plain) and plain[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _pre_tokenizer(tokenizer: Any) -> str:
    """llama.cpp's name for how text is cut before byte pairs are merged."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    parts = [part["type"] for part in described.get("pretokenizers", [described]) if part]
    known = {("ByteLevel",): "gpt-2", ("Digits", "ByteLevel"): "smollm"}
    if tuple(parts) not in known:
        raise CheckpointError(
            f"GGUF export of a tokenizer that cuts text by {', '.join(parts) or 'nothing'}.",
            "Known: byte-level as GPT-2's, and with single digits as SmolLM's.",
        )
    return known[tuple(parts)]


def _tensors(model: Any) -> Any:
    """(GGUF name, array) of every tensor, in order."""
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            if not model.config.tie_word_embeddings:
                yield "output.weight", value.numpy()
        elif name in _OUTSIDE:
            yield _OUTSIDE[name], value.numpy()
        else:
            _, _, index, inner = name.split(".", 3)
            module, _, kind = inner.rpartition(".")
            if module not in _BLOCK:
                raise CheckpointError(f"GGUF export has no place for '{name}'.", "Plain Llama models only.")
            if module in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = model.config.num_attention_heads if "q_proj" in module else model.config.num_key_value_heads
                value = _interleave(value, heads)
            yield f"blk.{index}.{_BLOCK[module]}.{kind}", value.numpy()


def _interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from halves (rotary as transformers computes it) to neighbouring pairs (as ggml does)."""
    rest = weight.shape[1:]
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *rest)
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()
