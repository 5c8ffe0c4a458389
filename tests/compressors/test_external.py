"""Models made elsewhere: a small checkpoint in each format, packed here from the format's definition."""

import copy
import json

import pytest
import torch
from conftest import make_tiny_llama
from kick_compressors.external import External
from safetensors.torch import load_file, save_file
from torch import nn

from kick import adapters
from kick import checkpoint as checkpoints
from kick.blocks import find_decoder
from kick.calibration import CalibrationSpec
from kick.compress import Recipe, compress, prepare
from kick.errors import CheckpointError, ConfigError, KickError, LevelError, ModelError
from kick.export import find_format
from kick.models import find_source, fingerprint, load_model, load_skeleton
from kick.packing import unpack
from kick.settings import Setting, Stage

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(2, 600, (2, 20), generator=torch.Generator().manual_seed(0))


def logits(model, tokens):
    with torch.no_grad():
        return model.eval()(tokens).logits


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items() if name != "lm_head.weight"}


def write(path, config, tensors, tokenizer=None, **more):
    """A model directory. `config`: a model's configuration, changed by `more`; None removes a key."""
    path.mkdir()
    found = {**json.loads(config.to_json_string()), **more}
    (path / "config.json").write_text(json.dumps({key: value for key, value in found.items() if value is not None}))
    save_file({name: value.contiguous() for name, value in tensors.items()}, path / "model.safetensors")
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return path


def bring(path, dense, out, then=(), **params):
    """The checkpoint of the setting `external` with `path`, beside the directory `dense`."""
    source = find_source(str(dense))
    setting = Setting(compressor="external", params={"path": str(path), **params}, then=then)
    spec = CalibrationSpec(samples=4, sequence_length=32)
    return compress(Recipe(source, fingerprint(source.path), setting, spec, "float32", "cpu"), out)


def is_linear(name):
    return name.endswith(".weight") and name.split(".")[-2] in PROJECTIONS


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


GPTQ_V1 = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": False}
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 16}}},
}
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


class Boosted(nn.Module):
    """AST's linear, from its equation: y = (W * mask) x + S (X x)."""

    def __init__(self, weight, mask, up, down, bias=None):
        super().__init__()
        self.parts = weight, mask, up, down
        self.bias = 0.0 if bias is None else bias

    def forward(self, x):
        weight, mask, up, down = self.parts
        return x @ (weight * mask).T + (x @ down.T) @ up.T + self.bias


