"""Layer rules, sparsity allocated by outliers, and chains of stages."""

import json
import re

import pytest
import torch
from conftest import make_tiny_llama
from kick_compressors.external import External
from kick_compressors.magnitude import Magnitude
from kick_compressors.wanda import Wanda
from pydantic import ValidationError
from test_checkpoint import SMALL, make
from test_config import MINIMAL, write

from kick import cli
from kick.blocks import find_decoder
from kick.calibration import Calibration, CalibrationSpec, draw
from kick.checkpoint import GRIDS, verify
from kick.compress import Recipe, compress, prepare
from kick.compressor import outlier_shares
from kick.errors import ConfigError, LevelError
from kick.levels import Sparsity
from kick.loading import load_model, load_skeleton
from kick.models import find_source
from kick.policy import OWL, LayerRule, Policy, allocate
from kick.settings import Setting, parse_setting
from kick.sweep_file import load
from kick.walk import BlockWalk


def sparsities(model):
    return {linear.name: float((linear.weight == 0).float().mean()) for linear in find_decoder(model).linears}


def pruned(policy, level=0.5, layers=3):
    compressor = Magnitude()
    compressor.follow(policy, Sparsity(fraction=level))
    return sparsities(compressor.compress(make_tiny_llama(num_hidden_layers=layers), Sparsity(fraction=level), None))


def test_rules_by_place_and_by_name_the_last_one_wins():
    rules = (
        LayerRule(first=1, skip=True),
        LayerRule(last=1, level="0.25"),
        LayerRule(match="*.down_proj", level="0.75"),
        LayerRule(match="model.layers.1.self_attn.*", skip=True),
    )
    found = pruned(Policy(layers=rules))
    for name, sparsity in found.items():
        block = int(name.split(".")[2])
        expected = {0: 0.0, 1: 0.5, 2: 0.25}[block]
        if name.endswith("down_proj"):
            expected = 0.75
        elif block == 1 and "self_attn" in name:
            expected = 0.0
        assert sparsity == expected, name


@pytest.mark.parametrize("match", ["q_proj", "self_attn.q_proj", "model.layers.*.self_attn.q_proj"])
def test_a_glob_sees_the_whole_name_the_name_in_the_block_and_its_last_part(match):
    found = pruned(Policy(layers=(LayerRule(match=match, skip=True),)))
    assert {name.rpartition(".")[2] for name, sparsity in found.items() if sparsity == 0} == {"q_proj"}


def test_rules_that_say_nothing_or_two_things_are_refused():
    for rule in (
        {"first": 1},
        {"level": "0.5"},
        {"first": 1, "last": 1, "skip": True},
        {"first": 1, "level": "0.5", "skip": True},
    ):
        with pytest.raises(ValidationError, match="a layer rule has"):
            LayerRule(**rule)


def test_a_rule_that_matches_nothing_is_an_error():
    with pytest.raises(LevelError, match=r"the layer rule 'qproj' matches no linear.*\n.*self_attn\.q_proj"):
        pruned(Policy(layers=(LayerRule(match="qproj", skip=True),)))


def test_a_level_that_the_compressor_does_not_take_is_found_before_anything_is_loaded():
    setting = parse_setting("magnitude@0.5").model_copy(update={"layers": (LayerRule(first=1, level="high"),)})
    with pytest.raises(LevelError, match=r"setting 'magnitude@0\.5': level 'high'"):
        prepare(setting)


def test_a_tied_head_is_refused_and_may_be_skipped():
    with pytest.raises(LevelError, match=r"lm_head, whose weight is that of the embeddings"):
        pruned(Policy(layers=(LayerRule(match="lm_head", level="0.5"),)))
    assert set(pruned(Policy(layers=(LayerRule(match="lm_head", skip=True),))).values()) == {0.5}
    assert set(pruned(Policy(layers=(LayerRule(match="*", level="0.25"),))).values()) == {0.25}


