"""GPTQ: packed codes that transformers, GPTQModel and vLLM load.

Takes a checkpoint whose linears were all rounded by one recipe (gptq, rtn, or a chain that ends so); linears that were
left out are stored as they are and named as such.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from kick.blocks import find_decoder
from kick.checkpoint import Checkpoint, read_grids
from kick.errors import CheckpointError
from kick.export import check_plain
from kick.files import new_directory, write_json
from kick.gptq_layout import pack_linear
from kick.loading import load_model, load_tokenizer
from kick.quantization import Grid


def write(checkpoint: Checkpoint, out: Path, dtype: str) -> Path:
    """A directory with packed weights and a `quantization_config`. What is not packed is stored in float16."""
    if dtype == "q8_0":
        raise CheckpointError("--dtype q8_0 goes with --format gguf only.", "Give another --dtype, or none.")
    check_plain(checkpoint, "GPTQ")
    grids = read_grids(checkpoint)
    config = _quantization_config(checkpoint, grids)
    model: Any = load_model(checkpoint.path, "float32", "cpu")
    decoder = find_decoder(model)
    left_out = [linear.name for linear in decoder.linears if linear.name not in grids]
    packable = [linear for linear in (*decoder.linears, decoder.head) if linear and linear.name in grids]
    config["lm_head"] = decoder.head in packable
    if left_out:
        config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in left_out}
    kept = torch.float16 if dtype == "auto" else getattr(torch, dtype)
    twice = _stored_twice(model)
    tensors = {
        name: value.to(kept) if value.is_floating_point() else value
        for name, value in model.state_dict().items()
        if name not in twice
    }
    for linear in packable:
        del tensors[f"{linear.name}.weight"]
        packed = pack_linear(linear.weight, grids[linear.name], config["checkpoint_format"] == "gptq")
        tensors |= {f"{linear.name}.{key}": value for key, value in packed.items()}
    with new_directory(out) as partial:
        model.config.dtype = kept
        model.config.save_pretrained(partial)
        written = json.loads((partial / "config.json").read_text(encoding="utf-8"))
        write_json(partial / "config.json", {**written, "quantization_config": config})
        write_json(partial / "quantize_config.json", config)
        if model.can_generate():
            model.generation_config.save_pretrained(partial)
        load_tokenizer(checkpoint.path).save_pretrained(partial)
        contiguous = {name: value.contiguous() for name, value in tensors.items()}
        save_file(contiguous, partial / "model.safetensors", {"format": "pt"})
    return out


def _stored_twice(model: Any) -> set[str]:
    """The second and further names of tensors that have several: a tied head."""
    seen: dict[int, str] = {}
    twice = set()
    for name, value in model.state_dict().items():
        if value.data_ptr() in seen:
            twice.add(name)
        seen.setdefault(value.data_ptr(), name)
    return twice


def _in_words(grids: Iterable[Grid]) -> str:
    found = {(g.bits, int((g.group_of == 0).sum()) if g.groups > 1 else len(g.group_of)) for g in grids}
    return ", ".join(f"{bits} bits in groups of {size}" for bits, size in sorted(found))


def _quantization_config(checkpoint: Checkpoint, grids: dict[str, Grid]) -> dict[str, Any]:
    if not grids:
        raise CheckpointError(
            f"{checkpoint.path} holds no quantised weights.", "Expected a setting such as gptq@4 or rtn@4."
        )
    widths = {grid.bits for grid in grids.values()}
    sizes = {int((grid.group_of == 0).sum()) for grid in grids.values() if grid.groups > 1} or {-1}
    (bits, *other_widths), (group_size, *other_sizes) = widths, sizes
    other_sizes += [len(g.group_of) for g in grids.values() if g.groups == 1 and len(g.group_of) > group_size != -1]
    if other_widths or other_sizes:
        raise CheckpointError(
            f"the linears of {checkpoint.path} do not share one grid: {_in_words(grids.values())}.",
            "A GPTQ file holds one number of bits and one group size.",
        )
    symmetric = all(bool((grid.zero == 2 ** (bits - 1)).all()) for grid in grids.values())
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": any(not _are_neighbours(grid) for grid in grids.values()),
        "sym": symmetric,
        # the first format stores zero points minus one: a zero point of 0 runs into its neighbour when readers add it
        # back, and GPTQModel takes no asymmetric file in it but its own
        "checkpoint_format": "gptq" if symmetric else "gptq_v2",
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"kick:{checkpoint.record['kick_version']}"]},
    }


def _are_neighbours(grid: Grid) -> bool:
    return bool((grid.group_of.diff() >= 0).all())