def ast_model(model, k=16):
    """The 2:4 model with low-rank branches that AST would evaluate, and its tensors with the weights masked."""
    meant, tensors = copy.deepcopy(model), state_of(model)
    generator = torch.Generator().manual_seed(0)
    for linear in find_decoder(model).linears:
        weight = linear.weight.clone()
        smallest = weight.abs().reshape(-1, 4).argsort(dim=1)[:, :2]
        mask = torch.ones(weight.numel() // 4, 4).scatter_(1, smallest, 0.0).reshape(weight.shape)
        rank = weight.shape[1] // k
        down = torch.zeros(rank, weight.shape[1])
        for column in range(weight.shape[1]):
            down[column // k, column] = 1.0
        up = torch.randn(weight.shape[0], rank, generator=generator) * 0.05
        owner, _, last = linear.name.rpartition(".")
        setattr(meant.get_submodule(owner), last, Boosted(weight, mask, up, down, linear.module.bias))
        tensors[f"{linear.name}.weight"] = weight * mask
        tensors |= {f"{linear.name}.SLoRB_Weight": up, f"{linear.name}.x_proj": down}
    return meant, tensors


@pytest.mark.parametrize("stored", ["as it is", "SLoRA_Weight", "without x_proj", "without masks"])
def test_slorb_loads_as_an_adapter(stored, tiny_llama, tiny_model, tokenizer, tokens, tmp_path):
    meant, tensors = ast_model(tiny_llama)
    params = {}
    if stored == "SLoRA_Weight":
        tensors = {name.replace("SLoRB_Weight", "SLoRA_Weight"): value for name, value in tensors.items()}
    elif stored == "without x_proj":
        tensors = {name: value for name, value in tensors.items() if not name.endswith("x_proj")}
    elif stored == "without masks":
        tensors |= {name: value for name, value in state_of(tiny_llama).items() if is_linear(name)}
        params = {"mask": "2:4"}
    path = write(tmp_path / "foreign", tiny_llama.config, tensors, tokenizer)
    made = bring(path, tiny_model, tmp_path / "out", **params)
    found = load_model(made.path, "float32", "cpu")
    assert torch.allclose(logits(found, tokens), logits(meant, tokens), atol=1e-5)
    record = made.record
    assert (record["sparsity"], record["pattern_violations"]) == (0.5, 0)
    # the branch of a layer [out, in] holds in / 16 * (out + in) numbers
    branch = sum((w.shape[1] // 16) * sum(w.shape) for n, w in tensors.items() if is_linear(n))
    assert record["parameters"] == sum(p.numel() for p in tiny_llama.parameters()) + branch
    assert record["bits_per_weight"] > 32  # dense storage, and the branch on top
    assert checkpoints.verify(made) == []


def test_peft_reads_the_adapter_that_kick_writes(tiny_llama, tiny_model, tokenizer, tokens, tmp_path):
    peft = pytest.importorskip("peft")
    meant, tensors = ast_model(tiny_llama)
    made = bring(write(tmp_path / "foreign", tiny_llama.config, tensors, tokenizer), tiny_model, tmp_path / "out")
    plain = type(tiny_llama).from_pretrained(made.path)
    both = peft.PeftModel.from_pretrained(plain, made.path / adapters.FOLDER)
    assert torch.allclose(logits(both, tokens), logits(meant, tokens), atol=1e-5)
    exported = find_format("hf")(made, tmp_path / "plain", "auto")
    assert torch.equal(
        logits(load_model(exported, "float32", "cpu"), tokens), logits(load_model(made.path, "float32", "cpu"), tokens)
    )
    with pytest.raises(CheckpointError, match="low-rank adapters"):
        find_format("gguf")(made, tmp_path / "model.gguf", "auto")


def test_a_branch_over_a_dense_weight_is_refused(tiny_llama, tiny_model, tokenizer, tmp_path):
    _, tensors = ast_model(tiny_llama)
    tensors |= {name: value for name, value in state_of(tiny_llama).items() if is_linear(name)}
    path = write(tmp_path / "foreign", tiny_llama.config, tensors, tokenizer)
    with pytest.raises(ModelError, match=r"its mask was not stored") as raised:
        bring(path, tiny_model, tmp_path / "out")
    assert "mask: '2:4'" in raised.value.hint
    assert not (tmp_path / "out").exists()


def test_an_adapter_takes_the_scales_of_awq(tiny_llama, tiny_model, tokenizer, tokens, tmp_path):
    """AST is quantised afterwards, with its zeros kept: better than by plain rounding only if scales can be folded."""
    meant, tensors = ast_model(tiny_llama)
    path = write(tmp_path / "foreign", tiny_llama.config, tensors, tokenizer)
    errors = {}
    for quantiser in ("rtn", "awq"):
        then = (Stage(compressor=quantiser, level="3", params={"group_size": 16}),)
        made = bring(path, tiny_model, tmp_path / quantiser, then=then)
        assert (made.record["pattern_violations"], made.record["grid_violations"]) == (0, 0)
        assert made.record["sparsity"] >= 0.5
        assert checkpoints.verify(made) == []
        errors[quantiser] = (logits(load_model(made.path, "float32", "cpu"), tokens) - logits(meant, tokens)).norm()
        assert not any("nothing before 8 groups" in warning for warning in made.record["warnings"])
    assert errors["awq"] < errors["rtn"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_adapter_stays_when_its_checkpoint_is_compressed_again(
    stream, tiny_llama, tiny_model, tokenizer, tokens, tmp_path
):
    meant, tensors = ast_model(tiny_llama)
    made = bring(write(tmp_path / "foreign", tiny_llama.config, tensors, tokenizer), tiny_model, tmp_path / "out")
    source = find_source(str(made.path))
    for setting in (Setting(compressor="dense"), Setting(compressor="rtn", level="8", params={"group_size": 16})):
        recipe = Recipe(source, "x", setting, CalibrationSpec(), "float32", "cpu", stream)
        again = compress(recipe, tmp_path / setting.compressor)
        expected = logits(meant, tokens)
        assert (logits(load_model(again.path, "float32", "cpu"), tokens) - expected).norm() < 0.02 * expected.norm()
        assert again.record["parameters"] == made.record["parameters"]
        assert checkpoints.verify(again) == []
    third = bring(made.path, tiny_model, tmp_path / "third")
    assert torch.allclose(logits(load_model(third.path, "float32", "cpu"), tokens), logits(meant, tokens), atol=1e-5)


def test_an_adapter_is_part_of_a_models_identity(tiny_llama, tiny_model, tokenizer, tmp_path):
    _, tensors = ast_model(tiny_llama)
    made = bring(write(tmp_path / "foreign", tiny_llama.config, tensors, tokenizer), tiny_model, tmp_path / "out")
    before = fingerprint(made.path)
    stored = load_file(made.path / adapters.WEIGHTS)
    save_file({name: value * 3 for name, value in stored.items()}, made.path / adapters.WEIGHTS)
    assert fingerprint(made.path) != before


def test_one_projection_may_serve_many_linears(tiny_llama, tiny_model, tokenizer, tokens, tmp_path):
    meant, tensors = ast_model(tiny_llama)
    shared: dict = {}
    for name in [name for name in tensors if name.endswith("x_proj")]:
        tensors[name] = shared.setdefault(tensors[name].shape, tensors[name])
    path = write(tmp_path / "foreign", tiny_llama.config, {}, tokenizer)
    (path / "model.safetensors").unlink()
    torch.save(tensors, path / "pytorch_model.bin")
    torch.save({"step": 1}, path / "optimizer.pt")  # a trainer's, of no concern
    made = bring(path, tiny_model, tmp_path / "out", allow_pickle=True)
    assert torch.allclose(logits(load_model(made.path, "float32", "cpu"), tokens), logits(meant, tokens), atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_gpt2_as_ast_trains_it(bias, tiny_model, tokenizer, tokens, tmp_path):
    """nanoGPT's files: a compiled model's names, linears [out, in], a dense weight whose mask was not stored."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=600, initializer_range=0.2)
    model = GPT2LMHeadModel(config).eval()
    if not bias:
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.data.zero_()
    linears = {linear.name: linear.weight.clone() for linear in find_decoder(model).linears}  # [out, in]
    meant, branches = ast_model(model)
    tensors = {}
    for name, value in state_of(model).items():
        own = name.removesuffix(".weight")
        if bias or not name.endswith(".bias"):
            tensors[f"_orig_mod.{name}"] = linears.get(own, value)
    for name, value in branches.items():
        if name.endswith(("SLoRB_Weight", "x_proj")):
            tensors[f"_orig_mod.{name}"] = value
    tensors["_orig_mod.lm_head.weight"] = state_of(model)["transformer.wte.weight"].clone()
    path = write(tmp_path / "foreign", config, tensors, tokenizer)
    made = bring(path, tiny_model, tmp_path / "out", mask="2:4")
    assert torch.allclose(logits(load_model(made.path, "float32", "cpu"), tokens), logits(meant, tokens), atol=1e-4)
    assert (made.record["sparsity"], made.record["pattern_violations"]) == (0.5, 0)


def test_a_mask_falls_along_the_inputs_of_gpt2(tiny_model, tokenizer, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=600)).eval()
    path = write(tmp_path / "foreign", model.config, state_of(model), tokenizer)
    made = bring(path, tiny_model, tmp_path / "out", mask="2:4")
    assert (made.record["sparsity"], made.record["pattern_violations"]) == (0.5, 0)
    # GPT-2 stores [in, out]: neighbours along `in` lie one below the other
    stored = load_model(made.path, "float32", "cpu").transformer.h[0].attn.c_attn.weight.data
    assert ((stored != 0).reshape(8, 4, 96).sum(dim=1) == 2).all()


COMPOSER = {
    "model.embed_tokens.": "model.transformer.wte.",
    "model.norm.": "model.transformer.ln_f.",
    "model.layers.": "model.transformer.blocks.",
    "self_attn.q_proj": "attn.wq",
    "self_attn.k_proj": "attn.wk",
    "self_attn.v_proj": "attn.wv",
    "self_attn.o_proj": "attn.out_proj",
    "post_attention_layernorm": "ln_2",
    "input_layernorm": "ln_1",
}


def as_composer(name):
    for given, composer in COMPOSER.items():
        name = name.replace(given, composer)
    return name


@pytest.mark.parametrize("container", ["safetensors", "pickle"])
def test_composers_names_are_mapped(container, tiny_llama, tiny_model, tokenizer, tokens, tmp_path):
    tensors = {as_composer(name): value for name, value in state_of(tiny_llama).items()}
    tensors["model.transformer.blocks.0.attn.rotary_emb.inv_freq"] = torch.ones(4)
    path = write(tmp_path / "foreign", tiny_llama.config, tensors, tokenizer)
    params = {}
    if container == "pickle":
        (path / "model.safetensors").unlink()
        torch.save({"state": {"model": tensors}}, path / "latest-rank0.pt")
        with pytest.raises(ModelError, match=r"only latest-rank0.pt, a pickle"):
            bring(path, tiny_model, tmp_path / "refused")
        params = {"allow_pickle": True}
    made = bring(path, tiny_model, tmp_path / "out", **params)
    assert torch.equal(logits(load_model(made.path, "float32", "cpu"), tokens), logits(tiny_llama, tokens))
    assert any("composer's names were mapped" in warning for warning in made.record["warnings"])
    assert any("1 leftover rotary buffers" in warning for warning in made.record["warnings"])


def test_masks_that_were_not_applied_are_refused(tiny_llama, tiny_model, tokenizer, tmp_path):
    tensors = {as_composer(name): value for name, value in state_of(tiny_llama).items()}
    tensors["model.l0_module.masks.head.z_loga"] = torch.zeros(2, 4)
    path = write(tmp_path / "foreign", tiny_llama.config, tensors, tokenizer)
    with pytest.raises(ModelError, match=r"still holds the masks of its pruning.*l0_module"):
        bring(path, tiny_model, tmp_path / "out")


def test_a_whole_pickled_model_is_refused_and_not_run(tiny_llama, tiny_model, tokenizer, tmp_path):
    path = write(tmp_path / "foreign", tiny_llama.config, {}, tokenizer)
    (path / "model.safetensors").unlink()
    torch.save({"model": tiny_llama}, path / "pytorch_model.bin")  # as LLM-Pruner saves
    with pytest.raises(ModelError, match=r"holds more than tensors") as raised:
        bring(path, tiny_model, tmp_path / "out", allow_pickle=True)
    assert "save it as safetensors" in raised.value.hint


def sheared(**changes):
    """Narrower and shallower than the dense model, heads of 8."""
    settings = {"hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return make_tiny_llama(**{**settings, "num_key_value_heads": 2, "head_dim": 8, **changes})


@pytest.mark.parametrize(
    ("declared", "note"),
    [
        ({"num_key_value_heads": 4}, "num_key_value_heads was declared 4; by the tensors it is 2"),
        ({"head_dim": None}, "head_dim was missing; as in the dense model it is 8"),
        ({"intermediate_size": 64}, "intermediate_size was declared 64; by the tensors it is 48"),
        ({"num_hidden_layers": 2}, "num_hidden_layers was declared 2; by the tensors it is 1"),
    ],
)
def test_sheared_checkpoints_load_by_what_their_tensors_say(
    declared, note, tiny_model, tokenizer, tokens, tmp_path
):  # fmt: skip
    model = sheared()
    path = write(tmp_path / "foreign", model.config, state_of(model), tokenizer, **declared)
    made = bring(path, tiny_model, tmp_path / "out")
    assert torch.equal(logits(load_model(made.path, "float32", "cpu"), tokens), logits(model, tokens))
    assert any(note in warning for warning in made.record["warnings"]), made.record["warnings"]
    facts = made.record["stages"][0]["facts"]
    assert (facts["shape"]["hidden_size"], facts["dense_shape"]["hidden_size"]) == (16, 32)
    # embeddings 600 x 16; q and o 16 x 32, k and v 16 x 16, three of 48 x 16; norms 3 x 16
    assert facts["shape"]["parameters"] == 600 * 16 + 2 * 16 * 32 + 2 * 16 * 16 + 3 * 48 * 16 + 3 * 16
    assert made.record["parameters"] == facts["shape"]["parameters"]
    assert facts["dense_shape"]["parameters"] == sum(p.numel() for p in make_tiny_llama().parameters())


def test_pruned_heads_without_a_head_dim_are_read_as_the_dense_models(
    tiny_llama, tiny_model, tokenizer, tokens, tmp_path
):
    """Half the heads of every layer are gone, and four are still declared: two of 8 channels, not four of 4."""
    zeroed, tensors = copy.deepcopy(tiny_llama), state_of(tiny_llama)
    for layer in range(2):
        prefix = f"model.layers.{layer}.self_attn."
        for part, rows in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8)):
            tensors[f"{prefix}{part}.weight"] = tensors[f"{prefix}{part}.weight"][:rows]
        tensors[f"{prefix}o_proj.weight"] = tensors[f"{prefix}o_proj.weight"][:, :16]
        zeroed.get_parameter(f"{prefix}o_proj.weight").data[:, 16:] = 0
    path = write(tmp_path / "foreign", tiny_llama.config, tensors, tokenizer, head_dim=None)
    made = bring(path, tiny_model, tmp_path / "out")
    assert torch.allclose(logits(load_model(made.path, "float32", "cpu"), tokens), logits(zeroed, tokens), atol=1e-5)
    assert any("as in the dense model it is 8" in warning for warning in made.record["warnings"])


def test_a_layer_wider_than_declared_is_exported_whole(tiny_llama, tiny_model, tokenizer, tokens, tmp_path):
    tensors = state_of(tiny_llama)
    for part in ("gate_proj", "up_proj"):
        tensors[f"model.layers.1.mlp.{part}.weight"] = tensors[f"model.layers.1.mlp.{part}.weight"][:40]
    tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"][:, :40]
    path = write(tmp_path / "foreign", tiny_llama.config, tensors, tokenizer, intermediate_size=48)
    made = bring(path, tiny_model, tmp_path / "out")
    plain = type(tiny_llama).from_pretrained(find_format("hf")(made, tmp_path / "plain", "auto"))
    expected = logits(load_model(made.path, "float32", "cpu"), tokens)
    assert torch.allclose(logits(plain, tokens), expected, atol=1e-5)


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


def test_half_precision_keeps_grids_of_eight_bits(tiny_model, tokenizer, tmp_path):
    """In bfloat16 a weight may lie nearer to a neighbour of the code that it was rounded from."""
    bits, pack, more = FORMATS["gptq_v2"]
    model = make_tiny_llama(num_key_value_heads=4)
    tensors, _ = quantised(model, bits, 16, False, pack)
    path = write(tmp_path / "foreign", model.config, tensors, tokenizer, **more)
    source = find_source(str(tiny_model))
    setting = Setting(compressor="external", params={"path": str(path)})
    made = compress(Recipe(source, "x", setting, CalibrationSpec(), "bfloat16", "cpu"), tmp_path / "out")
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
    rtn = compress(Recipe(source, "x", setting, CalibrationSpec(), "float32", "cpu"), tmp_path / "rtn")
    assert bring(rtn.path, tiny_model, tmp_path / "out").record["bits_per_weight"] == rtn.record["bits_per_weight"] < 6


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


def test_layers_of_different_widths(tiny_llama, tiny_model, tokenizer, tokens, tmp_path):
    """LLM-Pruner keeps some layers whole: in layer 1 one of two key heads and 24 of 64 channels are gone.

    The reference is the dense model with the same heads and channels set to zero, which gives the same logits.
    """
    zeroed, tensors = copy.deepcopy(tiny_llama), state_of(tiny_llama)
    prefix = "model.layers.1."
    for part, rows in (("self_attn.q_proj", 16), ("self_attn.k_proj", 8), ("self_attn.v_proj", 8),
                       ("mlp.gate_proj", 40), ("mlp.up_proj", 40)):  # fmt: skip
        tensors[f"{prefix}{part}.weight"] = tensors[f"{prefix}{part}.weight"][:rows]
    for part, columns in (("self_attn.o_proj", 16), ("mlp.down_proj", 40)):
        tensors[f"{prefix}{part}.weight"] = tensors[f"{prefix}{part}.weight"][:, :columns]
        zeroed.get_parameter(f"{prefix}{part}.weight").data[:, columns:] = 0
    path = write(tmp_path / "foreign", tiny_llama.config, tensors, tokenizer)
    made = bring(path, tiny_model, tmp_path / "out")
    found = load_model(made.path, "float32", "cpu")
    assert torch.allclose(logits(found, tokens), logits(zeroed, tokens), atol=1e-5)
    assert made.record["parameters"] == sum(value.numel() for value in tensors.values())
    assert checkpoints.verify(made) == []
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(tiny_llama).from_pretrained(made.path)
    plain = type(tiny_llama).from_pretrained(find_format("hf")(made, tmp_path / "plain", "auto"))
    assert torch.allclose(logits(plain, tokens), logits(zeroed, tokens), atol=1e-5)
    with pytest.raises(CheckpointError, match="layers of different widths"):
        find_format("gguf")(made, tmp_path / "model.gguf", "auto")


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
