"""Levels by the size of other models: what comes out is counted on the weights."""

import json

import pytest
from conftest import make_tiny_llama
from safetensors.torch import load_file

from kick import cli
from kick.config import parse
from kick.errors import ConfigError, ModelError
from kick.report.figures.retained import packed_bytes
from kick.sweep.sizes import with_sizes_as_levels

SIZES = {"small": 2, "middle": 3, "large": 6}  # blocks


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


def test_a_size_that_zeros_alone_do_not_reach_is_left_out(models):
    """Of the small model nothing is left but a bit for each weight of the large one, which has too many."""
    assert levels(sweep(models, same_size={"models": [str(models / "small")]}), "bfloat16")
    narrow = make_tiny_llama(num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2)
    narrow.save_pretrained(models / "narrow")
    assert levels(sweep(models, same_size={"models": [str(models / "narrow")]})) == []


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({"compressor": "gptq"}, "same_size is given to 'gptq'"),
        ({"compressor": "llm_pruner"}, "same_size is given to 'llm_pruner'"),
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
    assert run["config"]["settings"][0]["levels"] == [level]
