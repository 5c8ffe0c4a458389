"""Sheared LLaMA: masks, constraint, masked forward, cut, reference losses, domain weights, each against a reference."""

import copy
import json
import math

import pytest
import torch
import transformers
from conftest import make_tiny_llama
from kick_compressors.llama import ModelShape, layers_of
from kick_compressors.sheared import hard_concrete
from kick_compressors.sheared.compressor import Sheared, Shearing, count_parameters, random_masks
from kick_compressors.sheared.cut import cut
from kick_compressors.sheared.masked import MaskedModel
from kick_compressors.sheared.masks import Masks
from kick_compressors.sheared.shape import PAPER, find_shape, parse_shape
from kick_compressors.training.domains import (
    LLAMA2_LOSSES,
    LLAMA2_PARAMETERS,
    Domains,
    Loading,
    predicted_loss,
    updated_weights,
)
from kick_compressors.training.objective import Objective
from kick_compressors.training.spec import Training
from kick_compressors.training.text import open_mixture
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from kick.errors import ConfigError, DataError, KickError, LevelError, UnknownNameError
from kick.levels import Shape

TOKENS = torch.arange(40).reshape(2, 20) * 7 % 600
LLAMA2 = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
)


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def some_masks(source, target, within=False):
    """z with exactly the target's units open, each at a value of its own in (0, 1]."""
    generator = torch.Generator().manual_seed(3)
    z = random_masks(source, target, within, seed=1)
    return {name: value * (0.3 + 0.7 * torch.rand(value.shape, generator=generator)) for name, value in z.items()}


# Hard concrete


@pytest.mark.parametrize("beta", [0.83, 2 / 3])
@pytest.mark.parametrize("log_alpha", [-3.0, -0.5, 0.0, 1.0, 4.0])
def test_the_probability_of_being_open_is_that_of_samples(beta, log_alpha):
    uniform = (torch.arange(1_000_000) + 0.5) / 1_000_000  # every quantile once: no chance in it
    z = hard_concrete.sample(torch.tensor(log_alpha), uniform, beta)
    assert (
        abs(float((z > 0).float().mean()) - float(hard_concrete.open_probability(torch.tensor(log_alpha), beta))) < 2e-3
    )
    assert z.min() >= 0
    assert z.max() <= 1


def test_a_sample_is_the_formula():
    z = hard_concrete.sample(torch.tensor([0.7]), torch.tensor([0.3]), 0.83)
    s = 1 / (1 + math.exp(-(math.log(0.3) - math.log(0.7) + 0.7) / 0.83))
    assert float(z) == pytest.approx(1.2 * s - 0.1, abs=1e-6)


def test_final_masks_keep_exactly_the_target_and_the_first_among_equals():
    z = hard_concrete.deterministic(torch.tensor([[1.0, 3.0, 1.0, 1.0]]), 2, 0.83)
    assert (z > 0).tolist() == [[True, True, False, False]]
    assert float(z[0, 1]) == pytest.approx(1 / (1 + math.exp(-0.8 * 3.0 / 0.83)), abs=1e-6)


# Masked = cut


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 4), (6, 3)])
@pytest.mark.parametrize("within", [False, True])
def test_the_cut_model_is_the_masked_model(tied, heads, kv_heads, within):
    width = 8 * heads
    model = make_tiny_llama(
        hidden_size=width,
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
    )
    source = ModelShape.of(model.config)
    if within and source.queries_per_key == 1:
        pytest.skip("nothing inside a group of one")
    head_target = kv_heads if within else heads - source.queries_per_key
    target = find_shape(f"3x{4 * head_target}x40x{head_target}", source, within)
    z = some_masks(source, target, within)
    small = cut(model, z, target, within)
    masked = MaskedModel(model, within)
    masked.z = z
    torch.testing.assert_close(logits(model), logits(small), atol=1e-5, rtol=0)
    assert small.config.tie_word_embeddings == tied
    assert small.config.num_hidden_layers == 3


