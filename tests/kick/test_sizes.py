"""Levels by the size of other models: what comes out is counted on the weights."""

import json
import shutil

import pytest
import torch
from conftest import make_tiny_llama
from safetensors.torch import load_file, save_file

from kick import cli
from kick.errors import ConfigError, ModelError
from kick.measured import packed_bytes
from kick.sweep.sizes import with_sizes_as_levels
from kick.sweep_file import parse

SIZES = {"small": 2, "middle": 3, "large": 6}  # blocks


@pytest.fixture
def narrow(tmp_path):
    folder = tmp_path / "narrow"
    make_tiny_llama(num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer):
    """Three models of one width, and the tokenizer that all have."""
    folder = tmp_path_factory.mktemp("sizes")
    for name, blocks in SIZES.items():
        make_tiny_llama(num_hidden_layers=blocks).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def sweep(models, model="large", **grid):
    grid = {"compressor": "magnitude", "same_size": {"models": [str(models / "small")]}, **grid}
    return parse({"model": str(models / model), "settings": [grid], "suites": ["perplexity"]}, "test")


def levels(config, dtype="float32"):
    return [setting.level for setting in with_sizes_as_levels(config, dtype).all_settings()[1:]]


def parameters(folder):
    return [tensor for file in folder.glob("*.safetensors") for tensor in load_file(file).values()]


