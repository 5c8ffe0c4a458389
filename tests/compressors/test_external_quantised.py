"""Packed weights of other tools: a small checkpoint in each format, packed here from the format's definition."""

import copy
import json

import pytest
import torch
from brought import GPTQ_V1, PACKED, PROJECTIONS, bring, is_linear, state_of, write
from conftest import logits, make_tiny_llama
from safetensors.torch import load_file

from kick import checkpoint as checkpoints
from kick.calibration import CalibrationSpec
from kick.compress import Recipe, compress
from kick.export import find_format
from kick.gptq_layout import unpack
from kick.loading import load_model
from kick.models import find_source
from kick.settings import Setting


def on_a_grid(weight, bits, size, symmetric, seed):
    """Random codes, zero points and scales of `weight`'s shape, [out, in] and [out, in / size], and what they mean."""
    generator = torch.Generator().manual_seed(seed)
    out, columns = weight.shape
    codes = torch.randint(0, 2**bits, (out, columns), generator=generator)
    zero = torch.randint(1, 2**bits, (out, columns // size), generator=generator)
    if symmetric:
        zero = torch.full_like(zero, 2 ** (bits - 1))
    scale = (torch.rand(zero.shape, generator=generator) * 0.1 + 0.01).half()
    value = torch.empty(out, columns)
    for column in range(columns):
        value[:, column] = (codes[:, column] - zero[:, column // size]) * scale[:, column // size].float()
    return codes, zero, scale, value


def words(numbers, bits, order=None):
    """Unsigned numbers [rows, n] as int32 [rows, n * bits / 32], by Python's own integers."""
    packed = []
    for row in numbers.tolist():
        if order is not None:
            row = [row[start + place] for start in range(0, len(row), len(order)) for place in order]
        total = sum(number << (bits * index) for index, number in enumerate(row))
        line = [(total >> (32 * index)) & 0xFFFFFFFF for index in range(-(-len(row) * bits // 32))]
        packed.append([word - 2**32 if word >= 2**31 else word for word in line])
    return torch.tensor(packed, dtype=torch.int32)


def gptq_tensors(codes, zero, scale, bits, size, minus_one):
    stored = {
        "qweight": words(codes.T.T, bits).T,
        "qzeros": words(((zero - minus_one) % 2**bits).T, bits),
        "scales": scale.T,
    }
    stored["g_idx"] = torch.arange(codes.shape[1], dtype=torch.int32) // size
    return stored


def awq_tensors(codes, zero, scale, bits, size):
    order = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ: the word's places hold these columns
    return {"qweight": words(codes.T, bits, order), "qzeros": words(zero.T, bits, order), "scales": scale.T}


def packed_tensors(codes, zero, scale, bits, size):
    return {
        "weight_packed": words(codes, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(codes.shape),
        "weight_zero_point": words(zero.T, bits).T,
    }


def quantised(model, bits, size, symmetric, pack):
    """Tensors of `model` with every linear packed by `pack`, and the model that they mean."""
    meant = copy.deepcopy(model)
    tensors = state_of(model)
    for seed, name in enumerate(sorted(filter(is_linear, tensors))):
        codes, zero, scale, value = on_a_grid(tensors.pop(name), bits, size, symmetric, seed)
        tensors |= {name.removesuffix("weight") + key: part for key, part in pack(codes, zero, scale).items()}
        meant.get_parameter(name).data = value
    return tensors, meant


FORMATS = {
    "gptq": (4, lambda c, z, s: gptq_tensors(c, z, s, 4, 16, 1), {"quantization_config": GPTQ_V1}),
    "gptq 3 bits": (3, lambda c, z, s: gptq_tensors(c, z, s, 3, 16, 1), {"quantization_config": GPTQ_V1}),
    "gptq_v2": (
        8,
        lambda c, z, s: gptq_tensors(c, z, s, 8, 16, 0),
        {"quantization_config": {**GPTQ_V1, "bits": 8, "checkpoint_format": "gptq_v2"}},
    ),
    "awq": (
        4,
        lambda c, z, s: awq_tensors(c, z, s, 4, 16),
        {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}},
    ),
    "pack-quantized": (4, lambda c, z, s: packed_tensors(c, z, s, 4, 16), {"quantization_config": PACKED}),
    "pack-quantized 3 bits": (3, lambda c, z, s: packed_tensors(c, z, s, 3, 16), {"quantization_config": PACKED}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_packed_formats_mean_what_their_definition_says(name, tiny_model, tokenizer, tokens, tmp_path):
    bits, pack, more = FORMATS[name]
    model = make_tiny_llama(num_key_value_heads=4)  # zero points of 3 bits fill words only by the 32
    tensors, meant = quantised(model, bits, 16, False, pack)
    path = write(tmp_path / "foreign", model.config, tensors, tokenizer, **more)
    made = bring(path, tiny_model, tmp_path / "out")
    found = load_model(made.path, "float32", "cpu")
    assert torch.equal(logits(found, tokens), logits(meant, tokens))
    # a 16-bit scale and a zero point for each 16 weights
    assert made.record["bits_per_weight"] == pytest.approx(bits + (16 + bits) / 16)
    assert made.record["grid_violations"] == 0
    assert checkpoints.verify(made) == []
    assert made.record["stages"][0]["facts"]["format"] == more["quantization_config"]["quant_method"]


def test_autogptq_keeps_its_configuration_beside(tiny_llama, tiny_model, tokenizer, tokens, tmp_path):
    tensors, meant = quantised(tiny_llama, *(4, 16, True), FORMATS["gptq"][1])
    path = write(tmp_path / "foreign", tiny_llama.config, tensors, tokenizer)
    without = {key: value for key, value in GPTQ_V1.items() if key != "quant_method"}
    (path / "quantize_config.json").write_text(json.dumps(without))
    (path / "model.safetensors").rename(path / "gptq_model-4bit-16g.safetensors")
    made = bring(path, tiny_model, tmp_path / "out")
    assert torch.equal(logits(load_model(made.path, "float32", "cpu"), tokens), logits(meant, tokens))


def test_a_foreign_gptq_checkpoint_can_be_exported_again(tiny_llama, tiny_model, tokenizer, tmp_path):
    from kick.export.gptq import write as export

    tensors, _ = quantised(tiny_llama, 8, 16, False, FORMATS["gptq_v2"][1])
    path = write(tmp_path / "foreign", tiny_llama.config, tensors, tokenizer, **FORMATS["gptq_v2"][2])
    made = bring(path, tiny_model, tmp_path / "out")
    again = load_file(export(made, tmp_path / "gptq", "auto") / "model.safetensors")
    packed = [name for name in tensors if name.endswith(("qweight", "qzeros", "scales", "g_idx"))]
    assert len(packed) == 4 * 2 * len(PROJECTIONS)
    for name in packed:
        assert torch.equal(again[name], tensors[name]), name


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_bytes_with_scales(kind, tiny_llama, tiny_model, tokenizer, tokens, tmp_path):
    meant, tensors = copy.deepcopy(tiny_llama), state_of(tiny_llama)
    for name in filter(is_linear, list(tensors)):
        weight = tensors[name]
        if kind == "int8":  # one scale a row
            scale = (weight.abs().amax(dim=1, keepdim=True) / 127).half()
            codes = (weight / scale.float()).round().clamp(-128, 127).to(torch.int8)
        else:  # one scale a matrix
            scale = (weight.abs().max() / 448).reshape(1).to(torch.bfloat16)
            codes = (weight / scale.float()).to(torch.float8_e4m3fn)
        tensors |= {name: codes, f"{name}_scale": scale}
        meant.get_parameter(name).data = codes.float() * scale.float()
    config = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if kind == "int8" else "float-quantized",
        "config_groups": {"group_0": {"input_activations": {"num_bits": 8}}},
    }
    path = write(tmp_path / "foreign", tiny_llama.config, tensors, tokenizer, quantization_config=config)
    made = bring(path, tiny_model, tmp_path / "out")
    assert torch.allclose(logits(load_model(made.path, "float32", "cpu"), tokens), logits(meant, tokens), atol=1e-5)
    assert 8 < made.record["bits_per_weight"] < 9
    assert any("activations are meant to be quantised" in warning for warning in made.record["warnings"])
    assert checkpoints.verify(made) == []


def test_a_sparse_bitmask(tiny_llama, tiny_model, tokenizer, tokens, tmp_path):
    meant, tensors = copy.deepcopy(tiny_llama), state_of(tiny_llama)
    for name in filter(is_linear, list(tensors)):
        weight = tensors.pop(name)
        kept = torch.zeros_like(weight, dtype=torch.bool)
        kept[:, 0::4] = kept[:, 1::4] = True
        rows = [[sum(bit << place for place, bit in enumerate(row[i : i + 8])) for i in range(0, len(row), 8)]
                for row in kept.int().tolist()]  # fmt: skip
        tensors[f"{name}.compressed"] = weight[kept].reshape(weight.shape[0], -1)
        tensors[f"{name}.bitmask"] = torch.tensor(rows, dtype=torch.uint8)
        tensors[f"{name}.shape"] = torch.tensor(weight.shape)
        meant.get_parameter(name).data = weight * kept
    config = {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}
    path = write(tmp_path / "foreign", tiny_llama.config, tensors, tokenizer, quantization_config=config)
    made = bring(path, tiny_model, tmp_path / "out")
    assert torch.equal(logits(load_model(made.path, "float32", "cpu"), tokens), logits(meant, tokens))
    assert made.record["sparsity"] == 0.5
    assert made.record["stages"][0]["facts"]["pattern"] == "2:4"


def test_half_precision_keeps_grids_of_eight_bits(tiny_model, tokenizer, tmp_path):
    """In bfloat16 a weight may lie nearer to a neighbour of the code that it was rounded from."""
    bits, pack, more = FORMATS["gptq_v2"]
    model = make_tiny_llama(num_key_value_heads=4)
    tensors, _ = quantised(model, bits, 16, False, pack)
    path = write(tmp_path / "foreign", model.config, tensors, tokenizer, **more)
    source = find_source(str(tiny_model))
    setting = Setting(compressor="external", params={"path": str(path)})
    made = compress(Recipe.of(source, setting, CalibrationSpec(), "bfloat16"), tmp_path / "out")
    assert made.record["grid_violations"] == 0
    again = load_file(find_format("gptq")(made, tmp_path / "gptq", "auto") / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    exact = checkpoints.read_grids(made)[name]
    meant = unpack(again[f"{name}.qweight"], 8).T
    kept = load_model(made.path, "bfloat16", "cpu").get_parameter(f"{name}.weight")
    assert torch.equal(exact.values(meant).bfloat16(), kept)


def test_kicks_own_grids_come_along(tiny_model, tmp_path):
    source = find_source(str(tiny_model))
    setting = Setting(compressor="rtn", level="4", params={"group_size": 16})
    rtn = compress(Recipe.of(source, setting, CalibrationSpec()), tmp_path / "rtn")
    assert bring(rtn.path, tiny_model, tmp_path / "out").record["bits_per_weight"] == rtn.record["bits_per_weight"] < 6