@pytest.mark.parametrize("only", ["layer", "hidden", "head", "intermediate"])
def test_each_mask_alone_is_its_cut(only):
    model = make_tiny_llama(num_hidden_layers=3)
    source = ModelShape.of(model.config)
    numbers = {"layers": 3, "hidden": 32, "intermediate": 64, "heads": 4}
    numbers |= {
        "layer": {"layers": 2},
        "hidden": {"hidden": 20},
        "head": {"heads": 2},
        "intermediate": {"intermediate": 24},
    }[only]
    target = find_shape("x".join(map(str, numbers.values())), source)
    z = {name: torch.ones_like(value) for name, value in random_masks(source, target, False, 0).items()}
    z[only] = some_masks(source, target)[only]
    small = cut(model, z, target)
    masked = MaskedModel(model)
    masked.z = z
    torch.testing.assert_close(logits(model), logits(small), atol=1e-5, rtol=0)
    assert not torch.allclose(logits(model), logits(make_tiny_llama(num_hidden_layers=3)), atol=1e-2)


def test_all_ones_is_the_source_and_removed_hooks_leave_nothing():
    model = make_tiny_llama()
    before = logits(model)
    source = ModelShape.of(model.config)
    masked = MaskedModel(model)
    masked.z = {name: torch.ones_like(z) for name, z in random_masks(source, source, False, 0).items()}
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    masked.z["hidden"][0, :5] = 0
    assert not torch.allclose(logits(model), before, atol=1e-2)
    masked.remove()
    assert torch.equal(logits(model), before)


def test_blocks_computed_twice_meet_the_same_masks():
    model = make_tiny_llama().train()
    source = ModelShape.of(model.config)
    target = find_shape("2x20x24x2", source)
    masked = MaskedModel(model)
    gradients = []
    for twice in (False, True):
        if twice:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        masked.z = {name: z.requires_grad_() for name, z in some_masks(source, target).items()}
        model(TOKENS, use_cache=False).logits.square().mean().backward()
        gradients.append(masked.z["intermediate"].grad)
    torch.testing.assert_close(*gradients)


def test_the_cut_model_is_loaded_by_plain_transformers(tmp_path):
    model = make_tiny_llama()
    target = find_shape("1x16x24x2", ModelShape.of(model.config))
    small = cut(model, some_masks(ModelShape.of(model.config), target), target)
    small.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(small), logits(loaded))


# Shapes


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("1.3B", 1_345_423_360), ("2.7B", 2_701_560_320), ("370M", 373_867_520), (None, 6_738_415_616)],
)
def test_the_papers_shapes_have_its_parameters(name, parameters):
    source = ModelShape.of(LLAMA2)
    target = find_shape(name, source) if name else source
    assert count_parameters(LlamaForCausalLM, target.configuration(LLAMA2)) == parameters


def test_smollm2_cut_to_384_x_24_has_its_parameters(real_model):
    from kick.loading import load_skeleton

    skeleton = load_skeleton(real_model.path, "float32")
    target = find_shape("24x384x1024x6", ModelShape.of(skeleton.config))
    assert target.kv_heads == 2
    assert count_parameters(type(skeleton), target.configuration(skeleton.config)) == 56_641_920


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("40x2048x5504x16", "layers"),
        ("24x8192x5504x16", "hidden"),
        ("24x2048x20000x16", "intermediate"),
        ("24x2048x5504x64", "heads"),
        ("24x2050x5504x16", "do not divide the hidden size"),
        ("24x2048x5504", "no target shape"),
        ("1.4B", "no target shape"),
    ],
)
def test_a_target_that_cannot_be_cut_says_what_does_not_fit(text, said):
    with pytest.raises(LevelError, match=said):
        find_shape(text, ModelShape.of(LLAMA2))


def test_heads_must_fit_the_groups():
    source = ModelShape(30, 576, 1536, 9, 3, 64)
    with pytest.raises(LevelError, match="4 heads do not come out of groups of 3"):
        find_shape("24x384x1024x4", source)
    assert find_shape("24x384x1024x3", source).kv_heads == 1
    assert find_shape("24x384x1024x6", source, keep_kv_heads=True).kv_heads == 3


def test_another_models_configuration_is_a_target(tmp_path):
    make_tiny_llama(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, num_key_value_heads=1).save_pretrained(
        tmp_path
    )
    assert parse_shape(f"like:{tmp_path}") is None
    source = ModelShape.of(make_tiny_llama().config)
    assert find_shape(f"like:{tmp_path}", source) == ModelShape(1, 16, 64, 2, 1, 8)
    make_tiny_llama(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, num_key_value_heads=2).save_pretrained(
        tmp_path
    )
    with pytest.raises(LevelError, match="2 key heads among 2 query heads"):
        find_shape(f"like:{tmp_path}", source)
    assert PAPER["1.3B"] == (24, 2048, 5504, 16)


# The constraint