def made(models, tmp_path, by):
    """The large model's checkpoint at the level that the small one's size gives, from the command line."""
    config = sweep(models, same_size={"models": [str(models / "small")], "by": by})
    (level,) = levels(config)
    (tmp_path / "sweep.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    out = tmp_path / "out"
    assert cli.main(["compress", str(tmp_path / "sweep.yaml"), f"magnitude@{level}", "--out", str(out)]) == 0
    return out


def test_as_many_parameters_that_are_not_zero(models, tmp_path):
    out = made(models, tmp_path, "parameters")
    left = sum(int((tensor != 0).sum()) for tensor in parameters(out))
    small = sum(tensor.numel() for tensor in parameters(models / "small"))
    assert left == pytest.approx(small, rel=2e-3)


def test_as_many_bytes(models, tmp_path):
    out = made(models, tmp_path, "bytes")
    record = json.loads((out / "kick.json").read_text())
    dense, small = (sum(4 * tensor.numel() for tensor in parameters(folder)) for folder in (out, models / "small"))
    names = record["bytes"] - dense  # and shapes, which take much of a tiny model's file
    assert packed_bytes(record) - names == pytest.approx(small, rel=2e-3)


def test_a_bit_for_each_weight_costs_more_where_weights_are_small(models):
    config = sweep(models)
    single, half = (float(levels(config, dtype)[0]) for dtype in ("float32", "bfloat16"))
    assert half - single == pytest.approx(1 / 16 - 1 / 32, abs=1e-4)


def test_sizes_that_a_model_is_not_above_are_left_out(models):
    every = {"models": [str(models / name) for name in SIZES], "by": "parameters"}
    found = {name: levels(sweep(models, name, same_size=every)) for name in SIZES}
    assert [len(found[name]) for name in SIZES] == [0, 1, 2]
    assert float(found["large"][0]) > float(found["large"][1])  # the smaller the sparser


def test_a_size_that_zeros_alone_do_not_reach_is_left_out_and_said(models, narrow, tmp_path, capsys):
    """The large model's embeddings alone are larger."""
    config = sweep(models, same_size={"models": [str(narrow), str(models / "small")]})
    assert len(levels(config)) == 1
    (tmp_path / "sweep.yaml").write_text(json.dumps(config.model_dump(mode="json") | {"data": "embedded"}))
    assert cli.main(["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"no share of zeros makes {models / 'large'} the size of {narrow} (bytes)" in said
    assert f"magnitude@{levels(config)[0]} is worth the bytes of {models / 'small'}" in said


def test_models_of_one_size_are_one_level(models):
    twice = {"models": [str(models / "small"), str(models / "small") + "/"]}
    assert len(levels(sweep(models, same_size=twice))) == 1


def test_weights_are_counted_once_whatever_their_files_hold(models, tmp_path):
    """A tied head that is stored too, masks among the tensors, a second set of files."""
    shutil.copytree(models / "small", tmp_path / "small")
    shutil.copytree(models / "large", tmp_path / "large")
    for name in ("small", "large"):
        tensors = load_file(tmp_path / name / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.mask"] = torch.ones(200, 200)
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        save_file(tensors, tmp_path / name / "consolidated.safetensors", metadata={"format": "pt"})
    assert levels(sweep(tmp_path)) == levels(sweep(models))


def test_layers_of_several_widths_count_as_they_are(models, tmp_path):
    """A pruned checkpoint's configuration says too much."""
    out = str(tmp_path / "pruned")
    params = ["importance=l2", "skip_first=1", "skip_last=1", "calibration.samples=2"]
    asked = [word for param in params for word in ("--param", param)]
    assert cli.main(["compress", str(models / "large"), "llm_pruner@0.3", *asked, "--out", out]) == 0
    assert (tmp_path / "pruned" / "shapes.json").is_file()
    (tmp_path / "small").symlink_to(models / "small")
    (level,) = levels(sweep(tmp_path, "pruned", same_size={"models": [str(tmp_path / "small")], "by": "parameters"}))
    linears = load_file(tmp_path / "pruned" / "model.safetensors")
    prunable = sum(t.numel() for name, t in linears.items() if name.endswith("_proj.weight"))
    own, small = (sum(t.numel() for t in parameters(folder)) for folder in (tmp_path / "pruned", models / "small"))
    assert float(level) == pytest.approx((own - small) / prunable, abs=1e-4)


def test_quantised_weights_have_no_size_that_shapes_tell(models, tmp_path):
    shutil.copytree(models / "small", tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    with pytest.raises(ModelError, match="packed holds quantised weights"):
        levels(sweep(models, same_size={"models": [str(tmp_path / "packed")]}))


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({"compressor": "gptq"}, "same_size is given to 'gptq'"),
        ({"compressor": "llm_pruner"}, "same_size is given to 'llm_pruner'"),
        ({"compressor": "dense"}, "same_size is given to 'dense'"),
        ({"then": ["rtn@8"]}, "beside layers, allocation or then"),
        ({"layers": [{"first": 1, "skip": True}]}, "beside layers, allocation or then"),
        ({"levels": ["0.5"]}, "levels and same_size are two ways"),
        ({"same_size": {"models": []}}, "settings.0.same_size.models"),
        ({"same_size": {"models": ["/nowhere"]}}, "nowhere"),
        ({"same_size": {"models": ["x"], "by": "layers"}}, "'layers'"),
    ],
)
def test_what_has_no_such_level(models, grid, words):
    with pytest.raises((ConfigError, ModelError), match=words):
        levels(sweep(models, **grid))


def test_the_plan_and_the_run_hold_the_numbers(models, tmp_path):
    config = sweep(models)
    content = config.model_dump(mode="json") | {"suites": [{"suite": "factoid_qa", "limit": 4}], "data": "embedded"}
    (tmp_path / "sweep.yaml").write_text(json.dumps(content))
    out = tmp_path / "run"
    assert cli.main(["sweep", str(tmp_path / "sweep.yaml"), "--out", str(out)]) == 0
    run = json.loads((out / "run.json").read_text())
    (level,) = levels(config)
    assert [setting["name"] for setting in run["settings"]] == ["dense", f"magnitude@{level}"]
    assert run["config"]["settings"][0]["same_size"]["levels"] == {str(models / "small"): level}
    assert cli.main(["sweep", str(tmp_path / "sweep.yaml"), "--out", str(out), "--executor", "local"]) == 0
    assert cli.main(["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "two"), "--executor", "local"]) == 0
    assert (out / "scores.csv").read_bytes() == (tmp_path / "two" / "scores.csv").read_bytes()
