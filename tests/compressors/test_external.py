"""Models made elsewhere: what is read, what is refused, what is recorded."""

import copy

import pytest
import torch
from brought import GPTQ_V1, PACKED, bring, is_linear, state_of, write
from conftest import logits, make_tiny_llama
from kick_compressors.external import External
from safetensors.torch import save_file

from kick import checkpoint as checkpoints
from kick.compress import prepare
from kick.errors import ConfigError, KickError, LevelError, ModelError
from kick.loading import load_model, load_skeleton
from kick.settings import Setting, Stage


def test_only_the_files_that_count_are_read(tiny_llama, tiny_model, tokenizer, tokens, tmp_path):
    path = write(tmp_path / "foreign", tiny_llama.config, state_of(tiny_llama), tokenizer)
    old = {name: value * 0 for name, value in state_of(tiny_llama).items()}
    save_file(old, path / "model_old.safetensors")
    made = bring(path, tiny_model, tmp_path / "out")
    assert torch.equal(logits(load_model(made.path, "float32", "cpu"), tokens), logits(tiny_llama, tokens))
    (path / "model.safetensors").rename(path / "part-1.safetensors")
    with pytest.raises(ModelError, match=r"is in part-1\.safetensors and in another file"):
        bring(path, tiny_model, tmp_path / "twice")


