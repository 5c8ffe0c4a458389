"""LLM-Pruner: index maps, scores, counts and slicing, each against a definition that knows nothing of the code."""

import copy
import math

import pytest
import torch
from conftest import make_tiny_llama
from kick_compressors.llama import ModelShape, parts
from kick_compressors.llm_pruner.compressor import LLMPruner, slice_layer
from kick_compressors.llm_pruner.gradients import collect
from kick_compressors.llm_pruner.importance import aggregate, unit_scores
from kick_compressors.llm_pruner.widths import ratio_for, rounded
from kick_compressors.training.objective import cross_entropy
from transformers import AutoModelForCausalLM, GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

from kick import adapters
from kick.adapters import LowRank
from kick.calibration import Calibration, CalibrationSpec
from kick.compress import prepare
from kick.errors import CheckpointError, ConfigError, LevelError
from kick.levels import Sparsity, parse_level
from kick.settings import Setting

TOKENS = torch.randint(2, 600, (6, 24), generator=torch.Generator().manual_seed(0))
CALIBRATION = Calibration(TOKENS, "test", CalibrationSpec(samples=6, sequence_length=24))


def linears(model):
    return [
        linear
        for layer in model.model.layers
        for owner in parts(layer)
        for linear in owner.children()
        if isinstance(linear, torch.nn.Linear)
    ]


def line(importance, weights, gradients):
    """The score of one row or column."""
    product = weights * gradients
    return {
        "vector": lambda: product.sum().abs(),
        "element1": lambda: product.abs().sum(),
        "l2": lambda: weights.square().sum(),
    }[importance]()


def loss_of(model, tokens=TOKENS):
    with torch.no_grad():
        return float(sum(cross_entropy(model(row[None]).logits, row[None]) for row in tokens) / len(tokens))


def prune(model, level=0.3, seed=0, **params):
    of_blocks = params.get("structure", "block") == "block" and not params.get("uniform")
    given = {**({"skip_first": 0, "skip_last": 0} if of_blocks else {}), **params}
    pruner = LLMPruner(LLMPruner.Params(**given), seed=seed)
    return pruner.compress(model, Sparsity(fraction=level), CALIBRATION), pruner


@pytest.fixture
def double():
    """A tiny model in float64 with biases nowhere and a group of three query heads: (6, 2)."""
    return make_tiny_llama(hidden_size=48, num_attention_heads=6, num_key_value_heads=2).double()


# Identities that only the right index maps satisfy


