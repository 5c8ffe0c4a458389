"""What AST, Sheared LLaMA and LLM-Pruner leave behind: branches, composer's names, other shapes."""

import copy

import pytest
import torch
from brought import bring, is_linear, state_of, write
from conftest import logits, make_tiny_llama
from safetensors.torch import load_file, save_file
from torch import nn

from kick import adapters
from kick import checkpoint as checkpoints
from kick.blocks import find_decoder
from kick.calibration import CalibrationSpec
from kick.compress import Recipe, compress
from kick.errors import CheckpointError, ModelError
from kick.export import find_format
from kick.loading import load_model
from kick.models import find_source, fingerprint
from kick.settings import Setting, Stage


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
        recipe = Recipe.of(source, setting, CalibrationSpec(), stream=stream)
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