def test_the_head_is_compressed_where_a_rule_names_it(tokenizer, tmp_path):
    """By Wanda: |W| times the norm of what reaches the head through the pruned blocks, within each row."""
    dense = make_tiny_llama(tie_word_embeddings=False)
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    source = find_source(str(tmp_path / "dense"))
    rule = LayerRule(match="lm_head", level="0.25")
    spec = CalibrationSpec(samples=6, sequence_length=32)
    setting = Setting(compressor="wanda", level="0.5", layers=(rule,))
    made = compress(Recipe.of(source, setting, spec), tmp_path / "out")
    found = load_model(made.path, "float32", "cpu")
    reached = []
    found.lm_head.register_forward_pre_hook(lambda _, args: reached.append(args[0].reshape(-1, 32)))
    with torch.no_grad():
        found(draw(spec, tokenizer).tokens)
    score = dense.lm_head.weight.abs() * torch.cat(reached).norm(dim=0)
    removed = score.argsort(dim=1)[:, :8]
    assert ((found.lm_head.weight == 0).sum(dim=1) == 8).all()
    assert (found.lm_head.weight.gather(1, removed) == 0).float().mean() > 0.99  # ties of rounding aside
    assert made.record["layers"]["lm_head"]["sparsity"] == 0.25
    linears = [linear.weight.numel() for linear in find_decoder(found).linears]
    head = found.lm_head.weight.numel()
    assert made.record["sparsity"] == pytest.approx((0.5 * sum(linears) + 0.25 * head) / (sum(linears) + head))
    assert made.record["coverage"]["share"] == 1.0
    assert verify(made) == []


def test_a_quantised_head_is_exported(tokenizer, tmp_path):
    from kick.export.gptq import write

    make_tiny_llama(tie_word_embeddings=False, vocab_size=640).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    source = find_source(str(tmp_path / "dense"))
    rule = LayerRule(match="lm_head", level="4")
    setting = Setting(compressor="awq", level="4", params={"group_size": 16}, layers=(rule,))
    spec = CalibrationSpec(samples=6, sequence_length=32)
    made = compress(Recipe.of(source, setting, spec), tmp_path / "out")
    exported = write(made, tmp_path / "gptq", "auto")
    assert json.loads((exported / "quantize_config.json").read_text())["lm_head"] is True
    again = External(External.Params(path=str(exported)))
    model = again.compress(load_skeleton(tmp_path / "dense", "float32"), None, None)
    assert torch.equal(model.lm_head.weight, load_model(made.path, "float32", "cpu").lm_head.weight)


def test_allocation_by_hand():
    # outlier shares 0, 1, 1 and sizes 2, 1, 1: kept extra 0, .2, .2 with the weighted mean .1
    assert allocate([0.0, 1.0, 1.0], [2, 1, 1], 0.5, 0.1) == pytest.approx([0.6, 0.4, 0.4])
    assert allocate([0.3, 0.3], [1, 1], 0.5, 0.1) == [0.5, 0.5]
    with pytest.raises(LevelError, match=r"a spread of 0\.1 asks a block for"):
        allocate([0.0, 1.0], [1, 1], 0.95, 0.1)


def test_outlier_shares_are_their_definition():
    model = make_tiny_llama()
    tokens = torch.randint(2, 600, (4, 16), generator=torch.Generator().manual_seed(0))
    decoder = find_decoder(model)
    found = outlier_shares(BlockWalk(model, decoder, tokens, torch.float32), decoder, 3.0)
    for block, share in zip(decoder.blocks, found, strict=True):
        scores = []
        for linear in block.linears:
            caught = []
            handle = linear.module.register_forward_pre_hook(lambda _, args, caught=caught: caught.append(args[0][0]))
            with torch.no_grad():
                for row in tokens:
                    model(row[None], use_cache=False)
            handle.remove()
            scores.append((linear.weight.abs() * torch.cat(caught).norm(dim=0)).flatten())
        whole = torch.cat(scores)  # of the block: one mean for all its linears, as the authors' code has it
        assert share == pytest.approx((whole > 3.0 * whole.mean()).float().mean().item(), abs=1e-4)


