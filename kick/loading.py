"""From a directory or a .gguf file to a tokenizer and a model: nothing in it is run, and nothing is left out."""

import math
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kick.errors import INCOMPLETE, ModelError, first_line
from kick.files import read_json
from kick.models import holds_weights, recorded_files

if TYPE_CHECKING:
    import torch

_OTHER = "Is its config.json its own?"
_BROKEN = (OSError, ValueError, KeyError, ImportError, TypeError, IndexError, struct.error)  # what damaged files raise
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_AS_BROUGHT = (
    "Its weights are quantised. Name it in a sweep of its dense model, which unpacks and measures it: settings: "
    "[{compressor: external, params: {path: FOLDER}}] (docs/compressors.md). --debug shows the whole error."
)


def load_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    folder, options = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    try:
        return AutoTokenizer.from_pretrained(folder, **options, trust_remote_code=False)
    except _BROKEN as error:
        if path.is_dir() and not any((path / name).is_file() for name in _TOKENIZERS):
            raise ModelError(
                f"{path} holds no tokenizer: none of {', '.join(_TOKENIZERS)}.",
                "Copy there the tokenizer files of the model that it was made of.",
            ) from error
        raise ModelError(
            f"the tokenizer of {path.name} cannot be loaded: {first_line(error)}", "--debug shows the whole error."
        ) from error


def load_model(path: Path, dtype: str, device: str) -> "torch.nn.Module":
    """The causal language model at `path` in evaluation mode. Code inside the model's folder is never run."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from kick import adapters, shapes

    where = {"pretrained_model_name_or_path": path, "use_safetensors": True}
    if path.is_file():
        where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, **_dequantized()}
    if path.is_dir():
        check_configuration(path)
    table = shapes.read_table(path) if path.is_dir() else {}
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            **where,
            dtype=getattr(torch, dtype),
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=bool(table),
        )
    except (*_BROKEN, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"the model {path.name} cannot be loaded: {first_line(error)}",
            _AS_BROUGHT if is_quantized(path) else "--debug shows the whole error.",
        ) from error
    if path.is_file():
        _forget_quantization(model)
    if odd := {name for name, *_ in found["mismatched_keys"]} - table.keys():
        raise ModelError(
            f"the tensor '{min(odd)}' of {path.name} has another shape than its configuration says.", _OTHER
        )
    if missing := found["missing_keys"] - table.keys():
        raise ModelError(f"{path.name} holds no tensor '{min(missing)}'.", INCOMPLETE)
    if lost := [name for name in sorted(found["unexpected_keys"]) if belongs(model, name)]:
        raise without_a_place(path, lost)
    shapes.resize(model, shapes.read_tensors(path, table))
    model = model.to(device).eval()
    if path.is_dir():
        _check_whole(path)
        adapters.attach(model, adapters.load(path))
    return model


def _check_whole(path: Path) -> None:
    """Raise ModelError where tensors are missing that the record of a checkpoint names: without its adapters, say, it
    would be another model."""
    named = [name for name in recorded_files(path) if name.endswith(".safetensors")]
    if missing := [name for name in named if not (path / name).is_file()]:
        raise ModelError(f"{path} holds no '{missing[0]}', which its kick.json names.", INCOMPLETE)


def is_quantized(path: Path) -> bool:
    """Whether a directory holds packed weights; those of a .gguf file are unpacked as they are read."""
    return path.is_dir() and "quantization_config" in read_json(path / "config.json")


def check_unpacks(path: Path) -> None:
    """Raise ModelError where the packed weights in a directory need a library or a device that is not here."""
    if not is_quantized(path):
        return
    from transformers.quantizers import AutoHfQuantizer

    try:
        packed = read_json(path / "config.json")["quantization_config"]
        AutoHfQuantizer.from_config(packed, pre_quantized=True).validate_environment(device_map=None)
    except (ImportError, RuntimeError, ValueError, KeyError) as error:
        raise ModelError(f"the model {path.name} cannot be loaded: {first_line(error)}", _AS_BROUGHT) from error


def without_a_place(path: Path, names: list[str]) -> ModelError:
    """The error for tensors that a model's files hold and its configuration has no place for."""
    return ModelError(
        f"{path.name} holds '{names[0]}' ({len(names)} such tensors), which its configuration has no place for.",
        f"Without them it would be another model. {_OTHER}",
    )