@pytest.mark.parametrize("kind", ["shares", "counts"])
def test_the_constraint_brings_the_expected_sizes_to_the_target(kind):
    source = ModelShape(8, 64, 96, 8, 4, 8)
    target = ModelShape(6, 40, 64, 4, 2, 8)
    masks = Masks(source, target, 0.83, seed=0)
    optimizer = torch.optim.AdamW(
        [
            {"params": list(masks.log_alphas.values())},
            {"params": list(masks.lambdas.values()), "maximize": True},
        ],
        lr=1.0,
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, Training(steps=300, warmup=0.1).rate)
    for step in range(300):
        masks.clamp()
        loss = masks.lagrangian(step / 60, kind)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    masks.clamp()
    sizes = {"layer": 8, "hidden": 64, "head": 4, "intermediate": 96}
    for name, expected in masks.expected_open().items():
        assert abs(float(expected.detach().mean()) - masks.keep[name]) / sizes[name] < 0.005, name
    for name, z in masks.final().items():
        assert (z > 0).sum(dim=1).tolist() == [masks.keep[name]] * len(z)


def test_the_constraint_is_the_formula():
    masks = Masks(ModelShape(2, 4, 6, 2, 1, 2), ModelShape(1, 2, 3, 2, 1, 2), 0.83, seed=0)
    for name, (linear, quadratic) in {
        "layer": (1.0, 0.5),
        "hidden": (2.0, 0.25),
        "head": (0.0, 0.0),
        "intermediate": (3.0, 1.0),
    }.items():
        masks.lambdas[name].data = torch.tensor([linear, quadratic])
    open_ = {name: value.detach() for name, value in masks.expected_open().items()}
    over = {"layer": open_["layer"] - 1, "hidden": open_["hidden"] - 2, "intermediate": open_["intermediate"] - 3}
    by_hand = sum(
        (a * over[name] + b * over[name] ** 2).sum()
        for name, a, b in (("layer", 1, 0.5), ("hidden", 2, 0.25), ("intermediate", 3, 1))
    )
    assert masks.lagrangian(1.0, "counts").item() == pytest.approx(by_hand.item(), rel=1e-6)
    shares = sum(
        (a * over[name] / size + b * (over[name] / size) ** 2).mean()
        for name, a, b, size in (("layer", 1, 0.5, 2), ("hidden", 2, 0.25, 4), ("intermediate", 3, 1, 6))
    )
    assert masks.lagrangian(1.0, "shares").item() == pytest.approx(shares.item(), rel=1e-6)


# Domains


PREDICTED = {
    "cc": (1.8712, 1.9643, 2.1401),
    "github": (0.6883, 0.7459, 0.8694),
    "book": (2.0325, 2.1393, 2.3625),
    "stackexchange": (1.5353, 1.6117, 1.7791),
    "wiki": (1.6297, 1.7590, 2.0470),
    "arxiv": (1.3560, 1.4449, 1.6637),
    "c4": (2.0328, 2.1251, 2.3139),
}


@pytest.mark.parametrize("domain", PREDICTED)
def test_the_scaling_law_gives_the_papers_reference_losses(domain):
    for parameters, wanted in zip((2_701_560_320, 1_345_423_360, 373_867_520), PREDICTED[domain], strict=True):
        assert predicted_loss(LLAMA2_PARAMETERS, LLAMA2_LOSSES[domain], parameters) == pytest.approx(wanted, abs=2e-4)


def test_a_law_through_losses_that_do_not_fall_is_refused():
    with pytest.raises(ConfigError, match="do not fall"):
        predicted_loss((1e9, 2e9, 4e9), (2.0, 2.1, 1.9), 5e8)
    with pytest.raises(ConfigError, match="no curve"):
        predicted_loss((1e9, 2e9, 4e9), (2.0, 1.9, 1.7), 5e8)  # ever faster
    with pytest.raises(ConfigError, match="three"):
        predicted_loss((1e9, 2e9), (2.0, 1.9), 5e8)


def test_weights_move_to_the_domain_that_lags():
    new = updated_weights({"a": 0.5, "b": 0.5}, {"a": 3.0, "b": 2.0}, {"a": 2.0, "b": 2.0})
    assert new["a"] == pytest.approx(0.7311, abs=1e-4)
    assert sum(new.values()) == pytest.approx(1)
    below = {"a": 2.0, "b": 1.0}  # b is better than its reference
    assert updated_weights({"a": 0.5, "b": 0.5}, below, {"a": 2.0, "b": 2.0}) == {"a": 0.5, "b": 0.5}
    code = updated_weights({"a": 0.5, "b": 0.5}, below, {"a": 2.0, "b": 2.0}, clamp=False)
    assert code["b"] == pytest.approx(0.2689, abs=1e-4)
    floored = updated_weights({"a": 1.0, "b": 0.0}, below, {"a": 2.0, "b": 2.0}, floor=1e-4)
    assert floored["b"] == pytest.approx(5e-5)


