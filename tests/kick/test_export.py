"""Exported checkpoints, read back by readers that are not kick's."""

import copy
import json
from importlib.util import find_spec

import pytest
import torch
from conftest import logits, make_tiny_llama
from kick_compressors.rounding import round_to_nearest
from safetensors.torch import load_file
from test_checkpoint import make

from kick.adapters import LowRank, attach, attached
from kick.checkpoint import read
from kick.cli import main
from kick.errors import CheckpointError
from kick.export import find_format
from kick.gptq_layout import pack, pack_linear, unpack, unpack_linear
from kick.loading import load_model


def load(path, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)


def test_packing_by_hand():
    # 4 bits, eight codes in a word, the first in the lowest bits: 1 | 2 << 4 | 15 << 28
    packed = pack(torch.tensor([[1], [2], [0], [0], [0], [0], [0], [15]]), 4)
    assert packed.tolist() == [[(1 | 2 << 4 | 15 << 28) - 2**32]]
    # 3 bits: the eleventh code, 0b101, lies across words: two low bits end the first, one begins the second
    codes = torch.zeros(32, 1, dtype=torch.int64)
    codes[10] = 0b101
    assert pack(codes, 3).tolist() == [[(0b01 << 30)], [0b1], [0]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_unpacking_gives_the_codes_back(bits):
    codes = torch.randint(0, 2**bits, (64, 5), generator=torch.Generator().manual_seed(bits))
    assert torch.equal(unpack(pack(codes, bits), bits), codes)
    assert pack(codes, bits).shape == (64 * bits // 32, 5)


def test_codes_that_fill_no_word_are_refused():
    with pytest.raises(CheckpointError, match="20 codes of 4 bits do not fill"):
        pack(torch.zeros(20, 1), 4)


@pytest.mark.parametrize("minus_one", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_linear_comes_back_exactly(bits, minus_one):
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    found = round_to_nearest(weight, bits, 16, symmetric=False)
    back, grid = unpack_linear(pack_linear(found.weight, found.grid, minus_one), bits, minus_one)
    assert torch.equal(back, found.weight)
    assert torch.equal(grid.scale, found.grid.scale)


def by_the_definition(stored, name, config):
    """A weight of a GPTQ checkpoint in plain Python integers, from the description of the format."""
    bits, parts = config["bits"], {key: stored[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx")}
    offset = 1 if config["checkpoint_format"] == "gptq" else 0

    def bit(words, position):
        return (words[position // 32] & 0xFFFFFFFF) >> (position % 32) & 1

    def code(words, index):
        return sum(bit(words, index * bits + k) << k for k in range(bits))

    columns, rows = len(parts["g_idx"]), parts["scales"].shape[1]
    weight = torch.empty(rows, columns)
    for row in range(rows):
        words = parts["qweight"][:, row].tolist()
        for column in range(columns):
            group = parts["g_idx"][column].item()
            zero = (code(parts["qzeros"][group].tolist(), row) + offset) % 2**bits
            weight[row, column] = (code(words, column) - zero) * parts["scales"][group, row].float()
    return weight


@pytest.mark.parametrize(
    ("compressor", "level", "params"),
    [
        ("gptq", "4", {"group_size": 16, "act_order": "group"}),
        ("gptq", "3", {"group_size": 32, "symmetric": True}),
        ("rtn", "8", {"group_size": -1}),
        ("rtn", "2", {"group_size": 16}),
    ],
)
def test_a_packed_checkpoint_read_by_the_definition(tiny_model, tokenizer, tmp_path, compressor, level, params):
    if level == "3":  # 16 key rows of 3 bits would not fill words
        make_tiny_llama(num_key_value_heads=4).save_pretrained(tmp_path / "wide")
        tokenizer.save_pretrained(tmp_path / "wide")
        tiny_model = tmp_path / "wide"
    made = make(tiny_model, tmp_path / "made", compressor, level, **params)
    out = find_format("gptq")(made, tmp_path / "packed", "float32")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config == json.loads((out / "quantize_config.json").read_text())
    assert (config["quant_method"], config["bits"], config["group_size"]) == ("gptq", int(level), params["group_size"])
    assert config["desc_act"] == (params.get("act_order") == "group")
    assert config["sym"] == params.get("symmetric", False)
    stored = load_file(out / "model.safetensors")
    model = load(made.path)
    for name, module in model.named_modules():
        if f"{name}.qweight" in stored:
            assert torch.equal(by_the_definition(stored, name, config), module.weight.data), name
    assert sum(key.endswith("qweight") for key in stored) == 14
    assert "lm_head.weight" not in stored  # tied to the embeddings


def test_groups_without_an_index_are_as_large_as_is_said():
    """Forty inputs in groups of sixteen have a smaller last group, not three of fourteen."""
    made = round_to_nearest(torch.randn(8, 40, generator=torch.Generator().manual_seed(0)), 8, 16, symmetric=False)
    stored = pack_linear(made.weight, made.grid, minus_one=False)
    del stored["g_idx"]
    weight, _ = unpack_linear(stored, 8, minus_one=False, group_size=16)
    assert torch.equal(weight, made.weight)
    with pytest.raises(ValueError, match="3 groups of scales for 40 inputs in groups of 8"):
        unpack_linear(stored, 8, minus_one=False, group_size=8)


def test_linears_that_were_left_out_are_named(tiny_model, tmp_path):
    from kick.policy import LayerRule

    made = make(
        tiny_model, tmp_path / "made", "rtn", "4", layers=(LayerRule(match="down_proj", skip=True),), group_size=16
    )
    out = find_format("gptq")(made, tmp_path / "packed", "auto")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert list(config["dynamic"]) == [f"-:^model\\.layers\\.{i}\\.mlp\\.down_proj$" for i in range(2)]
    assert load_file(out / "model.safetensors")["model.layers.0.mlp.down_proj.weight"].dtype == torch.float16


@pytest.mark.skipif(find_spec("gptqmodel") is not None, reason="with gptqmodel transformers reads it")
def test_a_packed_checkpoint_by_itself_is_told_the_way_in(tiny_model, tmp_path, capsys):
    made = make(tiny_model, tmp_path / "made", "rtn", "4", group_size=16)
    out = find_format("gptq")(made, tmp_path / "packed", "auto")
    asked = ["evaluate", str(out), "--suite", "factoid_qa", "--limit", "2", "--data", "embedded"]
    assert main([*asked, "--out", str(tmp_path / "run")]) != 0
    assert "Its weights are quantised" in capsys.readouterr().err


def test_only_quantised_checkpoints_are_packed(tiny_model, tmp_path):
    made = make(tiny_model, tmp_path / "made", "magnitude", "0.5")
    with pytest.raises(CheckpointError, match="holds no quantised weights"):
        find_format("gptq")(made, tmp_path / "packed", "auto")
    assert not (tmp_path / "packed").exists()


def test_plain_export_has_the_same_logits(tiny_model, tmp_path, tokens):
    made = make(tiny_model, tmp_path / "made", "magnitude", "2:4")
    out = find_format("hf")(made, tmp_path / "plain", "auto")
    assert torch.equal(logits(load(out), tokens), logits(load(made.path), tokens))
    assert not (out / "kick.json").exists()


@pytest.mark.parametrize("tuned", [False, True])
def test_narrow_layers_are_filled_up_with_zeros_for_others(tiny_model, tmp_path, tokens, tuned):
    from peft import PeftModel

    asked = ["llm_pruner.skip_first=1", "llm_pruner.skip_last=0", "tune.data=embedded", "tune.steps=3"]
    asked += ["tune.merge=false", "tune.learning_rate=0.02", "tune.dropout=0", "calibration.samples=2"]
    setting = "llm_pruner@0.2 > tune" if tuned else "llm_pruner@0.2"
    params = [part for text in asked[: None if tuned else 2] + asked[-1:] for part in ("--param", text)]
    made = tmp_path / "made"
    assert main(["compress", str(tiny_model), setting, "--out", str(made), *params]) == 0
    assert (made / "shapes.json").is_file()
    out = find_format("hf")(read(made), tmp_path / "plain", "auto")
    plain = load(out)
    narrow = load_model(made, "float32", "cpu")
    assert plain.model.layers[1].mlp.up_proj.weight.shape == (64, 32)
    assert narrow.model.layers[1].mlp.up_proj.weight.shape[0] < 64
    if tuned:
        without = logits(plain, tokens)
        plain = PeftModel.from_pretrained(plain, out / "adapter").eval()
        assert not torch.allclose(logits(plain, tokens), without, atol=1e-3)
    assert torch.allclose(logits(plain, tokens), logits(narrow, tokens), atol=1e-5)


def test_adapters_go_where_their_model_goes(tiny_model):
    model = load_model(tiny_model, "float32", "cpu")
    name = "model.layers.0.mlp.up_proj"
    attach(model, {name: LowRank(torch.ones(2, 32), torch.ones(64, 2))})
    model.to(torch.bfloat16)
    held = attached(model)[name]
    assert (held.down.dtype, held.up.dtype, held.bits) == (torch.bfloat16, torch.bfloat16, 16 * 2 * 96)
    assert not any("adapter" in key for key in model.state_dict())


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.01), ("q8_0", 0.1)])
def test_gguf_read_by_transformers(tiny_model, tmp_path, tokens, dtype, tolerance, tokenizer):
    made = make(tiny_model, tmp_path / "made", "magnitude", "0.5")
    out = find_format("gguf")(made, tmp_path / "model.gguf", dtype)
    expected = logits(load(made.path), tokens)
    found = logits(load(tmp_path, gguf_file="model.gguf"), tokens)
    assert (found - expected).norm() <= tolerance * expected.norm()
    from transformers import AutoTokenizer

    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert read("The tide turned at noon.")["input_ids"] == tokenizer("The tide turned at noon.")["input_ids"]
    assert out.stat().st_size > 10_000
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_gguf_into_a_directory_is_named_after_the_setting(tiny_model, tmp_path):
    make(tiny_model, tmp_path / "made", "magnitude", "0.5")
    out = tmp_path / "exported"
    out.mkdir()
    assert main(["export", str(tmp_path / "made"), "--format", "gguf", "--out", str(out)]) == 0
    assert [path.name for path in out.iterdir()] == ["magnitude@0.5.gguf"]
    assert main(["export", str(tmp_path / "made"), "--format", "gguf", "--out", str(out)]) == 2


def test_gguf_says_what_each_token_is(tmp_path, tokenizer):
    from gguf import GGUFReader

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["zyzzyva"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    make_tiny_llama(vocab_size=604).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    made = make(tmp_path / "model", tmp_path / "made", "magnitude", "0.5")
    fields = GGUFReader(find_format("gguf")(made, tmp_path / "model.gguf", "auto")).fields
    types = fields["tokenizer.ggml.token_type"].contents()
    vocabulary = tokenizer.get_vocab()
    # llama.cpp's numbers: 1 normal, 3 control, 4 defined by the user, 5 unused
    assert [types[vocabulary[token]] for token in ("<s>", "<|end|>", "zyzzyva", "e")] == [3, 3, 4, 1]
    assert types[602:] == [5, 5]
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False


def test_gguf_of_another_architecture_is_refused(tmp_path, tokenizer):
    from kick.testing import tiny_model

    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    made = make(tmp_path / "gpt2", tmp_path / "made", "magnitude", "0.5")
    with pytest.raises(CheckpointError, match="this one is of gpt2's"):
        find_format("gguf")(made, tmp_path / "model.gguf", "auto")


def test_the_command(tiny_model, tmp_path, capsys):
    make(tiny_model, tmp_path / "made", "rtn", "4", group_size=16)
    arguments = ["export", str(tmp_path / "made"), "--out", str(tmp_path / "packed")]
    assert main([*arguments, "--format", "gptq", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "gptq"
    assert main([*arguments, "--format", "gptq"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main([*arguments, "--format", "gptk"]) == 2
    assert "Did you mean 'gptq'?" in capsys.readouterr().err
