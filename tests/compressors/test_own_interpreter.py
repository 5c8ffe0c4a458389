"""Compressors of other libraries: what crosses to their interpreters and back. A script stands in for the library."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, make_tiny_llama
from kick_compressors.gptqmodel import GPTQModel
from kick_compressors.llmcompressor import LLMCompressor
from kick_compressors.rounding import round_to_nearest

from kick import checkpoint as checkpoints
from kick.blocks import find_decoder
from kick.calibration import CalibrationSpec
from kick.compress import Recipe, compress, prepare
from kick.errors import ConfigError, KickError, LevelError
from kick.levels import Bits, Sparsity
from kick.loading import load_model
from kick.models import find_source
from kick.settings import Setting, Stage

# What a library would do, in a few lines: rounds every linear to the nearest 4 bits and packs it.
LIBRARY = """
import json, sys
from pathlib import Path
if sys.argv[1] == "-c":
    print("7.0")
    sys.exit()
script, request = sys.argv[1:]
job = json.loads(Path(request).read_text())
Path({seen!r}).write_text(json.dumps([Path(script).name, job]))
print("a line of its log")
if {fails}:
    sys.exit("CUDA out of memory")
import torch
from safetensors.torch import load_file, save_file
from kick.gptq_layout import pack_linear
from kick_compressors.rounding import round_to_nearest
tokens = load_file(job["tokens"])["tokens"]
assert tokens.shape == (4, 32), tokens.shape
tensors = {{}}
for name, value in load_file(Path(job["model"]) / "model.safetensors").items():
    if name.endswith("_proj.weight"):
        found = round_to_nearest(value, {bits}, 16, symmetric=False)
        packed = pack_linear(found.weight, found.grid, True)
        tensors |= {{name.removesuffix("weight") + key: part for key, part in packed.items()}}
    else:
        tensors[name] = value