def test_a_cap_gives_the_rest_to_the_others_in_proportion():
    new = updated_weights(
        {"a": 0.8, "b": 0.15, "c": 0.05}, dict.fromkeys("abc", 1.0), dict.fromkeys("abc", 1.0), cap=0.6
    )
    assert new == pytest.approx({"a": 0.6, "b": 0.3, "c": 0.1})
    with pytest.raises(ConfigError, match="cap"):
        updated_weights({"a": 0.5, "b": 0.5}, {"a": 1, "b": 1}, {"a": 1, "b": 1}, cap=0.4)


# The whole of it, on a tiny model


@pytest.fixture
def domains(tmp_path):
    """Two domains: one that the tiny model can learn (a few words again and again), one of many words."""
    import random

    rng = random.Random(0)
    words = [f"w{index:x}" for index in range(60)]
    for name, vocabulary in (("easy", words[:3]), ("hard", words)):
        (tmp_path / "data" / name).mkdir(parents=True)
        rows = [{"text": " ".join(rng.choices(vocabulary, k=60))} for _ in range(60)]
        (tmp_path / "data" / name / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "data"


def shear(tokenizer, data, level="1x16x24x2", workspace=None, progress=lambda *_: None, **params):
    given = {
        "data": str(data),
        "held_out": 4,
        "pruning": {"steps": 30, "batch_size": 4, "sequence_length": 32, "learning_rate": 1e-3, "warmup": 0.1},
        "continuing": {"steps": 30, "batch_size": 4, "sequence_length": 32, "learning_rate": 1e-3},
        "pruning_every": 10,
        "continuing_every": 10,
        **params,
    }
    compressor = Sheared(Sheared.Params(**given))
    compressor.tokenizer, compressor.workspace = tokenizer, workspace
    return compressor.compress(make_tiny_llama(), Shape(name=level), None, progress=progress), compressor


def test_shearing_gives_the_target_and_tells_all_on_the_way(tokenizer, domains, tmp_path):
    small, compressor = shear(tokenizer, domains, workspace=tmp_path / "work")
    assert ModelShape.of(small.config) == ModelShape(1, 16, 24, 2, 1, 8)
    assert sum(p.numel() for p in small.parameters()) == compressor.expected_parameters
    facts = compressor.facts
    assert facts["training"]["tokens"] == 60 * 4 * 32
    assert len(facts["layers_kept"]) == 1
    assert set(facts["reference_losses"]) == {"easy", "hard"}
    for stage, steps in (("pruning", 30), ("continuing", 30)):
        folder = tmp_path / "work" / "kept" / stage
        rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
        assert len(rows) == steps
        assert (folder / "training.png").stat().st_size > 10_000
        assert set(rows[9]["domain_loss"]) == set(rows[9]["domain_reference"]) == {"easy", "hard"}
    assert "lambda_head" in json.loads((tmp_path / "work/kept/pruning/history.jsonl").read_text().splitlines()[0])


class PlugPulledError(Exception):
    """Somebody pulled the plug."""


@pytest.mark.parametrize("after", [12, 45])
def test_shearing_goes_on_in_either_stage(tokenizer, domains, tmp_path, after):
    """Stopped while it prunes (12 of 30 steps) and while it trains on (15 of 30): the same model in the end."""
    seen = 0

    def stop(*_):
        nonlocal seen
        seen += 1
        if seen == after:
            raise PlugPulledError

    stage = {"steps": 30, "batch_size": 4, "sequence_length": 32, "learning_rate": 1e-3, "checkpoint_every": 10}
    given = {"pruning": stage, "continuing": stage}
    whole, expected = shear(tokenizer, domains, **given)
    with pytest.raises(PlugPulledError):
        shear(tokenizer, domains, workspace=tmp_path / "work", progress=stop, **given)
    resumed, compressor = shear(tokenizer, domains, workspace=tmp_path / "work", **given)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert compressor.facts["domain_weights"] == expected.facts["domain_weights"]
    for key in ("steps", "tokens", "first_loss", "last_loss"):
        assert compressor.facts["training"][key] == expected.facts["training"][key]


def test_models_like_llama_with_biases_and_no_head_dim_are_cut_right():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = Qwen2Config(**shape, num_key_value_heads=2, vocab_size=600, initializer_range=0.2)
    model = Qwen2ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    source = ModelShape.of(model.config)
    target = find_shape("2x16x24x2", source)
    z = some_masks(source, target)
    small = cut(model, z, target)
    masked = MaskedModel(model)
    masked.z = z
    torch.testing.assert_close(logits(model), logits(small), atol=1e-5, rtol=1e-5)
    assert small.config.head_dim == 8


def like_llama(kind):
    """Tiny models that are built like Llama but for something in their layers."""
    shape = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 600, "initializer_range": 0.2, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "smollm3":
        config = transformers.SmolLM3Config(**shape, no_rope_layers=[1, 0, 1, 0], tie_word_embeddings=True)
        return transformers.SmolLM3ForCausalLM(config).eval()
    return transformers.HunYuanDenseV1ForCausalLM(transformers.HunYuanDenseV1Config(**shape, head_dim=8)).eval()


def test_what_a_configuration_says_of_each_layer_goes_with_the_layers():
    """Layers 1 and 3 of this model have no rotary embedding; without layer 0 they are its first and third."""
    model = like_llama("smollm3")
    source = ModelShape.of(model.config)
    target = find_shape("3x16x24x2", source)
    z = some_masks(source, target)
    z["layer"] = torch.tensor([[0.0, 0.9, 0.8, 0.7]])
    small = cut(model, z, target)
    assert small.config.no_rope_layers == [0, 1, 0]
    masked = MaskedModel(model)
    masked.z = z
    torch.testing.assert_close(logits(model), logits(small), atol=1e-5, rtol=1e-5)


def test_layers_with_more_parts_than_are_cut_are_refused():
    with pytest.raises(LevelError, match="HunYuanDenseV1DecoderLayer has a query_layernorm"):
        layers_of(like_llama("hunyuan"))


def test_masks_that_have_not_settled_in_some_layer_are_said():
    """Half the layers with one head too many and half with one too few are right on the whole, and nowhere."""
    source, target = ModelShape(4, 64, 96, 8, 8, 8), ModelShape(4, 64, 96, 4, 4, 8)
    masks = Masks(source, target, 0.83, seed=0)
    assert set(masks.off()) == {"head"}  # all of them are open
    with torch.no_grad():
        for row, opened in enumerate((3, 5, 3, 5)):
            masks.log_alphas["head"][row] = torch.where(torch.arange(8) < opened, 8.0, -8.0)
    opened, asked, row, rows = masks.off()["head"]
    assert (round(opened, 1), asked, row, rows) == (5.0, 4, 1, 4)  # closed ones may be open, with hardly a chance
    with torch.no_grad():
        masks.log_alphas["head"][:] = torch.where(torch.arange(8) < 4, 8.0, -8.0)
    assert masks.off() == {}


def test_masks_are_within_their_bounds_at_the_first_step():
    source, target = ModelShape(4, 64, 96, 8, 8, 8), ModelShape(4, 64, 96, 4, 4, 8)
    masks = Masks(source, target, 0.83, seed=0)
    assert float(masks.log_alphas["layer"].detach().max()) > math.log(100)
    shearing = Shearing(make_tiny_llama(), masks, Sheared.Params(), None, 0)
    shearing.begin_step(0, Training())
    assert all(float(alpha.detach().max()) < math.log(100) + 1e-6 for alpha in masks.log_alphas.values())


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"masks": "random", "beta": 0.5}, "beta is about learning masks"),
        ({"continuing_every": 10}, "continuing_every is about training on"),
        ({"dynamic": False, "cap": 0.5}, "cap is about new weights"),
    ],
)
def test_what_would_do_nothing_is_refused(params, says):
    with pytest.raises(ValidationError, match=says):
        Sheared.Params(**params)


