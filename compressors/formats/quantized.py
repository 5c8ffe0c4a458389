"""Packed codes made weights again: GPTQ (AutoGPTQ, GPTQModel), AWQ (AutoAWQ) and compressed-tensors.

A linear `NAME` comes as NAME.qweight and so on, and leaves as NAME.weight in float32 with the grid that it lies on.
Bits are taken from the tensors' shapes, linear by linear, so that mixed widths need no reading of rules.

Shapes: weight [out, in]; scales and zeros [out, groups]; a packed word holds 32 / bits codes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kick.errors import INCOMPLETE, ModelError
from kick.gptq_layout import unpack, unpack_linear
from kick.quantization import Grid

from .files import Foreign

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column, among eight, of the code at each place in a word


def format_of(config: dict[str, Any], path: Path) -> tuple[str, dict[str, Any]] | None:
    """How the model with the configuration `config` is quantised: method and what it says of it; None if it is not.

    Raises ModelError for a format that kick does not read, naming it.
    """
    how = config.get("quantization_config") or config.get("compression_config")
    if how is None:
        return None
    method = how.get("quant_method") or "unknown"
    if method not in _METHODS:
        raise ModelError(f"{path} is quantised by '{method}'.", f"kick reads {', '.join(_METHODS)}. Convert it first.")
    kind = how.get("checkpoint_format") or "gptq"
    if method == "gptq" and kind not in ("gptq", "gptq_v2"):
        raise ModelError(f"{path} is in GPTQ's format '{kind}'.", "kick reads gptq and gptq_v2.")
    version = str(how.get("version") or "gemm").lower()
    if method == "awq" and (version != "gemm" or int(how.get("bits", how.get("w_bit", 4))) != 4):
        raise ModelError(f"{path} is in AWQ's layout '{version}'.", "kick reads gemm with 4 bits.")
    if method == "compressed-tensors" and how.get("transform_config"):
        raise ModelError(f"{path} rotates its activations (transform_config).", "kick does not apply rotations.")
    return method, how


def unpack_all(model: Foreign) -> str | None:
    """Unpack every quantised linear of `model`; gives the name of its format, None if it is not quantised.

    Raises ModelError as `format_of` does, and for what is missing or has no such layout.
    """
    found = format_of(model.config, model.path)
    for key in ("quantization_config", "compression_config"):
        model.config.pop(key, None)
    if found is None:
        return None
    method, how = found
    try:
        _METHODS[method](model, how)
    except KeyError as error:
        raise ModelError(
            f"{model.path} is quantised by '{method}' and lacks {error}.",
            INCOMPLETE,
        ) from error
    return method


def _unpack_gptq(model: Foreign, config: dict) -> None:
    first_version = (config.get("checkpoint_format") or "gptq") == "gptq"
    for name in _named(model, ".qweight"):
        stored = {key: model.tensors.pop(f"{name}.{key}") for key in ("qweight", "qzeros", "scales")}
        index = model.tensors.pop(f"{name}.g_idx", None)
        if index is not None:
            stored["g_idx"] = index
            bits = stored["qweight"].shape[0] * 32 / len(index)
        else:
            bits = float(config["bits"])
        try:
            size = int(config.get("group_size") or -1)
            weight, grid = unpack_linear(stored, _whole(bits, name), first_version, size)
        except ValueError as error:
            raise ModelError(f"{model.path}: {name}: {error}.", INCOMPLETE) from error
        _put(model, name, weight, grid, stored["scales"])


def _unpack_awq(model: Foreign, config: dict) -> None:
    for name in _named(model, ".qweight"):
        qweight, qzeros, scales = (model.tensors.pop(f"{name}.{key}") for key in ("qweight", "qzeros", "scales"))
        codes, zero = _in_order(qweight), _in_order(qzeros)  # [out, in], [out, groups]
        scale = scales.T.float().contiguous()
        group_of = torch.arange(codes.shape[1]) // (codes.shape[1] // scale.shape[1])
        grid = Grid(4, scale, zero.float(), group_of)
        _put(model, name, grid.values(codes), grid, scales)


def _in_order(packed: Tensor) -> Tensor:
    """int32 [n, out / 8] -> codes [out, n]."""
    codes = unpack(packed.T.contiguous(), 4)  # [out, n], the columns of each eight out of order
    ordered = torch.empty_like(codes)
    for place, column in enumerate(_AWQ_ORDER):
        ordered[column::8] = codes[place::8]
    return ordered


def _unpack_compressed_tensors(model: Foreign, config: dict) -> None:
    for name in _named(model, ".weight_packed"):
        _unpack_words(model, name)
    for name in _named(model, ".weight_scale"):
        _scale_up(model, name)
    for name in _named(model, ".bitmask"):
        _spread(model, name)
    groups = (config.get("config_groups") or {}).values()
    if any(isinstance(group, dict) and group.get("input_activations") for group in groups):
        model.notes.append("its activations are meant to be quantised too; here they are not")
    dropped = model.drop(["*.input_scale", "*.input_zero_point", "*.output_scale", "*.k_scale", "*.v_scale"])
    if dropped:
        model.notes.append(f"{len(dropped)} scales of activations and caches are not used")
    format_ = config.get("format")
    odd = [name for name in model.tensors if name.endswith(("_packed", ".weight_global_scale"))]
    if odd:
        raise ModelError(f"{model.path}: '{odd[0]}' is in compressed-tensors' format '{format_}'.", _READ)


_READ = "kick reads pack-quantized, int-quantized, naive-quantized, float-quantized, sparse-bitmask, sparse-24-bitmask."


def _unpack_words(model: Foreign, name: str) -> None:
    """pack-quantized: codes with an offset of half their range, along `in`; zero points likewise along `out`."""
    packed = model.tensors[f"{name}.weight_packed"]
    if packed.dtype != torch.int32 or f"{name}.weight_shape" not in model.tensors:
        return  # a packed floating format: told by the caller
    del model.tensors[f"{name}.weight_packed"]
    scales = model.tensors.pop(f"{name}.weight_scale")
    shape = [int(size) for size in model.tensors.pop(f"{name}.weight_shape")]
    bits = next((b for b in range(1, 9) if -(-shape[1] * b // 32) == packed.shape[1]), 0)
    if not bits:
        raise ModelError(f"{name} packs {shape[1]} columns into {packed.shape[1]} words.", "No whole number of bits.")
    offset = 2 ** (bits - 1)
    codes = _unpack_along(packed, bits, shape[1])
    zero = torch.full(scales.shape, float(offset))
    if (stored := model.tensors.pop(f"{name}.weight_zero_point", None)) is not None:
        if stored.dtype == torch.int32:
            zero = _unpack_along(stored.T.contiguous(), bits, shape[0]).T.float()
        else:
            zero = stored.float() + offset
    group_of = model.tensors.pop(f"{name}.weight_g_idx", None)
    if group_of is None or bool((group_of < 0).any()):
        group_of = torch.arange(shape[1]) // -(-shape[1] // scales.shape[1])
    grid = Grid(bits, scales.float(), zero, group_of.long())
    _put(model, name, grid.values(codes), grid, scales)


def _unpack_along(packed: Tensor, bits: int, count: int) -> Tensor:
    """int32 [rows, words] -> codes [rows, count]; the last words may be cut off."""
    words = -(-packed.shape[1] // bits) * bits
    whole = torch.nn.functional.pad(packed, (0, words - packed.shape[1]))
    return unpack(whole.T.contiguous(), bits).T[:, :count]


def _scale_up(model: Foreign, name: str) -> None:
    """int-, naive- and float-quantized: a weight of eight bits or fewer in a whole byte each, and scales."""
    if f"{name}.weight" not in model.tensors:
        return  # a packed format: told by the caller
    codes, scales = model.tensors.pop(f"{name}.weight"), model.tensors.pop(f"{name}.weight_scale")
    scale = scales.float().reshape(1, 1) if scales.numel() == 1 else scales.float()
    zero = model.tensors.pop(f"{name}.weight_zero_point", None)
    offsets = torch.zeros_like(scale) if zero is None else zero.float().reshape(scale.shape)
    out_features, in_features = codes.shape
    rows = torch.arange(out_features) // -(-out_features // scale.shape[0])
    columns = torch.arange(in_features) // -(-in_features // scale.shape[1])
    scale, offsets = scale[rows], offsets[rows]  # [out, groups]
    if codes.dtype == torch.int8:
        grid = Grid(8, scale, offsets + 128, columns)
        _put(model, name, grid.values(codes.float() + 128), grid, scales)
    else:
        model.tensors[f"{name}.weight"] = (codes.float() - offsets[:, columns]) * scale[:, columns]
        model.code_bits[name] = 8 * codes.itemsize
        model.stored_bits[name] = _bits(8 * codes.itemsize, scales, codes.numel())


def _spread(model: Foreign, name: str) -> None:
    """sparse-bitmask, sparse-24-bitmask: the non-zeros in order, and where they stand, a bit a weight."""
    values, mask = model.tensors.pop(f"{name}.compressed"), model.tensors.pop(f"{name}.bitmask")
    shape = [int(size) for size in model.tensors.pop(f"{name}.shape")]
    model.tensors.pop(f"{name}.row_offsets", None)
    bits = (mask[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1  # [rows, in / 8, 8], lowest first
    kept = bits.reshape(shape[0], -1)[:, : shape[1]].bool()
    weight = torch.zeros(shape, dtype=values.dtype)
    weight[kept] = values.reshape(-1)
    model.tensors[name] = weight  # here the name is already that of the weight


def _named(model: Foreign, ending: str) -> list[str]:
    return [key.removesuffix(ending) for key in model.tensors if key.endswith(ending)]


def _whole(bits: float, name: str) -> int:
    if bits not in (2, 3, 4, 8):
        raise ModelError(f"{name} seems to be packed with {bits:g} bits.", "Expected 2, 3, 4 or 8.")
    return int(bits)


def _put(model: Foreign, name: str, weight: Tensor, grid: Grid, scales: Tensor) -> None:
    """Keep the weight; and its grid, if the scales are ones that kick can store, else only the bits that it takes."""
    model.tensors[f"{name}.weight"] = weight
    model.code_bits[name] = grid.bits
    if torch.equal(grid.scale.half().float(), grid.scale):
        model.grids[name] = grid
    else:
        model.stored_bits[name] = _bits(grid.bits, scales, weight.numel()) + grid.bits * scales.numel() / weight.numel()


def _bits(code: int, scales: Tensor, weights: int) -> float:
    """Bits a weight takes with its share of the scales."""
    return code + 8 * scales.itemsize * scales.numel() / weights


_METHODS: dict[str, Callable[[Foreign, dict], None]] = {
    "gptq": _unpack_gptq,
    "awq": _unpack_awq,
    "compressed-tensors": _unpack_compressed_tensors,
}