def test_an_mlp_channel_gives_the_same_sum_in_its_up_row_and_its_down_column(double):
    sums = collect(double, linears(double), TOKENS, squares=False)
    for layer in double.model.layers:
        mlp = layer.mlp
        up, down = ((linear.weight * sums[linear][0]).detach() for linear in (mlp.up_proj, mlp.down_proj))
        torch.testing.assert_close(up.sum(dim=1), down.sum(dim=0), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("importance", ["vector", "element1", "l2"])
def test_a_unit_is_scored_by_the_rows_and_columns_that_are_its_own(double, importance):
    """Head by head and row by row: heads of 8, query heads 0 to 2 read key head 0, 3 to 5 key head 1."""
    sums = collect(double, linears(double), TOKENS, squares=False)
    pruner = LLMPruner(LLMPruner.Params(importance=importance, aggregation="sum"), seed=0)
    for layer in double.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        heads, channels = pruner.layer_scores(layer, ModelShape.of(double.config), sums, torch.Generator())
        expected_heads, expected_channels = torch.zeros(2), torch.zeros(64)
        for linear, per_head in ((attention.q_proj, 3), (attention.k_proj, 1), (attention.v_proj, 1)):
            for row, (weights, gradients) in enumerate(zip(linear.weight, sums[linear][0], strict=True)):
                expected_heads[row // 8 // per_head] += line(importance, weights, gradients).item()
        o, down = attention.o_proj, mlp.down_proj
        for column in range(48):
            score = line(importance, o.weight[:, column], sums[o][0][:, column])
            expected_heads[column // 8 // 3] += score.item()
        for channel in range(64):
            for linear in (mlp.gate_proj, mlp.up_proj):
                expected_channels[channel] += line(importance, linear.weight[channel], sums[linear][0][channel]).item()
            score = line(importance, down.weight[:, channel], sums[down][0][:, channel])
            expected_channels[channel] += score.item()
        torch.testing.assert_close(heads.float(), expected_heads, rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(channels.float(), expected_channels, rtol=1e-4, atol=1e-8)


def test_a_key_head_gives_the_same_sum_in_v_and_in_o_and_in_q_and_k(double):
    sums = collect(double, linears(double), TOKENS, squares=False)
    for layer in double.model.layers:
        attention = layer.self_attn
        q, k, v, o = (
            (linear.weight * sums[linear][0]).detach()
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        )
        by_key = [part.sum(dim=1).reshape(2, -1).sum(dim=1) for part in (q, k, v)]
        torch.testing.assert_close(by_key[0], by_key[1], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(by_key[2], o.sum(dim=0).reshape(2, -1).sum(dim=1), rtol=1e-4, atol=1e-7)


def test_scaling_a_channel_changes_the_loss_as_its_sum_says(double):
    sums = collect(double, linears(double), TOKENS, squares=False)
    up = double.model.layers[1].mlp.up_proj
    for channel in (3, 40):
        expected = float((up.weight[channel] * sums[up][0][channel]).detach().sum())
        losses = []
        for factor in (1.02, 0.98):  # both ways: the second order goes
            changed = copy.deepcopy(double)
            with torch.no_grad():
                changed.model.layers[1].mlp.up_proj.weight[channel] *= factor
            losses.append(loss_of(changed))
        assert (losses[0] - losses[1]) / 0.04 == pytest.approx(expected, rel=2e-2, abs=2e-5)


# Scores


def test_scores_are_the_formulas():
    w, g = torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.tensor([[0.5, 0.5], [-1.0, 0.25]])
    f = torch.tensor([[1.0, 2.0], [0.5, 0.0]])
    assert unit_scores("vector", w, g, f, 0, 2).tolist() == [0.5, 2.0]
    assert unit_scores("element1", w, g, f, 0, 2).tolist() == [1.5, 4.0]
    assert unit_scores("element1", w, g, f, 1, 2).tolist() == [3.5, 2.0]
    assert unit_scores("element2", w, g, f, 0, 2).tolist() == [9.0, 4.5]
    assert unit_scores("mixed", w, g, f, 0, 2).tolist() == [5.0, 6.25]  # |.5 - .5| + |-1 - 4|; |-3 - 2.25| + |1 - 0|
    assert unit_scores("l2", w, None, None, 0, 1).tolist() == [30.0]
    scores = [torch.tensor([1.0, 4.0]), torch.tensor([3.0, 2.0])]
    assert [aggregate(scores, how).tolist() for how in ("sum", "prod", "max", "last")] == [
        [4, 6],
        [pytest.approx(math.log(3)), pytest.approx(math.log(8))],
        [3, 4],
        [3, 2],
    ]


def test_the_product_of_many_small_scores_still_has_an_order():
    """As of a hidden dimension in the 211 tensors of 30 layers, whose product float32 does not hold."""
    small = torch.tensor([3e-4, 1e-4, 2e-4])
    assert aggregate([small] * 211, "prod").argsort().tolist() == [1, 2, 0]


def test_few_calibration_samples_are_said():
    _, pruner = prune(make_tiny_llama(), samples=10)
    assert any("10 calibration samples of " in warning and "there are 6 " in warning for warning in pruner.warnings)


def test_what_an_earlier_stage_left_is_not_lost():
    narrow, _ = prune(make_tiny_llama(num_hidden_layers=3), skip_first=1, uniform=False)
    with pytest.raises(ConfigError, match="layers differ in width"):
        prune(narrow)
    branched = make_tiny_llama()
    adapters.attach(branched, {"model.layers.0.mlp.up_proj": LowRank(torch.zeros(2, 32), torch.zeros(64, 2))})
    with pytest.raises(ConfigError, match="has adapters"):
        prune(branched)
    with pytest.raises(CheckpointError, match="has an adapter already"):
        adapters.attach(branched, {"model.layers.0.mlp.up_proj": LowRank(torch.zeros(2, 32), torch.zeros(64, 2))})


def test_squares_are_averaged_after_squaring():
    model = make_tiny_llama()
    up = model.model.layers[0].mlp.up_proj
    mean, square = collect(model, [up], TOKENS, squares=True)[up]
    each = [collect(model, [up], row[None], squares=False)[up][0] for row in TOKENS]
    torch.testing.assert_close(mean, sum(each) / 6, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(square, sum(g.square() for g in each) / 6, rtol=1e-4, atol=1e-10)
    assert not torch.allclose(square, mean.square(), rtol=0.1)
    assert up.weight.grad is None
    assert up.weight.requires_grad


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_taylor_scores_follow_the_true_change_of_the_loss_better_than_magnitude(seed):
    from scipy.stats import spearmanr

    model = make_tiny_llama(num_hidden_layers=1, intermediate_size=48).double()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    shape = ModelShape.of(model.config)
    layer = model.model.layers[0]
    base = loss_of(model)
    true = []
    for channel in range(48):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.model.layers[0].mlp.up_proj.weight[channel] = 0
        true.append(abs(loss_of(changed) - base))
    found = {}
    for kind in ("vector", "element1", "l2"):
        pruner = LLMPruner(LLMPruner.Params(importance=kind))
        sums = collect(model, linears(model), TOKENS, squares=False)
        found[kind] = spearmanr(pruner.layer_scores(layer, shape, sums, torch.Generator())[1].detach(), true).statistic
    assert found["vector"] > 0.5
    assert found["vector"] > found["l2"] + 0.2
    assert found["element1"] > found["l2"]


def test_gradients_a_few_blocks_at_a_time_prune_the_same():
    one, _ = prune(make_tiny_llama(num_hidden_layers=3), blocks_at_once=1)
    all_, _ = prune(make_tiny_llama(num_hidden_layers=3))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), all_.parameters(), strict=True))


# What is left


def test_sliced_is_zero_masked():
    model = make_tiny_llama(num_attention_heads=4, num_key_value_heads=2)
    shape = ModelShape.of(model.config)
    masked = copy.deepcopy(model)
    kept = (torch.tensor([1]), torch.tensor([0, 5, 17, 60]))
    slice_layer(model, 0, kept, shape)
    attention, mlp = parts(masked.model.layers[0])
    with torch.no_grad():
        attention.o_proj.weight[:, :16] = 0  # what the query heads of key head 0 add
        gone = [channel for channel in range(64) if channel not in kept[1]]
        mlp.down_proj.weight[:, gone] = 0
    torch.testing.assert_close(model(TOKENS).logits, masked(TOKENS).logits, atol=1e-5, rtol=1e-5)
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (16, 32)


PUBLISHED = [
    (
        "llama-7b",
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
        32000,
        4,
        2,
        5_422_977_024,
    ),
    (
        "llama-3-8b",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        128256,
        4,
        2,
        6_612_586_496,
    ),
    (
        "tinyllama",
        {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
        },
        32000,
        4,
        4,
        945_907_712,
    ),
    (
        "smollm2",
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
        49152,
        4,
        2,
        118_589_760,
    ),
]


@pytest.mark.parametrize(
    ("name", "shape", "vocabulary", "first", "last", "parameters"), PUBLISHED, ids=lambda value: str(value)[:12]
)
def test_a_quarter_of_each_layer_leaves_the_published_number_of_parameters(
    name, shape, vocabulary, first, last, parameters
):
    from accelerate import init_empty_weights

    with init_empty_weights():
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **shape))
    model.tie_weights()
    pruner = LLMPruner(LLMPruner.Params(importance="random", ratio_of="layers", skip_first=first, skip_last=last))
    pruned = pruner.compress(model, Sparsity(fraction=0.25), CALIBRATION)
    assert pruner.expected_parameters == parameters
    assert sum(parameter.numel() for parameter in pruned.parameters()) == parameters


@pytest.mark.parametrize(("level", "of", "heads"), [(0.2, "model", 32), (0.5, "model", 16), (0.25, "layers", 32)])
def test_uniform_llama_7b_keeps_heads_that_transformers_takes(level, of, heads):
    """No ratio between 4 and 49 % of its 32 heads leaves a number that divides 4,096: channels make up for it."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        model = LlamaForCausalLM(LlamaConfig())
    whole = sum(parameter.numel() for parameter in model.parameters())
    base = whole if of == "model" else 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    pruner = LLMPruner(LLMPruner.Params(importance="random", uniform=True, ratio_of=of))
    pruned = pruner.compress(model, Sparsity(fraction=level), None)
    left = sum(parameter.numel() for parameter in pruned.parameters())
    assert (whole - left) / base == pytest.approx(level, abs=1e-4)
    assert pruned.config.num_attention_heads == heads
    with init_empty_weights():
        plain = LlamaForCausalLM(LlamaConfig(**pruned.config.to_dict()))
    assert sum(parameter.numel() for parameter in plain.parameters()) == left


def test_the_level_is_a_share_of_the_model_as_near_as_units_allow():
    model = make_tiny_llama(intermediate_size=256, num_hidden_layers=4)
    whole = sum(p.numel() for p in model.parameters())
    pruned, pruner = prune(model, 0.2)
    removed = 1 - sum(p.numel() for p in pruned.parameters()) / whole
    assert removed == pytest.approx(0.2, abs=4 * 96 / whole)  # a channel of each layer
    assert pruner.facts["removed"] == pytest.approx(removed)
    with pytest.raises(LevelError, match="cannot be removed"):
        prune(make_tiny_llama(), 0.9)


def test_first_and_last_layers_stay_whole():
    dense = make_tiny_llama(num_hidden_layers=4)
    pruned, _ = prune(copy.deepcopy(dense), 0.1, skip_first=1, skip_last=2)
    same = [
        all(a.shape == b.shape for a, b in zip(x.parameters(), y.parameters(), strict=True))
        for x, y in zip(pruned.model.layers, dense.model.layers, strict=True)
    ]
    assert same == [True, False, True, True]
    with pytest.raises(ConfigError, match="protect all 4 layers"):
        prune(make_tiny_llama(num_hidden_layers=4), 0.1, skip_first=2, skip_last=2)


def test_per_layer_widths_are_saved_with_a_table_and_uniform_ones_plainly(tmp_path, tokenizer):
    from kick import shapes
    from kick.loading import load_model

    pruned, _ = prune(make_tiny_llama(num_hidden_layers=3), 0.2, skip_first=1)
    pruned.save_pretrained(tmp_path / "layers")
    shapes.save_table(tmp_path / "layers", shapes.table_of(pruned))
    torch.testing.assert_close(load_model(tmp_path / "layers", "float32", "cpu")(TOKENS).logits, pruned(TOKENS).logits)
    alike, _ = prune(make_tiny_llama(num_hidden_layers=3), 0.4, uniform=True, multiple=8, ratio_of="layers")
    alike.save_pretrained(tmp_path / "uniform")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "uniform")
    torch.testing.assert_close(loaded(TOKENS).logits, alike(TOKENS).logits)
    assert loaded.config.intermediate_size % 8 == 0
    assert loaded.config.intermediate_size < 64


def test_rounding_and_ratios():
    assert rounded(1150, 64, 1536) == 1152
    assert rounded(10, 64, 1536) == 64
    assert rounded(1530, 64, 1500) == 1500
    assert ratio_for(0.25, lambda ratio: int(ratio * 10) / 10) == pytest.approx(0.3, abs=1e-3)


@pytest.mark.parametrize("importance", ["vector", "element1", "element2", "mixed", "l2", "random"])
@pytest.mark.parametrize("aggregation", ["sum", "prod", "max", "last"])
def test_every_way_to_score_prunes(importance, aggregation):
    pruned, _ = prune(make_tiny_llama(), 0.25, importance=importance, aggregation=aggregation)
    assert bool(pruned(TOKENS).logits.isfinite().all())


def test_channel_wise_is_the_model_without_its_least_dimensions():
    """Beside the dense model in which these are zero everywhere: its norms divide by the mean over all 32."""
    dense = make_tiny_llama()
    pruned, _ = prune(
        copy.deepcopy(dense), 0.25, structure="channel", ratio_of="layers", importance="l2", aggregation="sum"
    )
    with torch.no_grad():
        squares = dense.model.embed_tokens.weight.square().sum(dim=0)
        outputs = [linear for layer in dense.model.layers for linear in (layer.self_attn.o_proj, layer.mlp.down_proj)]
        for linear in linears(dense):
            squares += linear.weight.square().sum(dim=1 if linear in outputs else 0)
        gone = squares.argsort()[:8]
        dense.model.embed_tokens.weight[:, gone] = 0
        for linear in outputs:
            linear.weight[gone] = 0
        for name, weight in dense.named_parameters():
            if "norm" in name:
                weight.mul_((24 / 32) ** 0.5)
    torch.testing.assert_close(pruned(TOKENS).logits, dense(TOKENS).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("biases", [{"attention_bias": True}, {"mlp_bias": True}, {}])
def test_channel_wise_takes_away_as_many_parameters_as_it_announces(biases):
    pruned, pruner = prune(make_tiny_llama(**biases), 0.25, structure="channel", ratio_of="layers")
    assert sum(parameter.numel() for parameter in pruned.parameters()) == pruner.expected_parameters


def test_a_narrower_model_loads_in_plain_transformers(tmp_path):
    pruned, pruner = prune(make_tiny_llama(), 0.25, structure="channel", ratio_of="layers")
    assert pruned.config.hidden_size == 24
    assert pruner.facts["hidden"] == 24
    pruned.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(TOKENS).logits, pruned(TOKENS).logits)


def test_layer_wise_keeps_the_first_layers():
    dense = make_tiny_llama(num_hidden_layers=4)
    pruned, _ = prune(copy.deepcopy(dense), 0.25, structure="layer", ratio_of="layers")
    assert pruned.config.num_hidden_layers == 3 == len(pruned.model.layers)
    dense.model.layers = dense.model.layers[:3]
    torch.testing.assert_close(pruned(TOKENS).logits, dense(TOKENS).logits)


@pytest.mark.parametrize("structure", ["block", "channel"])
def test_models_with_biases_and_no_head_dim_are_pruned_and_saved(structure, tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = Qwen2ForCausalLM(
        Qwen2Config(**shape, num_key_value_heads=2, vocab_size=600, tie_word_embeddings=True)
    ).eval()
    pruned, _ = prune(
        model, 0.5, structure=structure, ratio_of="layers", **({"uniform": True} if structure == "block" else {})
    )
    pruned.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(TOKENS).logits, pruned(TOKENS).logits)


def test_a_model_in_half_precision_is_scored_in_single():
    half, pruner = prune(make_tiny_llama().half(), 0.2)
    single, _ = prune(make_tiny_llama().half().float(), 0.2)
    assert half.dtype == torch.float16
    assert all(torch.equal(a, b.half()) for a, b in zip(half.parameters(), single.parameters(), strict=True))
    assert pruner.expected_parameters == sum(p.numel() for p in half.parameters())


def test_what_cannot_be_pruned_is_said():
    from kick.testing import tiny_model

    with pytest.raises(LevelError, match="not built like Llama"):
        prune(tiny_model("gpt2"))
    small = {"vocab_size": 600, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    with pytest.raises(LevelError, match="has norms of kind GemmaRMSNorm"):
        prune(GemmaForCausalLM(GemmaConfig(**small, num_attention_heads=4, num_key_value_heads=2, head_dim=8)))
    with pytest.raises(LevelError, match="needs calibration"):
        LLMPruner(LLMPruner.Params()).compress(make_tiny_llama(), parse_level("0.2", LLMPruner.knob), None)
    with pytest.raises(LevelError, match="key heads"):
        prune(make_tiny_llama(), 0.99, ratio_of="layers")


@pytest.mark.parametrize("structure", ["channel", "layer"])
def test_parameters_of_another_structure_are_refused(structure):
    from pydantic import ValidationError

    LLMPruner.Params(structure=structure)
    with pytest.raises(ValidationError, match="skip_first is about structure: block"):
        LLMPruner.Params(structure=structure, skip_first=1)


def test_what_gradients_cost_by_hand():
    """Four layers of which two are pruned, ten samples of 128 tokens; a part of one layer is a pass of its own."""
    model = make_tiny_llama(num_hidden_layers=4)
    whole = sum(parameter.numel() for parameter in model.parameters())
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64
    given = {"skip_first": 1, "skip_last": 1}

    def cost(**params):
        (step,) = prepare(Setting(compressor="llm_pruner", level="0.1", params=params))
        return step.compressor.cost(step.level, model)

    found = cost(**given)
    assert (found.tokens, found.operations) == (0, 1280 * (4 * whole + 2 * 2 * layer))
    assert found.memory_bytes == 4 * whole + 4 * 2 * layer
    apart = cost(**given, importance="element2", blocks_at_once=1)
    assert apart.operations == 1280 * (2 * 4 * whole + 2 * 2 * layer)
    assert apart.memory_bytes == 4 * whole + 8 * layer
    assert cost(structure="channel").memory_bytes == 8 * whole
    assert cost(importance="l2") is None


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"structure": "layer", "importance": "vector"}, "takes the last layers"),
        ({"importance": "l2", "samples": 3}, "samples is about gradients"),
        ({"uniform": True, "skip_last": 1}, "uniform: true prunes all alike"),
    ],
)
def test_what_would_do_nothing_is_refused(params, says):
    from pydantic import ValidationError

    with pytest.raises(ValidationError, match=says):
        LLMPruner.Params(**params)


@pytest.mark.parametrize(
    ("params", "needs"), [({}, True), ({"importance": "l2"}, False), ({"structure": "layer"}, False)]
)
def test_calibration_is_asked_for_where_gradients_are(params, needs):
    (step,) = prepare(Setting(compressor="llm_pruner", level="0.1", params=params))
    assert step.compressor.needs_calibration == needs
    if not needs:
        step.compressor.compress(make_tiny_llama(num_hidden_layers=8), step.level, None)
