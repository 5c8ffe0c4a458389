"""RTN, GPTQ and AWQ, and SparseGPT's joint levels, on small models."""

import pytest
import torch
from conftest import logits, make_tiny_llama
from kick_compressors.awq import AWQ
from kick_compressors.gptq import GPTQ
from kick_compressors.rounding import round_to_nearest
from kick_compressors.rtn import RTN
from kick_compressors.sparsegpt import SparseGPT
from test_pruners import calibration, groups_of, stored_inputs
from transformers import Gemma2Config, Gemma2ForCausalLM

from kick.blocks import find_decoder
from kick.errors import KickError, LevelError
from kick.folding import find_fold
from kick.levels import Bits, Joint, Pattern, Sparsity
from kick.measured import Structure, measure
from kick.policy import LayerRule, Policy
from kick.walk import BlockWalk


def linears(model):
    return {linear.name: linear.weight for linear in find_decoder(model).linears}


def test_round_to_nearest_by_hand():
    # two bits, groups of two: [-1, 2] has scale 1 and zero point 1; [0, 3] has scale 1 and zero point 0
    found = round_to_nearest(torch.tensor([[-1.0, 2.0, 0.4, 3.0]]), 2, 2, symmetric=False)
    assert found.weight.tolist() == [[-1.0, 2.0, 0.0, 3.0]]


@pytest.mark.parametrize("kind", [RTN, GPTQ, AWQ])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("params", [{"group_size": 16}, {"group_size": -1, "symmetric": True}])
def test_every_linear_lands_on_its_grid(kind, bits, params):
    compressor = kind(kind.Params(**params))
    model = compressor.compress(make_tiny_llama(), Bits(width=bits), calibration())
    measured = measure(model, structure=Structure(grids=compressor.grids))
    assert compressor.grids.keys() == linears(model).keys()
    assert measured.grid_violations == 0
    groups = 2 if params["group_size"] == 16 else 1  # of the 32 inputs of q_proj
    assert compressor.grids["model.layers.0.self_attn.q_proj"].groups == groups
    for name, weight in linears(model).items():
        rows = weight.reshape(-1, 16 if params["group_size"] == 16 else weight.shape[1])
        assert max(len(row.unique()) for row in rows) <= 2**bits, name


def output_error(kind, bits, **params):
    """Relative error of the outputs of all linears, for the inputs of the dense model, weighted alike."""
    text, dense = calibration(samples=16), make_tiny_llama()
    compressor = kind(kind.Params(group_size=16, **params))
    model = compressor.compress(make_tiny_llama(), Bits(width=bits), text)
    return float((logits(model, text.tokens) - logits(dense, text.tokens)).norm() / logits(dense, text.tokens).norm())


@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_and_awq_lose_less_than_rounding(bits):
    rounded = output_error(RTN, bits)
    assert output_error(GPTQ, bits) < rounded
    assert output_error(GPTQ, bits, act_order="group") < rounded
    assert output_error(GPTQ, bits, act_order="static") < rounded
    assert output_error(AWQ, bits) < rounded