def test_a_hybrid_architecture_is_read_as_it_is(tiny_model, tokenizer, tokens, tmp_path):
    """Some of its layers have no attention: nothing of a Llama's configuration can be told from it."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    kinds = ["conv", "full_attention"]
    model = Lfm2ForCausalLM(Lfm2Config(**sizes, num_hidden_layers=2, vocab_size=600, layer_types=kinds)).eval()
    made = bring(write(tmp_path / "f", model.config, state_of(model), tokenizer), tiny_model, tmp_path / "out")
    assert torch.allclose(logits(load_model(made.path, "float32", "cpu"), tokens), logits(model, tokens), atol=1e-5)


def test_code_that_a_configuration_names_is_not_fetched(tiny_llama, tiny_model, tokenizer, tmp_path):
    path = write(tmp_path / "f", tiny_llama.config, state_of(tiny_llama), tokenizer, attn_implementation="who/kernel")
    with pytest.raises(ModelError, match="names code to fetch"):
        bring(path, tiny_model, tmp_path / "out")
    with pytest.raises(ModelError, match="names code to fetch"):
        load_model(path, "float32", "cpu")


def test_a_pattern_that_one_linear_breaks_is_still_the_pattern(tiny_llama, tiny_model, tokenizer, tmp_path):
    tensors = state_of(tiny_llama)
    odd, dense = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    for name in filter(is_linear, list(tensors)):
        if name == odd:
            tensors[name][:, :4] = 0  # an eighth, in whole groups: 7 of 8 groups of each of the 64 rows keep all four
        elif name != dense:
            tensors[name][:, 0::4] = tensors[name][:, 1::4] = 0
    made = bring(write(tmp_path / "f", tiny_llama.config, tensors, tokenizer), tiny_model, tmp_path / "out")
    assert made.record["stages"][0]["facts"]["pattern"] == "2:4"
    violations = made.record["layers"][odd.removesuffix(".weight")]["pattern_violations"]
    assert violations == made.record["pattern_violations"] == 64 * 7
    assert any("1 linears are not pruned" in warning for warning in made.record["warnings"])


def test_gguf_files_take_no_mask(real_model, tiny_model):
    with pytest.raises(ConfigError, match=r"mask and ignore with a \.gguf file"):
        External(External.Params(path=str(real_model.path), mask="2:4")).compress(
            load_skeleton(tiny_model, "float32"), None, None
        )


def test_shapes_that_contradict_each_other_are_named(tiny_llama, tiny_model, tokenizer, tmp_path):
    tensors = state_of(tiny_llama)
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(12, 32)
    path = write(tmp_path / "foreign", tiny_llama.config, tensors, tokenizer)
    with pytest.raises(ModelError, match="layer 1 has 32 rows of queries and 12 of keys"):
        bring(path, tiny_model, tmp_path / "out")


def test_a_missing_layer_is_named(tiny_model, tokenizer, tmp_path):
    model = make_tiny_llama(num_hidden_layers=3)
    tensors = {name: value for name, value in state_of(model).items() if ".layers.1." not in name}
    path = write(tmp_path / "foreign", model.config, tensors, tokenizer)
    with pytest.raises(ModelError, match="layer 1 of 3 is missing"):
        bring(path, tiny_model, tmp_path / "out")


def test_a_plain_model_with_zeros_has_its_violations_counted(tiny_llama, tiny_model, tokenizer, tmp_path):
    tensors = state_of(tiny_llama)
    for name in filter(is_linear, list(tensors)):
        tensors[name][:, 0::4] = tensors[name][:, 1::4] = 0
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4:6] = 1.0  # one group of four keeps them all
    path = write(tmp_path / "foreign", tiny_llama.config, tensors, tokenizer)
    found = bring(path, tiny_model, tmp_path / "found").record
    assert found["stages"][0]["facts"]["pattern"] == "2:4"
    assert found["pattern_violations"] == 1
    assert found["layers"]["model.layers.0.mlp.up_proj"]["pattern_violations"] == 1
    asked = bring(path, tiny_model, tmp_path / "asked", pattern="1:4").record
    groups = sum(value.numel() // 4 for name, value in tensors.items() if is_linear(name))
    assert asked["pattern_violations"] == groups  # each keeps two or four


def test_an_unstructured_model_has_no_pattern(tiny_llama, tiny_model, tokenizer, tmp_path):
    tensors = state_of(tiny_llama)
    for seed, name in enumerate(filter(is_linear, list(tensors))):
        tensors[name][torch.rand(tensors[name].shape, generator=torch.Generator().manual_seed(seed)) < 0.5] = 0
    record = bring(write(tmp_path / "f", tiny_llama.config, tensors, tokenizer), tiny_model, tmp_path / "out").record
    assert record["stages"][0]["facts"]["pattern"] is None
    assert record["sparsity"] == pytest.approx(0.5, abs=0.02)


def test_tensors_left_over_or_missing_are_named(tiny_llama, tiny_model, tokenizer, tmp_path):
    tensors = state_of(tiny_llama)
    tensors["model.layers.0.mlp.up_proj.mask"] = torch.ones(64, 32)
    path = write(tmp_path / "more", tiny_llama.config, tensors, tokenizer)
    with pytest.raises(ModelError, match=r"'model.layers.0.mlp.up_proj.mask' \(1 such tensors\)"):
        bring(path, tiny_model, tmp_path / "out")
    made = bring(path, tiny_model, tmp_path / "out", ignore=["*.mask"])
    assert any("left out as asked" in warning for warning in made.record["warnings"])
    del tensors["model.norm.weight"], tensors["model.layers.0.mlp.up_proj.mask"]
    path = write(tmp_path / "less", tiny_llama.config, tensors, tokenizer)
    with pytest.raises(ModelError, match=r"no tensor 'model.norm.weight' \(1 missing\)"):
        bring(path, tiny_model, tmp_path / "less-out")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised by 'bitsandbytes'"),
        ({"quantization_config": {**GPTQ_V1, "checkpoint_format": "marlin"}}, "GPTQ's format 'marlin'"),
        ({"quantization_config": {"quant_method": "awq", "version": "gemv"}}, "AWQ's layout 'gemv'"),
        ({"quantization_config": {**PACKED, "transform_config": {"r1": {}}}}, "rotates its activations"),
        ({"model_type": "no_such_model"}, "configuration that transformers does not take"),
    ],
)
def test_what_cannot_be_read_is_named(config, message, tiny_llama, tiny_model, tokenizer, tmp_path):
    path = write(tmp_path / "foreign", tiny_llama.config, state_of(tiny_llama), tokenizer, **config)
    with pytest.raises(KickError, match=message):
        bring(path, tiny_model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["a method", "a truncated file", "a file that is none", "a .gguf file that is none"])
def test_what_can_be_told_before_a_sweep_begins_is_told_then(what, tiny_llama, tokenizer, tmp_path):
    more = {"quantization_config": {"quant_method": "bitsandbytes"}} if what == "a method" else {}
    path = write(tmp_path / "foreign", tiny_llama.config, state_of(tiny_llama), tokenizer, **more)
    weights = path / "model.safetensors"
    if what == "a truncated file":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "a file that is none":
        weights.write_text("version https://git-lfs.github.com/spec/v1")
    elif what == "a .gguf file that is none":
        path = tmp_path / "foreign.gguf"
        path.write_bytes(b"GGUF")
    message = "quantised by 'bitsandbytes'" if what == "a method" else "cannot be read"
    with pytest.raises(ModelError, match=message):
        External(External.Params(path=str(path))).inputs()


def test_gpt2_as_the_hub_stores_it(tiny_model, tokenizer, tokens, tmp_path):
    """Names without the prefix `transformer.`, and the constants that old versions stored."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=600)).eval()
    tensors = {name.removeprefix("transformer."): value for name, value in state_of(model).items()}
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    path = write(tmp_path / "foreign", model.config, tensors, tokenizer)
    made = bring(path, tiny_model, tmp_path / "out")
    assert torch.equal(logits(load_model(made.path, "float32", "cpu"), tokens), logits(model, tokens))