def test_text_that_decides_weights_is_read_from_the_same_field(tmp_path):
    (tmp_path / "held.jsonl").write_text(json.dumps({"content": "a passage"}))
    params = {"data": "embedded", "validation": str(tmp_path / "held.jsonl"), "text_field": "content"}
    held = Sheared.Params(**params).held_out_beginnings("content")
    assert list(held) == ["a passage"]
    assert "a passage" in list(Sheared(Sheared.Params(**{**params, "data": str(tmp_path / "held.jsonl")})).trained_on())


def test_a_domain_that_lags_gains_weight(tokenizer, domains):
    """The reference of one domain is far below what can be reached, that of the other far above."""
    _, compressor = shear(tokenizer, domains, reference={"easy": 100.0, "hard": 0.5})
    assert compressor.facts["domain_weights"]["hard"] > 0.9
    _, compressor = shear(tokenizer, domains, reference={"easy": 100.0, "hard": 0.5}, dynamic=False)
    assert compressor.facts["domain_weights"] == {"easy": 0.5, "hard": 0.5}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_domain_that_was_never_seen_gains_weight(tokenizer, domains, seed):
    """The model knows one domain; both are to reach the same loss."""
    model = make_tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    known = open_mixture(str(domains), tokenizer, 16, seed, weights={"easy": 1.0, "hard": 0.0})
    for step in range(40):
        tokens = known.batch(step, 16).tokens
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    mixture = open_mixture(str(domains), tokenizer, 16, seed, held_out=4)
    followed = Domains(mixture, Loading(reference={"easy": 1.0, "hard": 1.0}), model, 1000)
    before = followed.update(Objective(model))["domain_weight"]["hard"]
    after = followed.update(Objective(model))["domain_weight"]["hard"]
    assert 0.5 < before < after