def test_act_order_keeps_columns_where_they_were():
    compressor = GPTQ(GPTQ.Params(group_size=8, act_order="group"))
    text = calibration()
    model = compressor.compress(make_tiny_llama(), Bits(width=4), text)
    dense = make_tiny_llama()
    first = groups_of(dense)[0].linears[0]
    inputs = stored_inputs(dense, first.module, text.tokens)
    order = inputs.square().sum(dim=0).argsort(descending=True)
    grid = compressor.grids[first.name]
    assert grid.group_of[order].tolist() == [i // 8 for i in range(32)]  # groups are neighbours in the solver's order
    assert measure(model, structure=Structure(grids=compressor.grids)).grid_violations == 0


def test_static_act_order_keeps_groups_of_neighbours():
    compressor = GPTQ(GPTQ.Params(group_size=8, act_order="static"))
    compressor.compress(make_tiny_llama(), Bits(width=4), calibration())
    name, weight = next(iter(linears(make_tiny_llama()).items()))
    grid = compressor.grids[name]
    assert grid.group_of.tolist() == [i // 8 for i in range(32)]
    expected = round_to_nearest(weight, 4, 8, symmetric=False).grid  # the grids of the weights as they came
    assert torch.equal(grid.scale, expected.scale)


@pytest.mark.parametrize("kind", [RTN, GPTQ, AWQ])
def test_zeros_of_a_pruned_model_stay_zero(kind):
    model = SparseGPT().compress(make_tiny_llama(), Pattern(keep=2, of=4), calibration())
    zeros = {name: weight == 0 for name, weight in linears(model).items()}
    kind(kind.Params(group_size=16)).compress(model, Bits(width=4), calibration())
    for name, weight in linears(model).items():
        assert (weight[zeros[name]] == 0).all(), name


def test_gptq_may_be_told_not_to_keep_zeros():
    model = SparseGPT().compress(make_tiny_llama(), Pattern(keep=2, of=4), calibration())
    GPTQ(GPTQ.Params(group_size=16, keep_zeros=False)).compress(model, Bits(width=8), calibration())
    patterns = dict.fromkeys(linears(model), Pattern(keep=2, of=4))
    assert measure(model, structure=Structure(patterns)).violations > 0


@pytest.mark.parametrize("prune", [Sparsity(fraction=0.5), Pattern(keep=2, of=4)], ids=str)
def test_a_joint_level_reaches_mask_and_grid(prune):
    compressor = SparseGPT(SparseGPT.Params(group_size=16))
    model = compressor.compress(make_tiny_llama(), Joint(prune=prune, bits=Bits(width=4)), calibration())
    patterns = dict.fromkeys(linears(model), prune) if isinstance(prune, Pattern) else {}
    measured = measure(model, structure=Structure(patterns, compressor.grids))
    assert measured.grid_violations == 0
    assert measured.violations == 0
    assert measured.sparsity >= 0.5


@pytest.mark.parametrize("kind", [RTN, GPTQ, AWQ])
def test_widths_that_no_format_packs_are_refused(kind):
    with pytest.raises(LevelError, match="5 bits cannot be packed"):
        kind().check_level(Bits(width=5))


def test_a_solver_error_names_the_layers(monkeypatch):
    from kick_compressors import statistics

    def fails(matrix, damping):
        raise KickError("no Cholesky factor.")

    monkeypatch.setattr(statistics, "inverse_factor", fails)
    with pytest.raises(KickError, match=r"layers\.0\.self_attn\.q_proj, .*v_proj: no Cholesky factor"):
        GPTQ().compress(make_tiny_llama(), Bits(width=4), calibration())


def test_dead_inputs_and_raised_damping_are_recorded():
    model = make_tiny_llama()
    model.model.layers[0].input_layernorm.weight.data[5] = 0  # the norm never lets channel 5 through
    compressor = SparseGPT()
    compressor.compress(model, Sparsity(fraction=0.5), calibration())
    assert compressor.warnings[0].startswith("model.layers.0.self_attn.q_proj")
    assert "1 of its 32 inputs were always zero" in compressor.warnings[0]
    assert (model.model.layers[0].self_attn.q_proj.weight[:, 5] == 0).all()


def folds(model):
    decoder = find_decoder(model)
    walk = BlockWalk(model, decoder, calibration(2).tokens, torch.float32)
    block = decoder.blocks[0]
    with walk.working(block, torch.float32):
        return [find_fold(block, group, lambda: walk.added(block)) for group in block.groups]


def test_scales_fold_into_norms_and_linears():
    found = folds(make_tiny_llama(num_key_value_heads=4))
    assert [fold and (fold.name, fold.kind) for fold in found] == [
        ("input_layernorm", "norm"),
        ("self_attn.v_proj", "linear"),  # multi-head: every value channel reaches one column of o_proj
        ("post_attention_layernorm", "norm"),
        ("mlp.up_proj", "linear"),
    ]
    assert folds(make_tiny_llama())[1] is None  # grouped-query: a value channel reaches several columns


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_fold_in_every_precision(dtype):
    found = folds(make_tiny_llama().to(dtype))
    assert [fold and fold.name for fold in found] == [
        "input_layernorm", None, "post_attention_layernorm", "mlp.up_proj",
    ]  # fmt: skip


def test_a_huge_activation_does_not_hide_a_wrong_fold():
    model = make_tiny_llama()

    def shout(module, args, output):
        output[:, 0] += 3e3

    model.model.layers[0].mlp.register_forward_hook(shout)
    assert folds(model)[3].name == "mlp.up_proj"


@pytest.mark.parametrize("share", [0.1, 0.03])
@pytest.mark.parametrize("size", [0.02, 0.2])
def test_a_small_mlp_hides_no_wrong_fold(share, size):
    """Beside a large attention a gate that takes up_proj's scales changes little of what the block adds."""
    model = make_tiny_llama(initializer_range=size)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data.mul_(share)
    assert folds(model)[3].name == "mlp.up_proj"


def test_large_norm_weights_are_scaled_as_gemma_means_them():
    config = Gemma2Config(
        vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.pre_feedforward_layernorm.weight.data.fill_(60.0)
    found = {fold.name: fold.kind for fold in folds(model) if fold is not None}
    assert found["pre_feedforward_layernorm"] == "norm_plus_one"
    assert "mlp.up_proj" in found


def test_awq_cuts_each_group_where_its_outputs_change_least():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(5, 32, generator=generator)
    weight[1, 3], weight[2, 20] = 9.0, -7.0
    inputs = torch.randn(200, 32, generator=generator) * torch.rand(32, generator=generator)
    inputs[:, 3] *= 0.01  # nothing is lost where the 9 is cut
    compressor, moments = AWQ(AWQ.Params(group_size=16)), inputs.T @ inputs / 200
    found = compressor._clip(weight, moments, Bits(width=3))
    changed = 0
    for row in range(5):
        for start in (0, 16):
            own, seen = weight[row : row + 1, start : start + 16], inputs[:, start : start + 16]
            errors = {}
            for step in range(10):
                limit = float(own.abs().max()) * (1 - 0.05 * step)
                rounded = round_to_nearest(own.clamp(-limit, limit), 3, 16, symmetric=False).weight
                errors[step] = float((seen @ (rounded - own).T).square().sum())
            best = min(errors, key=errors.__getitem__)
            limit = float(own.abs().max()) * (1 - 0.05 * best)
            assert torch.allclose(found[row, start : start + 16], own[0].clamp(-limit, limit)), (row, start)
            changed += best > 0
    assert changed > 2


def test_queries_and_keys_are_not_cut_whatever_the_rules_say():
    def cut(*rules):
        compressor, seen = AWQ(AWQ.Params(group_size=16)), []
        compressor._clip = lambda weight, matrix, level: seen.append(compressor._at) or weight
        compressor.follow(Policy(layers=rules), Bits(width=4))
        rounded = compressor._round
        names = []

        def _round(linear, weight, matrix, level):
            before = len(seen)
            found = rounded(linear, weight, matrix, level)
            names.extend([linear.name.rpartition(".")[2]] if len(seen) > before else [])
            return found

        compressor._round = _round
        compressor.compress(make_tiny_llama(num_hidden_layers=1), Bits(width=4), calibration())
        return names

    every = ["v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert cut() == every
    assert cut(LayerRule(match="q_proj", skip=True)) == every
    assert sorted(cut(LayerRule(match="v_proj", level="8"))) == sorted(every)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_cutting_helps(bits):
    assert output_error(AWQ, bits) < output_error(AWQ, bits, clip=False)


def test_inputs_that_overflow_stop_awq_too():
    model = make_tiny_llama().half()
    model.model.layers[0].mlp.up_proj.weight.data[0] *= 1e6
    with pytest.raises(KickError, match="not finite"):
        AWQ(AWQ.Params(group_size=16)).compress(model, Bits(width=4), calibration())


def test_awq_says_where_nothing_could_take_its_scales():
    compressor = AWQ(AWQ.Params(group_size=16))
    compressor.compress(make_tiny_llama(), Bits(width=4), calibration())
    assert compressor.warnings == [
        "nothing before 2 groups of linears can take their scales, so they were rounded without: "
        "model.layers.0.self_attn.o_proj; model.layers.1.self_attn.o_proj."
    ]


def test_a_pattern_that_groups_tear_apart_is_refused_before_anything_is_loaded():
    level = Joint(prune=Pattern(keep=2, of=3), bits=Bits(width=4))
    with pytest.raises(LevelError, match="groups of 128 columns hold no whole number of 3"):
        SparseGPT().check_level(level)


def test_finding_a_fold_changes_nothing():
    model, untouched = make_tiny_llama(), make_tiny_llama()
    folds(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), untouched.parameters(), strict=True))


def test_awq_at_eight_bits_leaves_the_function_alone():
    model = AWQ(AWQ.Params(group_size=16)).compress(make_tiny_llama(), Bits(width=8), calibration(16))
    norm = make_tiny_llama().model.layers[0].input_layernorm.weight
    assert not torch.equal(model.model.layers[0].input_layernorm.weight, norm)  # scales really were folded
    assert output_error(AWQ, 8) < 0.03  # a fold in the wrong place is off by a tenth and more
