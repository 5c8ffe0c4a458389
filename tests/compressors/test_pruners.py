"""Magnitude and Wanda on small models, against their definitions."""

import pytest
import torch
from conftest import make_tiny_llama
from kick_compressors.magnitude import Magnitude
from kick_compressors.wanda import Wanda

from kick.blocks import find_decoder
from kick.calibration import Calibration, CalibrationSpec
from kick.errors import LevelError
from kick.levels import Pattern, Sparsity
from kick.measured import Structure, measure


def calibration(samples=6, length=32, vocabulary=600, seed=0):
    tokens = torch.randint(2, vocabulary, (samples, length), generator=torch.Generator().manual_seed(seed))
    return Calibration(tokens, "test", CalibrationSpec(samples=samples, sequence_length=length))


def wanda_mask(weight, inputs, level):
    """Wanda straight from the paper: |W_ij| ||X_j||_2, the smallest of each row go. inputs [tokens, in], all stored."""
    score = weight.abs() * torch.stack([inputs[:, j].norm() for j in range(inputs.shape[1])])
    mask = torch.zeros_like(weight, dtype=torch.bool)
    groups = (
        [(0, weight.shape[1])]
        if isinstance(level, Sparsity)
        else [(s, s + level.of) for s in range(0, weight.shape[1], level.of)]
    )
    for row in range(weight.shape[0]):
        for start, end in groups:
            size = end - start
            keep = level.keep if isinstance(level, Pattern) else size - round(level.fraction * size)
            order = sorted(range(start, end), key=lambda j: (-score[row, j].item(), j))
            mask[row, order[:keep]] = True
    return mask


def groups_of(model):
    """Groups of linears that share an input, in the order in which they run."""
    return [group for block in find_decoder(model).blocks for group in block.groups]


def stored_inputs(model, module, tokens):
    """Every input that `module` gets in a plain forward pass of the whole model: [tokens, in]."""
    caught = []
    handle = module.register_forward_pre_hook(lambda _, args: caught.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        for row in tokens:
            model(row[None], use_cache=False)
    handle.remove()
    return torch.cat(caught)


@pytest.mark.parametrize("level", [Sparsity(fraction=0.5), Pattern(keep=2, of=4)])
def test_wanda_is_its_definition_with_later_blocks_seeing_pruned_inputs(level):
    text = calibration()
    pruned = Wanda().compress(make_tiny_llama(), level, text)
    reference = make_tiny_llama()  # the definition, block by block: prune a block with what the pruned ones before give
    for ours, block in zip(find_decoder(pruned).blocks, find_decoder(reference).blocks, strict=True):
        inputs = {linear.name: stored_inputs(reference, linear.module, text.tokens) for linear in block.linears}
        for linear, mine in zip(block.linears, ours.linears, strict=True):
            mask = wanda_mask(linear.weight, inputs[linear.name], level)
            assert torch.equal(mine.weight != 0, mask), linear.name
        for linear, mine in zip(block.linears, ours.linears, strict=True):
            linear.weight.copy_(mine.weight)


def test_a_later_block_is_pruned_by_pruned_inputs_not_dense_ones():
    level, text = Sparsity(fraction=0.6), calibration()
    dense = make_tiny_llama()
    pruned = Wanda().compress(make_tiny_llama(), level, text)
    last = find_decoder(dense).blocks[-1].linears[0]
    ours = find_decoder(pruned).blocks[-1].linears[0]
    by_dense_inputs = wanda_mask(last.weight, stored_inputs(dense, last.module, text.tokens), level)
    assert not torch.equal(ours.weight != 0, by_dense_inputs)


@pytest.mark.parametrize("compressor", [Magnitude, Wanda])
@pytest.mark.parametrize(
    "level", [Sparsity(fraction=0.3), Sparsity(fraction=0.7), Pattern(keep=2, of=4), Pattern(keep=4, of=8)]
)
def test_the_asked_number_of_weights_becomes_zero(compressor, level):
    model = compressor().compress(make_tiny_llama(), level, calibration())
    patterns = {linear.name: level for linear in find_decoder(model).linears} if isinstance(level, Pattern) else {}
    for name, layer in measure(model, structure=Structure(patterns=patterns)).layers.items():
        rows, columns = layer["shape"]
        if isinstance(level, Pattern):
            expected = layer["weights"] * (level.of - level.keep) // level.of
        elif compressor is Wanda:
            expected = rows * round(level.fraction * columns)
        else:
            expected = round(level.fraction * layer["weights"])
        assert layer["zeros"] == expected, name
        assert layer.get("pattern_violations", 0) == 0


@pytest.mark.parametrize("compressor", [Magnitude, Wanda])
def test_only_linears_inside_the_blocks_change(compressor):
    before = {name: value.clone() for name, value in make_tiny_llama().state_dict().items()}
    after = compressor().compress(make_tiny_llama(), Sparsity(fraction=0.5), calibration()).state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "proj" in name}


def test_what_stays_is_untouched_and_what_goes_is_smallest():
    model = Magnitude().compress(make_tiny_llama(), Sparsity(fraction=0.5), None)
    for linear, dense in zip(find_decoder(model).linears, find_decoder(make_tiny_llama()).linears, strict=True):
        kept = linear.weight != 0
        assert torch.equal(linear.weight[kept], dense.weight[kept])
        assert dense.weight[~kept].abs().max() <= dense.weight[kept].abs().min()


def test_the_same_calibration_gives_the_same_weights():
    first, second = (
        Wanda().compress(make_tiny_llama(), Sparsity(fraction=0.5), calibration()).state_dict() for _ in "ab"
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_pattern_that_does_not_divide_an_input_changes_nothing():
    model = make_tiny_llama(intermediate_size=66)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(LevelError, match="does not divide its 66 inputs"):
        Magnitude().compress(model, Pattern(keep=2, of=4), None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.real_model
@pytest.mark.parametrize("level", [Sparsity(fraction=0.5), Pattern(keep=2, of=4)])
def test_wanda_on_two_blocks_of_the_real_model(real_checkpoint, level):
    from kick.calibration import draw
    from kick.loading import load_model, load_tokenizer

    text = draw(
        CalibrationSpec(samples=4, sequence_length=64, precision="float32"), load_tokenizer(real_checkpoint.path)
    )
    models = [load_model(real_checkpoint.path, "float32", "cpu") for _ in "ab"]
    for model in models:  # the first two blocks only
        del model.model.layers[2:]
        model.config.num_hidden_layers = 2
    pruned, reference = Wanda().compress(models[0], level, text), models[1]
    for ours, block in zip(find_decoder(pruned).blocks, find_decoder(reference).blocks, strict=True):
        inputs = {linear.name: stored_inputs(reference, linear.module, text.tokens) for linear in block.linears}
        for linear, mine in zip(block.linears, ours.linears, strict=True):
            score = linear.weight.abs() * inputs[linear.name].norm(dim=0)
            groups = score if isinstance(level, Sparsity) else score.reshape(score.shape[0], -1, level.of)
            remove = round(0.5 * groups.shape[-1])
            order = groups.argsort(dim=-1, stable=True)
            mask = (
                torch.ones_like(groups, dtype=torch.bool).scatter_(-1, order[..., :remove], False).reshape(score.shape)
            )
            differ = (mine.weight != 0) != (mask & (linear.weight != 0))
            assert differ.sum() <= 1e-5 * differ.numel(), linear.name  # scores that are equal but for the order of sums
        for linear, mine in zip(block.linears, ours.linears, strict=True):
            linear.weight.copy_(mine.weight)
