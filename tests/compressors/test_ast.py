"""AST: masks, gradients, the optimizer, SLoRB, distillation, each against its definition; then all of it, trained."""

import copy
import json

import pytest
import torch
from conftest import make_tiny_llama
from kick_compressors.ast.compressor import AST, check_shards
from kick_compressors.ast.objective import distillation
from kick_compressors.ast.optimizer import DecayingAdamW
from kick_compressors.ast.schedule import decay_at, pattern_at
from kick_compressors.ast.slorb import Branch, block_means, block_sums, indicator
from kick_compressors.ast.sparse import SparseLinear, best_mask
from kick_compressors.training.objective import cross_entropy
from pydantic import ValidationError
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from kick import adapters
from kick.blocks import Linear, find_decoder
from kick.calibration import Calibration, CalibrationSpec
from kick.errors import ConfigError, LevelError
from kick.levels import Pattern, parse_level
from kick.measured import pattern_violations

TWO_FOUR = Pattern(keep=2, of=4)


def sparse(out_features=6, in_features=8, pattern=TWO_FOUR, through=True, seed=0):
    torch.manual_seed(seed)
    module = nn.Linear(in_features, out_features, bias=False)
    return SparseLinear(Linear("linear", module, False), pattern, through)


# Masks


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "4:8", "1:4", "3:4"])
def test_exactly_n_of_m_stay_with_ties_and_zeros_too(pattern):
    level = parse_level(pattern, AST.knob)
    weight = torch.randint(-1, 2, (16, 32), generator=torch.Generator().manual_seed(0)).float()  # mostly ties and zeros
    mask = best_mask(weight, level)
    assert (mask.reshape(16, -1, level.of).sum(-1) == level.keep).all()


def test_the_gradient_reaches_pruned_entries_and_is_that_of_the_dense_product():
    linear = sparse()
    x, dense = torch.randn(5, 8), linear.dense.detach().clone()
    linear.module(x).square().sum().backward()
    masked = (dense * linear.mask).requires_grad_()
    (x @ masked.T).square().sum().backward()
    torch.testing.assert_close(linear.dense.grad, masked.grad)
    assert (linear.dense.grad[~linear.mask] != 0).all()


def test_without_a_straight_through_gradient_pruned_entries_get_none():
    linear = sparse(through=False)
    linear.module(torch.randn(5, 8)).square().sum().backward()
    assert (linear.dense.grad[~linear.mask] == 0).all()


def test_flips_are_counted_against_the_last_masks_and_the_first():
    linear = sparse(1, 4)
    linear.dense.data = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    linear.update(TWO_FOUR)
    linear.masked.initial.copy_(linear.mask)
    linear.dense.data = torch.tensor([[4.0, 1.0, 2.0, 1.0]])
    assert linear.update(TWO_FOUR) == (2, 2)  # the second goes, the third comes
    linear.dense.data = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    assert linear.update(TWO_FOUR) == (2, 0)


def test_a_conv1d_of_gpt2_is_masked_along_its_inputs():
    from transformers.pytorch_utils import Conv1D

    module = Conv1D(6, 8)
    linear = SparseLinear(Linear("conv", module, True), TWO_FOUR, True)
    assert linear.mask.shape == (8, 6)
    assert pattern_violations((module.weight.detach()).T, TWO_FOUR) == 0


# Schedules


def test_lambda_grows_to_its_most_and_stays():
    at = [decay_at(step, 40_000, 1e-4, "annealing") for step in (0, 5_000, 10_000, 40_000)]
    assert at == pytest.approx([0, 5e-5, 1e-4, 1e-4])
    assert decay_at(0, 100, 1e-4, "constant") == 1e-4
    assert decay_at(50, 100, 1e-4, "none") == 0


@pytest.mark.parametrize("kind", ["iterative", "gradual"])
def test_stages_go_down_to_the_target_and_never_back(kind):
    kept = [pattern_at(step, 100, Pattern(keep=4, of=16), kind).keep for step in range(100)]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] == 15
    assert kept[50:] == [4] * 50
    if kind == "gradual":  # cubic: most of it early
        assert kept[12] < 11


# The optimizer


def steps_of(optimizer, weight, gradients):
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