def test_losses_of_models_of_unknown_sizes_are_refused():
    losses = {"easy": (3.0, 2.5, 2.2)}
    with pytest.raises(ValidationError, match="say in sizes how many parameters they have"):
        Sheared.Params(reference=losses)
    assert Sheared.Params(reference=losses, sizes=(1e8, 1e9, 1e10)).sizes == (1e8, 1e9, 1e10)


def test_what_is_wrong_with_domains_is_said(tokenizer, domains):
    with pytest.raises(UnknownNameError, match="Did you mean 'hard'"):
        shear(tokenizer, domains, weights={"hrad": 1.0})
    with pytest.raises(UnknownNameError, match="reference loss for the domain named 'hard'"):
        shear(tokenizer, domains, reference={"easy": 1.0})
    with pytest.raises(UnknownNameError, match="reference loss"):
        shear(tokenizer, domains, reference="llama2")
    with pytest.raises(DataError, match="held out"):
        shear(tokenizer, domains, held_out=4000)
    steps = []
    with pytest.raises(ConfigError, match=r"a cap of 0.4 on 2 domains"):
        shear(tokenizer, domains, cap=0.4, progress=lambda *step: steps.append(step))
    assert not steps
    (domains / "empty").mkdir()
    with pytest.raises(DataError, match="holds no"):
        shear(tokenizer, domains)
    with pytest.raises(LevelError, match="layers"):
        shear(tokenizer, domains, level="9x16x24x2")


def test_sampled_domains_follow_their_weights(tokenizer, domains):
    from scipy.stats import chisquare

    mixture = open_mixture(str(domains), tokenizer, 16, 0, weights={"easy": 3, "hard": 1})
    drawn = [origin.split()[0] for step in range(100) for origin in mixture.batch(step, 20).origin]
    seen = [drawn.count("easy"), drawn.count("hard")]
    assert chisquare(seen, [1500, 500]).pvalue > 1e-3


def test_masks_may_not_be_left_out_of_the_errors():
    with pytest.raises(KickError, match="takes a target shape"):
        Sheared(Sheared.Params()).compress(copy.deepcopy(make_tiny_llama()), None, None)


def test_a_tenth_of_pruning_is_warm_up_unless_it_is_said_otherwise():
    assert Sheared.Params(pruning={"steps": 100}).pruning.warmup == Sheared.Params().pruning.warmup == 0.1
    assert Sheared.Params(pruning={"warmup": 0.2}).pruning.warmup == 0.2


def test_the_losses_of_domains_are_part_of_what_it_costs(tokenizer, domains):
    """20 steps of 8 sequences of 16 tokens, and 1 + 4 measures of two domains of 100 sequences each."""
    params = {
        "data": str(domains),
        "pruning_every": 5,
        "pruning": {"steps": 20, "batch_size": 8, "sequence_length": 16},
    }
    few, many = (
        Sheared(Sheared.Params(**params, held_out=count)).cost(Shape(name="1x16x24x2"), make_tiny_llama())
        for count in (1, 101)
    )
    parameters = sum(p.numel() for p in make_tiny_llama().parameters())
    assert many.operations - few.operations == pytest.approx(2 * parameters * 5 * 2 * 100 * 16)