def belongs(model: "torch.nn.Module", name: str) -> bool:
    """Whether a tensor that was left over is a parameter of a layer, or of a block, that `model` has.

    Old checkpoints hold buffers besides, such as the causal mask `attn.bias` of GPT-J.
    """
    owner, _, last = name.rpartition(".")
    block = re.match(r".*?\.\d+(?=\.)", name)
    modules = dict(model.named_modules())
    if last not in ("weight", "bias"):
        return False
    return hasattr(modules[owner], "weight") if owner in modules else block is not None and block[0] in modules


def load_skeleton(path: Path, dtype: str) -> "torch.nn.Module":
    """The model at `path` on the meta device: its configuration and shapes, without weights."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, options = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    if path.is_dir():
        check_configuration(path)
    try:
        config = AutoConfig.from_pretrained(folder, **options, trust_remote_code=False)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=False)
    except _BROKEN as error:
        raise ModelError(
            f"the configuration of {path.name} cannot be loaded: {first_line(error)}",
            "--debug shows the whole error.",
        ) from error
    if path.is_file():
        _forget_quantization(model)
    model.tie_weights()
    return model


def is_skeleton(model: "torch.nn.Module") -> bool:
    return next(model.parameters()).device.type == "meta"


def check_configuration(path: Path) -> None:
    """Raise ModelError unless the directory `path` holds a configuration that may be loaded."""
    try:
        config = read_json(path / "config.json")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path / 'config.json'} cannot be read: {first_line(error)}",
            INCOMPLETE,
        ) from error
    if not isinstance(config, dict):
        raise ModelError(f"{path / 'config.json'} holds no configuration.", "Expected an object, {...}.")
    check_config(config, path)


def check_config(config: dict[str, Any], path: Path) -> None:
    """Raise ModelError for a model of another kind, or a configuration that names code to fetch.

    Kernels of the hub are given as owner/name.
    """
    if config.get("is_encoder_decoder"):
        raise ModelError(
            f"{path.name} is an encoder with a decoder ({config.get('model_type')}).",
            "kick asks causal language models: decoders alone.",
        )
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"):
        if isinstance(config.get(key), str) and "/" in config[key]:
            raise ModelError(
                f"the configuration of {path.name} names code to fetch: {key} '{config[key]}'.", "Remove that key."
            )


def _dequantized() -> dict[str, Any]:
    """For from_pretrained: the weights of a .gguf file as plain tensors; some versions else keep them in its blocks."""
    import transformers

    kind = getattr(transformers, "GgufConfig", None)  # versions without it have no other way
    return {"quantization_config": kind(dequantize=True)} if kind else {}


def _forget_quantization(model: Any) -> None:
    """A .gguf file is dequantised on load; left in place, its quantisation record would be saved and then believed."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False


def count_parameters(path: Path) -> int:
    """Parameters of the model at `path`, from the headers of its weight files, or its configuration where there are
    none: no weight is read."""
    if path.is_dir() and not holds_weights(path):
        from kick.blocks import parameter_count

        return parameter_count(load_skeleton(path, "float32"))
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return sum(_count_parameters(file) for file in files)


def _count_parameters(file: Path) -> int:
    from gguf import GGUFReader
    from safetensors import SafetensorError, safe_open

    try:
        if file.suffix == ".gguf":
            return sum(int(tensor.n_elements) for tensor in GGUFReader(file).tensors)
        with safe_open(file, framework="pt") as tensors:
            return sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118 (no dict)
    except (SafetensorError, ValueError, OSError, IndexError, struct.error) as error:
        raise ModelError(
            f"{file} cannot be read: {first_line(error)}",
            "It is damaged or incomplete; a small text file in its place is a pointer of git LFS: git lfs pull.",
        ) from error