def test_owl_prunes_blocks_differently_and_reaches_the_mean():
    tokens = torch.randint(2, 600, (4, 16), generator=torch.Generator().manual_seed(0))
    compressor = Wanda()
    compressor.follow(Policy(allocation=OWL(outlier=3.0)), Sparsity(fraction=0.6))
    assert compressor.needs_calibration
    model = compressor.compress(
        make_tiny_llama(num_hidden_layers=3), Sparsity(fraction=0.6), Calibration(tokens, "t", SMALL)
    )
    found = sparsities(model)
    blocks = [[s for name, s in found.items() if f"layers.{i}." in name] for i in range(3)]
    means = [sum(block) / len(block) for block in blocks]
    assert max(means) - min(means) == pytest.approx(0.16, abs=0.03)  # rows of 32 round to 1/32
    sizes = {linear.name: linear.weight.numel() for linear in find_decoder(model).linears}
    assert sum(found[n] * sizes[n] for n in found) / sum(sizes.values()) == pytest.approx(0.6, abs=0.02)


def test_policies_and_chains_in_a_sweep_file(tmp_path):
    text = """
settings:
  - wanda@0.5 > gptq@4
  - compressor: magnitude
    levels: [0.5, 2:4]
    layers: [{first: 2, skip: true}, {match: "*.down_proj", level: 0.4}]
    then: [{compressor: rtn, level: 4, params: {group_size: 64}}]
    label: mine
  - {compressor: wanda, levels: [0.6], allocation: {rule: owl, spread: 0.05}, label: owl}
"""
    chain, first, second, owl = load(write(tmp_path, MINIMAL + text)).all_settings()[1:]
    assert (chain.name, chain.compressors, chain.levels) == ("wanda@0.5 > gptq@4", "wanda > gptq", "0.5 > 4")
    assert [stage.level for stage in chain.stages] == ["0.5", "4"]
    assert (first.name, second.name) == ("mine@0.5", "mine@2:4")
    assert first.layers[1].level == "0.4"
    assert first.then[0].params == {"group_size": 64}
    assert owl.allocation.spread == 0.05


@pytest.mark.parametrize("text", ["wanda@0.5 >", "> gptq@4", "wanda@0.5 > > gptq@4"])
def test_broken_chains_are_refused(text):
    with pytest.raises(LevelError, match="is not a setting"):
        parse_setting(text)


def chained(tiny_model, out, text, **params):
    setting = parse_setting(text)
    quantisers = {"gptq", "rtn", "awq"}  # pruners take no parameters
    then = tuple(
        stage.model_copy(update={"params": params if stage.compressor in quantisers else {}}) for stage in setting.then
    )
    source = find_source(str(tiny_model))
    return compress(Recipe.of(source, setting.model_copy(update={"then": then}), SMALL), out)


def test_a_chain_keeps_the_mask_and_says_what_each_stage_reached(tiny_model, tmp_path):
    made = chained(tiny_model, tmp_path / "out", "wanda@2:4 > gptq@4", group_size=16)
    record = made.record
    assert record["setting_name"] == "wanda@2:4 > gptq@4"
    assert [stage["compressor"] for stage in record["stages"]] == ["wanda", "gptq"]
    assert record["pattern_violations"] == record["grid_violations"] == 0
    assert record["sparsity"] >= 0.5
    layer = record["layers"]["model.layers.0.self_attn.q_proj"]
    assert (layer["pattern"], layer["bits"]) == ("2:4", 4)
    assert layer["bits_per_weight"] == record["bits_per_weight"] == 4 + (16 + 4) / 16
    alone = make(tiny_model, tmp_path / "alone", "wanda", "2:4").record["layers"]["model.layers.0.self_attn.q_proj"]
    pruned, rounded = (stage["layers"]["model.layers.0.self_attn.q_proj"] for stage in record["stages"])
    for error in ("weight_error", "reconstruction_error"):  # of each stage its own
        assert pruned[error] == alone[error]
        assert layer[error] == rounded[error] < pruned[error]
    assert verify(made) == []


def test_a_mask_that_quantisation_destroys_is_reported(tiny_model, tmp_path):
    made = chained(tiny_model, tmp_path / "out", "wanda@2:4 > gptq@8", group_size=16, keep_zeros=False)
    assert made.record["pattern_violations"] > 0
    assert made.record["stages"][0]["pattern_violations"] == 0
    assert any("groups of the pattern keep more weights" in warning for warning in made.record["warnings"])
    assert any("that wanda@2:4 had made zero are no longer zero" in warning for warning in made.record["warnings"])