def test_without_decay_it_is_adamw():
    gradients = torch.randn(20, 4, 8, generator=torch.Generator().manual_seed(0))
    start = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mask = best_mask(start, TWO_FOUR)
    a = DecayingAdamW([{"params": [ours], "weight_decay": 0.1}], 1e-2, (0.9, 0.95), 1e-8, lambda _: mask)
    b = torch.optim.AdamW([theirs], 1e-2, (0.9, 0.95), 1e-8, weight_decay=0.1)
    torch.testing.assert_close(steps_of(a, ours, gradients), steps_of(b, theirs, gradients), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("second_moment", ["gradient", "momentum"])
def test_without_gradient_decay_shrinks_what_is_pruned_and_nothing_else(second_moment):
    start = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    weight, mask = nn.Parameter(start.clone()), best_mask(start, TWO_FOUR)
    optimizer = DecayingAdamW([{"params": [weight]}], 1e-3, (0.9, 0.95), 1e-8, lambda _: mask, second_moment)
    optimizer.decay = 1e-2
    after = steps_of(optimizer, weight, torch.zeros(3, 4, 8))
    assert torch.equal(after[mask], start[mask])
    assert (after[~mask].abs() < start[~mask].abs()).all()


def test_decay_in_the_gradient_is_adamw_on_the_decayed_gradient():
    start = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    gradients = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mask = best_mask(start, TWO_FOUR)
    a = DecayingAdamW([{"params": [ours]}], 1e-2, (0.9, 0.95), 1e-8, lambda _: mask, decay_into="gradient")
    a.decay = 0.3
    b = torch.optim.AdamW([theirs], 1e-2, (0.9, 0.95), 1e-8, weight_decay=0.0)
    for gradient in gradients:
        steps_of(a, ours, [gradient])
        steps_of(b, theirs, [gradient + 0.3 * ~mask * theirs.detach()])
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("second_moment", ["gradient", "momentum"])
def test_two_steps_by_hand(second_moment):
    """One pruned weight of 0.5; g = 0.2 and then -0.1; lambda 0.1, lr 0.01."""
    weight = nn.Parameter(torch.tensor([[0.5]]))
    optimizer = DecayingAdamW(
        [{"params": [weight]}], 0.01, (0.9, 0.95), 1e-8, lambda _: torch.tensor([[False]]), second_moment
    )
    optimizer.decay = 0.1
    w, u, v = 0.5, 0.0, 0.0
    for t, g in enumerate((0.2, -0.1), 1):
        u = 0.9 * u + 0.1 * g
        pull = 0.1 * w
        squared = (u + pull) if second_moment == "momentum" else (g + pull)
        v = 0.95 * v + 0.05 * squared**2
        w -= 0.01 / (1 - 0.9**t) * (u + pull) / ((v / (1 - 0.95**t)) ** 0.5 + 1e-8)
        steps_of(optimizer, weight, torch.tensor([[[g]]]))
    assert float(weight.detach()) == pytest.approx(w, abs=1e-7)


# SLoRB


def test_the_branch_is_begun_with_the_means_of_what_was_pruned():
    linear = sparse(6, 8)
    branch = Branch(linear, 4, "means")
    lost = linear.dense.detach() * ~linear.mask
    assert float(branch.scale.detach()[2, 1]) == pytest.approx(float(lost[2, 4:8].mean()))
    assert torch.equal(Branch(linear, 4, "zeros").scale, torch.zeros(6, 2))
    torch.testing.assert_close(block_sums(torch.arange(8.0), 4), indicator(8, 4) @ torch.arange(8.0))
    torch.testing.assert_close(block_means(lost, 4), lost @ indicator(8, 4).T / 4)


def test_an_input_constant_on_each_block_gets_the_dense_output():
    linear = sparse(6, 8)
    x = torch.tensor([1.5, 1.5, 1.5, 1.5, -2.0, -2.0, -2.0, -2.0])
    branch = Branch(linear, 4, "means")
    torch.testing.assert_close(linear.module(x) + branch(x), x @ linear.dense.T)


def test_the_branch_as_an_adapter_is_the_branch():
    branch = Branch(sparse(6, 8), 4, "means")
    adapter, x = branch.adapter(), torch.randn(3, 8)
    torch.testing.assert_close(x @ adapter.down.T @ adapter.up.T, branch(x).detach())
    assert adapter.rank == 2


# Distillation


def test_the_divergence_of_a_model_from_itself_is_zero_and_else_the_sum():
    labels = torch.tensor([[1, 2, -100, 4]])
    p, q = (torch.randn(1, 4, 7, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    ce, kl = distillation(p, p, labels, 1.0, False)
    assert float(kl) == pytest.approx(0, abs=1e-7)
    assert float(ce) == pytest.approx(float(cross_entropy(p, labels)), rel=1e-6)
    a, b = p.softmax(-1)[0], q.softmax(-1)[0]
    counted = [0, 2]  # position t predicts label t + 1; label 2 is not counted
    forward = sum(float((a[t] * (a[t] / b[t]).log()).sum()) for t in counted) / 2
    backward = sum(float((b[t] * (b[t] / a[t]).log()).sum()) for t in counted) / 2
    assert float(distillation(p, q, labels, 1.0, False)[1]) == pytest.approx(forward, rel=1e-5)
    assert float(distillation(p, q, labels, 1.0, True)[1]) == pytest.approx(backward, rel=1e-5)
    warm = distillation(2 * p, 2 * q, labels, 2.0, False)[1]
    assert float(warm) == pytest.approx(4 * forward, rel=1e-5)


# All of it, on a tiny model


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """What a tiny model can learn in a hundred steps: sentences from a small grammar."""
    return sentences(tmp_path_factory.mktemp("text") / "text.jsonl", 0)


@pytest.fixture(scope="module")
def unseen(tmp_path_factory):
    """Other sentences of that grammar."""
    return sentences(tmp_path_factory.mktemp("text") / "unseen.jsonl", 1)


def sentences(path, seed):
    import random

    rng = random.Random(seed)
    nouns, verbs = ["the cat", "a dog", "the old man", "my sister"], ["sees", "likes", "follows", "hears"]
    rows = [
        {"text": ". ".join(f"{rng.choice(nouns)} {rng.choice(verbs)} {rng.choice(nouns)}" for _ in range(20))}
        for _ in range(80)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def taught(tokenizer, text):
    """A tiny Llama that has learned that text."""
    from kick_compressors.tune import Tune

    tune = Tune(Tune.Params(data=str(text), rank=0, steps=150, batch_size=8, sequence_length=48, learning_rate=3e-3))
    tune.tokenizer = tokenizer
    return tune.compress(make_tiny_llama(initializer_range=0.05), None, None)


def prune(model, tokenizer, text, level="2:4", seed=0, workspace=None, **params):
    given = {
        "data": text if isinstance(text, dict) else str(text),
        "steps": 60,
        "batch_size": 4,
        "sequence_length": 48,
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
    }
    ast = AST(AST.Params(**{**given, **params}), seed=seed)
    ast.tokenizer, ast.workspace = tokenizer, workspace
    return ast.compress(copy.deepcopy(model), parse_level(level, AST.knob), None), ast


def loss_on(model, tokenizer, text, length=48):
    from kick_compressors.training.objective import Objective, mean_loss
    from kick_compressors.training.text import open_mixture

    held = open_mixture(str(text), tokenizer, length, 99, held_out=40).streams["text"].held
    return mean_loss(Objective(model), torch.from_numpy(held.astype("int64")))


@pytest.mark.parametrize("level", ["2:4", "4:8", "1:4"])
def test_the_result_is_an_ordinary_model_with_the_pattern_everywhere(taught, tokenizer, text, level):
    model, ast = prune(taught, tokenizer, text, level, steps=12)
    assert ast.facts["peak_flip_rate"] >= ast.facts["last_flip_rate"] >= 0
    for linear in find_decoder(model).linears:
        assert pattern_violations(linear.weight, parse_level(level, AST.knob)) == 0
    assert set(model.state_dict()) == set(taught.state_dict())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    assert ast.facts["training"]["tokens"] == 12 * 4 * 48


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_flips_calm_down(taught, tokenizer, text, tmp_path, seed):
    def trained(place, **decay):
        given = {"steps": 120, "mask_every": 3, "learning_rate": 3e-3, "workspace": tmp_path / place}
        prune(taught, tokenizer, text, seed=seed, **given, **decay)
        return [json.loads(line) for line in (tmp_path / place / "kept/history.jsonl").read_text().splitlines()]

    def calmed(rows):
        """The mean flip rate of the last quarter, as a share of the highest."""
        flips = [row["flip_rate"] for row in rows if "flip_rate" in row]
        assert len(flips) == 40
        return sum(flips[-len(flips) // 4 :]) / (len(flips) // 4) / max(flips)

    rows = trained("annealed", decay_most=1e-2)
    assert calmed(rows) < 0.5
    assert calmed(rows) < 0.5 * calmed(trained("none", decay="none"))  # not the falling learning rate alone
    assert rows[0]["decay"] == 0
    assert rows[-1]["decay"] == 1e-2


def test_training_beats_fixed_masks_and_the_branch_helps(taught, tokenizer, text, unseen):
    """At equal tokens, for each of three seeds together: boosted < naive < fixed masks with cross-entropy alone."""
    fixed, naive, boosted = [], [], []
    for seed in range(3):
        for losses, params in (
            (fixed, {"masks": "fixed", "distillation": 0.0, "decay": "none"}),
            (naive, {"decay_most": 1e-2}),
            (boosted, {"decay_most": 1e-2, "slorb": 16}),
        ):
            losses.append(loss_on(prune(taught, tokenizer, text, "1:4", seed, **params)[0], tokenizer, unseen))
    assert sum(naive) < sum(fixed), (naive, fixed)
    assert sum(boosted) < sum(naive), (boosted, naive)


def test_the_branch_is_kept_apart_and_survives_saving(taught, tokenizer, text, tmp_path):
    from kick.checkpoint import read, save, verify
    from kick.loading import load_model
    from kick.measured import Structure, measure

    model, _ = prune(taught, tokenizer, text, steps=8, slorb=16)
    tokens = torch.arange(24)[None] * 11 % 600
    before = model(tokens).logits
    held = adapters.attached(model)
    assert held
    assert all(adapter.rank == adapter.down.shape[1] // 16 for adapter in held.values())
    record = {
        "setting": {"compressor": "ast", "level": "2:4"},
        "setting_name": "ast@2:4",
        "source": {},
        "calibration": None,
    }
    record |= {"dtype": "float32", "warnings": [], "seconds": 0, "peak_memory_bytes": 0, "layers": {}}
    structure = Structure(patterns={linear.name: TWO_FOUR for linear in find_decoder(model).linears}, adapters=held)
    save(tmp_path / "out", model, tokenizer, record, measure(model, structure=structure), structure)
    assert verify(read(tmp_path / "out")) == []
    torch.testing.assert_close(
        load_model(tmp_path / "out", "float32", "cpu")(tokens).logits, before, atol=1e-5, rtol=1e-5
    )


def test_zeros_and_the_branch_survive_quantisation_afterwards(taught, tokenizer, text):
    from kick_compressors.awq import AWQ

    model, _ = prune(taught, tokenizer, text, steps=8, slorb=16)
    branches = {name: adapter.up.clone() for name, adapter in adapters.attached(model).items()}
    zeros = {linear.name: linear.weight == 0 for linear in find_decoder(model).linears}
    tokens = torch.randint(2, 600, (4, 32), generator=torch.Generator().manual_seed(0))
    calibration = Calibration(tokens, "test", CalibrationSpec(samples=4, sequence_length=32))
    before = model(tokens).logits
    quantised = AWQ(AWQ.Params(group_size=16)).compress(model, parse_level("8", AWQ.knob), calibration)
    for linear in find_decoder(quantised).linears:
        assert (linear.weight[zeros[linear.name]] == 0).all()
    assert adapters.attached(quantised).keys() == branches.keys()
    change = (quantised(tokens).logits - before).norm() / before.norm()
    assert change < 0.05  # folded scales reach the branch too


def test_domains_follow_their_losses_here_too(taught, tokenizer, text, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps({"text": f"{n} times {n} is {n * n}. " * 8}) for n in range(40)))
    data = {"seen": str(text), "new": str(other)}
    reference = {"seen": 100.0, "new": 0.1}
    _, ast = prune(taught, tokenizer, data, steps=8, update_every=2, held_out=2, reference=reference)
    assert ast.facts["domain_weights"]["new"] > 0.9


@pytest.mark.parametrize("masks", ["fixed", "iterative", "gradual"])
def test_baselines_reach_the_pattern_and_fixed_masks_do_not_move(taught, tokenizer, text, masks):
    model, _ = prune(
        taught, tokenizer, text, "1:4", masks=masks, decay="none", distillation=0.0, steps=20, mask_every=2
    )
    for linear in find_decoder(model).linears:
        assert pattern_violations(linear.weight, Pattern(keep=1, of=4)) == 0
    if masks == "fixed":
        for linear, dense in zip(find_decoder(model).linears, find_decoder(taught).linears, strict=True):
            assert not linear.weight[~best_mask(dense.weight, Pattern(keep=1, of=4))].any()


def test_what_cannot_be_is_refused_before_anything_is_trained(taught, tokenizer, text):
    with pytest.raises(LevelError, match="7 does not divide"):
        prune(taught, tokenizer, text, "2:7")
    with pytest.raises(LevelError, match="48 does not divide"):
        prune(taught, tokenizer, "no such text, which is not opened", slorb=48)
    half = prune(taught, tokenizer, text, steps=2)[0]
    with pytest.raises(ConfigError, match="already sparse"):
        prune(half, tokenizer, text)
    prune(half, tokenizer, text, steps=2, distillation=0.0)


def test_a_teacher_that_earlier_stages_changed_is_said(taught, tokenizer, text):
    for before, warnings in ((0, 0), (1, 1)):
        ast = AST(AST.Params(data=str(text), steps=1, batch_size=2, sequence_length=16))
        ast.tokenizer, ast.stages_before = tokenizer, before
        ast.compress(copy.deepcopy(taught), TWO_FOUR, None)
        assert sum("its teacher is what the stages before it left" in own for own in ast.warnings) == warnings


def test_in_bfloat16_weights_stay_float32_and_zeros_zero(taught, tokenizer, text):
    """Products alone are rounded: updates that bfloat16 would swallow add up."""
    whole, rounded = (
        prune(taught, tokenizer, text, steps=20, learning_rate=1e-5, slorb=16, precision=precision)[0]
        for precision in ("float32", "bfloat16")
    )
    for exact, found, before in zip(*(find_decoder(m).linears for m in (whole, rounded, taught)), strict=True):
        assert found.weight.dtype == torch.float32
        assert pattern_violations(found.weight, TWO_FOUR) == 0
        kept = (found.weight != 0) & (exact.weight != 0)
        moved = (found.weight - before.weight)[kept].abs()
        assert 0 < float(moved.mean()) < 1e-3
        assert not torch.equal(found.weight, found.weight.bfloat16().float())
    torch.testing.assert_close(loss_on(rounded, tokenizer, text), loss_on(whole, tokenizer, text), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"update_every": 5, "dynamic": False, "cap": 0.5}, "dynamic: false sets none"),
        ({"dynamic": False}, "dynamic is about new weights of domains"),
        ({"cap": 0.5}, "cap is about new weights"),
        ({"teacher": "x", "distillation": 0.0}, "learns nothing from it"),
    ],
)
def test_what_would_do_nothing_is_refused(params, says):
    with pytest.raises(ValidationError, match=says):
        AST.Params(**params)
    AST.Params(update_every=5, cap=0.5)


def test_processes_that_would_cut_groups_are_refused():
    """GPT-2 stores [in, out]: three processes cut 40 inputs into 14, 14 and 12."""
    linears = find_decoder(GPT2LMHeadModel(GPT2Config(n_embd=40, n_head=2, n_layer=1, vocab_size=60))).linears
    pattern = Pattern(keep=2, of=4)
    check_shards(linears, pattern, 2)  # 20 each
    with pytest.raises(ConfigError, match="3 processes cut the 40 inputs"):
        check_shards(linears, pattern, 3)
    check_shards(find_decoder(make_tiny_llama()).linears, pattern, 3)  # outputs are cut, not inputs


def test_a_branch_beside_a_branch_is_refused(tokenizer, tmp_path):
    model = make_tiny_llama()
    branch = adapters.LowRank(torch.zeros(2, 32), torch.zeros(64, 2))
    adapters.attach(model, {"model.layers.0.mlp.up_proj": branch})
    with pytest.raises(ConfigError, match="ast with slorb, on a model that has adapters"):
        prune(model, tokenizer, "embedded", slorb=4)