out = Path(job["out"])
out.mkdir()
save_file(tensors, out / "model.safetensors")
config = json.loads((Path(job["model"]) / "config.json").read_text())
config["quantization_config"] = {{"quant_method": "gptq", "bits": {bits}, "group_size": 16}}
(out / "config.json").write_text(json.dumps(config))
(out / "result.json").write_text(json.dumps({{"version": "7.0", "wall": 1.5, "cpu": 1.0, "peak": 1000}}))
"""


def interpreter(folder, fails=False, bits=4):
    """An executable that answers as a Python with the library would."""
    (folder / "library.py").write_text(LIBRARY.format(seen=str(folder / "seen.json"), fails=fails, bits=bits))
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{folder}/library.py" "$@"\n')
    python.chmod(0o755)
    return str(python)


def make(model, out, compressor="gptqmodel", level="4", **params):
    source = find_source(str(model))
    setting = Setting(compressor=compressor, level=level, params=params)
    spec = CalibrationSpec(samples=4, sequence_length=32)
    return compress(Recipe.of(source, setting, spec), out)


def test_what_the_library_wrote_becomes_a_checkpoint(tiny_model, tmp_path):
    made = make(tiny_model, tmp_path / "out", python=interpreter(tmp_path), group_size=16, symmetric=False)
    script, job = json.loads((tmp_path / "seen.json").read_text())
    assert script == "run_gptqmodel.py"
    assert (job["level"], job["group_size"], job["symmetric"], job["method"]) == ("4", 16, False, "gptq")
    assert not Path(job["model"]).exists()  # the scratch is gone
    dense, found = (load_model(path, "float32", "cpu") for path in (tiny_model, made.path))
    expected = round_to_nearest(dense.model.layers[0].mlp.up_proj.weight.data, 4, 16, symmetric=False)
    assert torch.equal(found.model.layers[0].mlp.up_proj.weight, expected.weight)
    assert made.record["stages"][0]["facts"] == {
        "library": "gptqmodel",
        "version": "7.0",
        "wall": 1.5,
        "cpu": 1.0,
        "peak": 1000,
    }
    assert made.record["bits_per_weight"] == pytest.approx(4 + 20 / 16)
    assert checkpoints.verify(made) == []


def test_a_failure_shows_the_end_of_its_log(tiny_model, tmp_path):
    with pytest.raises(KickError, match=r"gptqmodel 7.0 failed \(exit 1\)") as raised:
        make(tiny_model, tmp_path / "out", python=interpreter(tmp_path, fails=True))
    assert raised.value.hint.splitlines() == ["a line of its log", "CUDA out of memory"]
    assert not (tmp_path / "out").exists()


def test_other_bits_than_asked_are_refused(tiny_model, tmp_path):
    with pytest.raises(KickError, match=r"was asked for 4 bits and gave \[2\]"):
        make(tiny_model, tmp_path / "out", python=interpreter(tmp_path, bits=2), group_size=16)


def test_zeros_that_a_library_fills_are_counted(tiny_model, tmp_path):
    """After a stage that tells nothing of linears, as of those that do."""
    python = interpreter(tmp_path)
    source = find_source(str(tiny_model))
    params = {"python": python, "group_size": 16, "symmetric": False}
    # rounding keeps zeros, so the library is made to shift every weight
    library = tmp_path / "library.py"
    library.write_text(library.read_text().replace("round_to_nearest(value,", "round_to_nearest(value + 0.3,"))
    pruned = make_pruned(tiny_model, tmp_path / "pruned")
    then = (Stage(compressor="gptqmodel", level="4", params=params),)
    setting = Setting(compressor="external", params={"path": str(pruned)}, then=then)
    spec = CalibrationSpec(samples=4, sequence_length=32)
    made = compress(Recipe.of(source, setting, spec), tmp_path / "out")
    before, after = (load_model(path, "float32", "cpu") for path in (pruned, made.path))
    pairs = zip(find_decoder(before).linears, find_decoder(after).linears, strict=True)
    expected = sum(int(((a.weight == 0) & (b.weight != 0)).sum()) for a, b in pairs)
    assert expected > 1000
    assert made.record["stages"][0]["mask_violations"] == expected
    assert any("are no longer zero" in warning for warning in made.record["warnings"])


def test_bits_as_stored_end_with_the_weights_that_had_them(tiny_model, tokenizer, tmp_path):
    """A float8 checkpoint that a library then quantises is no longer one of 8 bits."""
    from test_external import is_linear, state_of, write

    model = make_tiny_llama()
    tensors = state_of(model)
    for name in filter(is_linear, list(tensors)):
        scale = (tensors[name].abs().max() / 448).reshape(1)
        tensors |= {name: (tensors[name] / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}
    config = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    path = write(tmp_path / "float8", model.config, tensors, tokenizer, quantization_config=config)
    setting = Setting(compressor="external", params={"path": str(path)})
    spec = CalibrationSpec(samples=4, sequence_length=32)
    source = find_source(str(tiny_model))
    first = compress(Recipe.of(source, setting, spec), tmp_path / "first")
    assert 8 < first.record["bits_per_weight"] < 8.1
    params = {"python": interpreter(tmp_path), "group_size": 16}
    then = (Stage(compressor="gptqmodel", level="4", params=params),)
    chained = setting.model_copy(update={"then": then})
    second = compress(Recipe.of(source, chained, spec), tmp_path / "second")
    assert second.record["bits_per_weight"] == 4 + 20 / 16


def make_pruned(model, out):
    source = find_source(str(model))
    setting = Setting(compressor="magnitude", level="0.5")
    return compress(Recipe.of(source, setting, CalibrationSpec()), out).path


def test_a_relative_interpreter_and_one_that_does_not_run(tiny_model, tmp_path, monkeypatch):
    interpreter(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert make(tiny_model, tmp_path / "out", python="python", group_size=16).record["sparsity"] < 1
    (tmp_path / "text").write_text("not a program")
    with pytest.raises(ConfigError, match="cannot be run: Permission denied"):
        GPTQModel(GPTQModel.Params(python="text")).inputs()


def test_an_interpreter_without_the_library(tmp_path):
    with pytest.raises(ConfigError, match="has no gptqmodel") as raised:
        GPTQModel(GPTQModel.Params(python=sys.executable)).inputs()
    assert "Make an environment" in raised.value.hint
    with pytest.raises(ConfigError, match="no interpreter /nowhere/python"):
        LLMCompressor(LLMCompressor.Params(python="/nowhere/python")).inputs()
    assert GPTQModel(GPTQModel.Params(python=interpreter(tmp_path))).inputs() == {"gptqmodel": "7.0"}


def test_methods_and_levels_must_fit():
    def method(level, **params):
        return LLMCompressor(LLMCompressor.Params(python="x", **params)).job(level)

    assert method(Bits(width=4)) == "gptq"
    assert method(Sparsity(fraction=0.5)) == "sparsegpt"
    assert method(Sparsity(fraction=0.5), method="wanda") == "wanda"
    with pytest.raises(LevelError, match=r"level '4' with method wanda"):
        method(Bits(width=4), method="wanda")
    with pytest.raises(LevelError, match="not one that GPTQModel packs"):
        prepare(Setting(compressor="gptqmodel", level="5", params={"python": "x"}))


@pytest.mark.parametrize(
    ("compressor", "level", "sparsity"),
    [
        ("llmcompressor", "2:4", 0.5),
        ("llmcompressor", "0.25", 0.25),
        ("llmcompressor", "4", None),
        ("gptqmodel", "4", None),
    ],
)
def test_the_real_library(compressor, level, sparsity, tiny_model, tmp_path):
    python = os.environ.get(f"KICK_TEST_{compressor.upper()}")
    if python is None:
        pytest.skip(f"set KICK_TEST_{compressor.upper()} to an interpreter with {compressor}")
    made = make(tiny_model, tmp_path / "out", compressor, level, python=python, group_size=16)
    if sparsity is not None:
        assert made.record["sparsity"] == pytest.approx(sparsity, abs=0.02)
    else:
        assert 4 < made.record["bits_per_weight"] < 7
    assert REPOSITORY not in made.path.parents
    assert checkpoints.verify(made) == []