@pytest.mark.real_model
def test_a_gguf_file_keeps_the_bits_that_it_was_stored_in(real_model, real_checkpoint, tmp_path):
    made = bring(real_model.path, real_checkpoint.path, tmp_path / "out")
    # Q4_1: 32 codes of 4 bits with a scale and a minimum in half precision
    assert made.record["layers"]["model.layers.0.mlp.up_proj"]["bits_per_weight"] == 4 + 2 * 16 / 32
    assert made.record["parameters"] == real_checkpoint.record["parameters"]
    assert checkpoints.verify(made) == []


def test_its_own_tokenizer_comes_along_and_calibrates_later_stages(tiny_llama, tiny_model, tokenizer, tmp_path):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["zyzzyva"])
    model = make_tiny_llama(vocab_size=601)
    path = write(tmp_path / "foreign", model.config, state_of(model), other)
    made = bring(path, tiny_model, tmp_path / "out", then=(Stage(compressor="wanda", level="0.5"),))
    from transformers import AutoTokenizer

    assert "zyzzyva" in AutoTokenizer.from_pretrained(made.path).get_vocab()
    assert made.record["calibration"] is not None
    without = write(tmp_path / "without", model.config, state_of(model))
    with pytest.raises(ModelError, match="holds no tokenizer"):
        bring(without, tiny_model, tmp_path / "refused")


def test_it_stands_first_and_takes_no_level(tiny_model):
    second = Stage(compressor="external", params={"path": str(tiny_model)})
    with pytest.raises(LevelError, match="can only stand first"):
        prepare(Setting(compressor="wanda", level="0.5", then=(second,)))
    with pytest.raises(LevelError, match="takes none"):
        prepare(Setting(compressor="external", level="0.5", params={"path": str(tiny_model)}))
    with pytest.raises(KickError, match="pattern"):
        prepare(Setting(compressor="external", params={"path": str(tiny_model), "pattern": "half"}))


def test_its_files_are_part_of_its_identity(tiny_llama, tokenizer, tmp_path):
    path = write(tmp_path / "foreign", tiny_llama.config, state_of(tiny_llama), tokenizer)
    before = External(External.Params(path=str(path))).inputs()
    changed = state_of(tiny_llama)
    changed["model.norm.weight"][0] = 2.0
    save_file(changed, path / "model.safetensors")
    assert External(External.Params(path=str(path))).inputs() != before
    with pytest.raises(ModelError, match="no model called"):
        External(External.Params(path=str(tmp_path / "nowhere"))).inputs()