@pytest.mark.parametrize("then", ["gptq@8", "gptq@8 > random@0.5"])
def test_zeros_that_come_back_are_counted_wherever_they_are(then, tiny_model, tmp_path):
    """Of an unstructured mask too, and though a later stage may make as many zeros elsewhere."""
    alone = load_model(make(tiny_model, tmp_path / "alone", "wanda", "0.5").path, "float32", "cpu")
    made = chained(tiny_model, tmp_path / "out", f"wanda@0.5 > {then}", group_size=16, keep_zeros=False)
    found = load_model(made.path, "float32", "cpu")
    pairs = [
        (a.weight, b.weight) for a, b in zip(find_decoder(alone).linears, find_decoder(found).linears, strict=True)
    ]
    expected = sum(int(((before == 0) & (after != 0)).sum()) for before, after in pairs)
    assert expected > 0
    assert made.record["stages"][0]["mask_violations"] == expected
    assert any(warning.startswith(f"{expected} weights that wanda@0.5") for warning in made.record["warnings"])


def test_a_changed_grid_is_noticed(tiny_model, tmp_path):
    made = make(tiny_model, tmp_path / "out", "rtn", "4", group_size=16)
    assert verify(made) == []
    (made.path / GRIDS).unlink()
    assert verify(made) == [f"{GRIDS} is missing"]
    assert json.loads((made.path / "kick.json").read_text())["bits_per_weight"] == 5.25


def test_layer_rules_for_something_that_knows_no_layers_are_refused(monkeypatch):
    from kick import plugins
    from kick.compressor import Compressor, Knob

    class Whole(Compressor):
        name = "whole"
        knob = Knob.SPARSITY

        def compress(self, model, level, calibration, *, progress=None):
            return model

    monkeypatch.setattr(plugins, "compressor", lambda name: Whole)
    setting = parse_setting("whole@0.5").model_copy(update={"layers": (LayerRule(first=1, skip=True),)})
    with pytest.raises(ConfigError, match="it takes no layer rules"):
        prepare(setting)


def test_a_grid_survives_pruning_by_zeros_and_not_by_updates(tiny_model, tmp_path):
    def quantised(out, text):
        setting = parse_setting(text).model_copy(update={"params": {"group_size": 16}})
        source = find_source(str(tiny_model))
        return compress(Recipe.of(source, setting, SMALL), out).record

    zeroed = quantised(tmp_path / "zeroed", "gptq@4 > wanda@0.5")
    assert (zeroed["grid_violations"], zeroed["bits_per_weight"], zeroed["sparsity"] >= 0.5) == (0, 5.25, True)
    updated = quantised(tmp_path / "updated", "gptq@4 > sparsegpt@0.5")
    assert updated["grid_violations"] > 0
    assert updated["bits_per_weight"] > 16  # it cannot be packed any more
    assert any("no longer on the grid" in warning for warning in updated["warnings"])


@pytest.mark.parametrize("text", ["sparsegpt@0.5+2bit", "sparsegpt@0.5+4bit"])
def test_weights_that_round_to_zero_are_no_fault(tiny_model, tmp_path, text):
    setting = parse_setting(text).model_copy(update={"params": {"group_size": 16}})
    source = find_source(str(tiny_model))
    made = compress(Recipe.of(source, setting, SMALL), tmp_path / "out")
    assert made.record["sparsity"] >= 0.5


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("{compressor: wanda, levels: [0.5], layers: [{match: '*.qproj', skip: true}]}", "matches no linear"),
        ("{compressor: magnitude, levels: [0.5], layers: [{match: lm_head, level: 0.2}]}", "that of the embeddings"),
        ("{compressor: magnitude, levels: ['3:7']}", "setting 'magnitude@3:7': .*7 does not divide its 32 inputs"),
        ("{compressor: sparsegpt, levels: ['32:64+4bit']}", "64 does not divide its 32 inputs"),
        ("{compressor: wanda, levels: [0.5], layers: [{last: 1, level: '3:7'}]}", "7 does not divide"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_what_the_model_does_not_take_is_said_before_anything_is_done(tmp_path, tiny_model, setting, says, dry, capsys):
    suites = "suites: [{suite: mmlu, limit: 4}]"
    (tmp_path / "sweep.yaml").write_text(f"model: {tiny_model}\ndata: embedded\nsettings: [{setting}]\n{suites}\n")
    arguments = ["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "run"), *dry]
    assert cli.main(arguments) == 2
    assert re.search(says, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
