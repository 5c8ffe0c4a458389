"""Supervised tuning: what is learned of a pair, LoRA that begins as nothing and merges, zeros that stay."""

import copy
import json

import pytest
import torch
from conftest import make_tiny_llama
from kick_compressors.magnitude import Magnitude
from kick_compressors.training.pairs import Pairs, encode, find_pairs
from kick_compressors.tune import Tune, add_lora, take_lora

from kick import adapters
from kick.blocks import find_decoder
from kick.errors import ConfigError, DataError
from kick.levels import Sparsity

TOKENS = torch.arange(24)[None] * 11 % 600


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    colours = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black"}
    rows = [
        {"instruction": f"What colour is {thing}?", "output": f"It is {colour}."} for thing, colour in colours.items()
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def tune(model, tokenizer, data, workspace=None, progress=lambda *_: None, **params):
    given = {"data": str(data), "steps": 50, "batch_size": 4, "sequence_length": 64, "learning_rate": 5e-3}
    compressor = Tune(Tune.Params(**{**given, **params}))
    compressor.tokenizer, compressor.workspace = tokenizer, workspace
    return compressor.compress(model, None, None, progress=progress), compressor


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def test_only_the_answer_is_learned(tokenizer):
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
    tokens, labels = encode(tokenizer, turns)
    assert tokenizer.decode(tokens) == "User: Hello\nAssistant: Good day</s>"
    learned = [token for token, label in zip(tokens, labels, strict=True) if label != -100]
    assert tokenizer.decode(learned) == " Good day</s>"


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "a", "input": "b", "output": "c"},
        {"prompt": "a", "response": "c"},
        {"question": "a", "answer": "c"},
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "c"},
            ]
        },
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "c"}]},
        {
            "conversations": [
                {"from": "gpt", "value": "of what was cut off"},
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "c"},
            ]
        },
    ],
)
def test_every_form_of_pair_is_read(tokenizer, tmp_path, row):
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    batch = Pairs(find_pairs(str(tmp_path / "p.jsonl")), tokenizer, 40, 0).batch(0, 2)
    assert batch.tokens.shape == batch.labels.shape
    kept = batch.labels[0][batch.labels[0] != -100]
    assert tokenizer.decode(kept) == " c</s>"


def test_pairs_of_the_hub_are_pairs_though_they_hold_a_text_as_well(tokenizer, monkeypatch):
    """As tatsu-lab/alpaca does: of the text, prompt and answer would be learned alike."""
    from kick_compressors.training import pairs as rooms

    rows = [{"instruction": f"a{n}", "input": "", "output": f"c{n}", "text": f"a{n} c{n}"} for n in range(3)]
    monkeypatch.setattr(rooms, "open_hub", lambda source: iter(rows))
    found = Pairs(find_pairs("owner/pairs"), tokenizer, 40, 0)
    assert len(found.rows) == 3
    labels = found.batch(0, 1).labels[0]
    assert tokenizer.decode(labels[labels != -100]).startswith(" c")
    rows[1].pop("output")
    with pytest.raises(DataError, match="row 2 of owner/pairs is no instruction pair: it has instruction, input, text"):
        Pairs(find_pairs("owner/pairs"), tokenizer, 40, 0)
    monkeypatch.setattr(rooms, "open_hub", lambda source: iter([{"text": "a story"}]))
    assert find_pairs("owner/texts") is None


def test_what_is_about_text_is_refused_beside_pairs(tokenizer, pairs):
    with pytest.raises(ConfigError, match=r"tune.text_field beside instruction pairs"):
        tune(make_tiny_llama(), tokenizer, pairs, text_field="instruction")


def test_a_chat_template_is_used_where_there_is_one(real_model):
    from kick.loading import load_tokenizer

    tokenizer = load_tokenizer(real_model.path)
    tokens, labels = encode(tokenizer, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}])
    assert "<|im_start|>user\nHi<|im_end|>" in tokenizer.decode(tokens)
    assert (
        tokenizer.decode([t for t, label in zip(tokens, labels, strict=True) if label != -100]) == "Hello!<|im_end|>\n"
    )


def test_pairs_that_do_not_fit_are_counted_and_bad_rows_named(tokenizer, tmp_path, pairs):
    with open(pairs, "a") as file:
        file.write("\n" + json.dumps({"instruction": "word " * 200, "output": "x"}))
    _, compressor = tune(make_tiny_llama(), tokenizer, pairs, steps=1)
    assert compressor.warnings == ["1 pairs have no answer within 64 tokens; left out."]
    with open(pairs, "a") as file:
        file.write("\n" + json.dumps({"conversations": [{"from": "gpt", "value": "to nobody's question"}]}))
    _, compressor = tune(make_tiny_llama(), tokenizer, pairs, steps=1)
    assert compressor.warnings == ["2 pairs have no answer within 64 tokens; left out."]
    with open(pairs, "a") as file:
        file.write("\n" + json.dumps({"instruction": "no output"}))
    with pytest.raises(DataError, match=r"line 7 of .* is no instruction pair: it has instruction"):
        tune(make_tiny_llama(), tokenizer, pairs, steps=1)


def test_lora_begins_as_nothing_and_merging_changes_nothing(tiny_llama):
    before = logits(tiny_llama)
    params = Tune.Params(rank=4, dropout=0.0)
    tuned = add_lora(tiny_llama, find_decoder(tiny_llama).linears, params).eval()
    assert torch.equal(logits(tuned), before)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    changed = logits(tuned)
    assert not torch.allclose(changed, before, atol=1e-2)
    kept = take_lora(copy.deepcopy(tuned), merge=False)
    merged = take_lora(tuned, merge=True)
    torch.testing.assert_close(logits(merged), changed, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(kept), changed, atol=1e-5, rtol=1e-5)
    assert len(adapters.attached(kept)) == 14


def test_fifty_steps_of_lora_lower_the_loss(tokenizer, pairs):
    _, compressor = tune(make_tiny_llama(), tokenizer, pairs)
    training = compressor.facts["training"]
    assert training["last_loss"] < 0.7 * training["first_loss"]


def test_every_word_of_an_answer_counts_the_same_however_the_batch_is_cut(tokenizer, tmp_path):
    rows = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(1, n + 1)))} for n in (1, 2, 9, 12)]
    (tmp_path / "counting.jsonl").write_text("\n".join(map(json.dumps, rows)))
    whole, single = (
        tune(make_tiny_llama(), tokenizer, tmp_path / "counting.jsonl", steps=4, rank=0, micro_batch=size)[1]
        for size in (0, 1)
    )
    for loss in ("first_loss", "last_loss"):
        assert single.facts["training"][loss] == pytest.approx(whole.facts["training"][loss], rel=1e-5)


class PlugPulledError(Exception):
    """Somebody pulled the plug."""


@pytest.mark.parametrize("rank", [0, 4])
def test_tuning_that_was_killed_ends_with_the_same_weights(tokenizer, pairs, tmp_path, rank):
    """With dropout, whose chance is resumed too."""

    def pull(done, *_):
        if done == 5:
            raise PlugPulledError

    options = {"steps": 8, "checkpoint_every": 2, "rank": rank, "dropout": 0.2}
    whole, _ = tune(make_tiny_llama(), tokenizer, pairs, tmp_path / "whole", **options)
    with pytest.raises(PlugPulledError):
        tune(make_tiny_llama(), tokenizer, pairs, tmp_path / "cut", pull, **options)
    resumed, _ = tune(make_tiny_llama(), tokenizer, pairs, tmp_path / "cut", **options)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_padding_does_not_count_as_trained(tokenizer, pairs):
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    texts = [f"User: {row['instruction']}\nAssistant: {row['output']}</s>" for row in rows]
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    assert len(set(lengths)) > 1
    _, compressor = tune(make_tiny_llama(), tokenizer, pairs, steps=2)  # each step all four
    assert compressor.facts["training"]["tokens"] == 2 * sum(lengths)


def test_zeros_stay(tokenizer, pairs):
    model = Magnitude().compress(make_tiny_llama(), Sparsity(fraction=0.5), None)
    zeros = [linear.weight == 0 for linear in find_decoder(model).linears]
    dense = [linear.weight.clone() for linear in find_decoder(model).linears]
    with pytest.raises(ConfigError, match="must stay zero"):
        tune(model, tokenizer, pairs, rank=4, steps=5)
    beside, _ = tune(copy.deepcopy(model), tokenizer, pairs, rank=4, merge=False, steps=5)
    assert all(
        (linear.weight[zero] == 0).all() for linear, zero in zip(find_decoder(beside).linears, zeros, strict=True)
    )
    tuned, _ = tune(model, tokenizer, pairs, rank=0, steps=5, weight_decay=0.1)
    for linear, zero, before in zip(find_decoder(tuned).linears, zeros, dense, strict=True):
        assert (linear.weight[zero] == 0).all()
        assert not torch.equal(linear.weight, before)
    assert not hasattr(tuned, "peft_config")
    free, _ = tune(copy.deepcopy(tuned), tokenizer, pairs, rank=4, steps=5, keep_zeros=False)
    assert any((linear.weight[zero] != 0).any() for linear, zero in zip(find_decoder(free).linears, zeros, strict=True))


def test_lora_is_not_put_beside_other_branches(tokenizer, pairs):
    tuned, _ = tune(make_tiny_llama(), tokenizer, pairs, merge=False, steps=2)
    with pytest.raises(ConfigError, match="merge: false, on a model that has adapters"):
        tune(tuned, tokenizer, pairs, merge=False, steps=2)


def test_it_recovers_a_model_whose_layers_differ_in_width(tokenizer, pairs):
    from kick_compressors.llm_pruner.compressor import LLMPruner

    from kick.calibration import Calibration, CalibrationSpec

    calibration = Calibration(TOKENS.repeat(2, 1), "test", CalibrationSpec())
    pruner = LLMPruner(LLMPruner.Params(skip_first=1, skip_last=0))
    model = pruner.compress(make_tiny_llama(), Sparsity(fraction=0.1), calibration)
    tuned, compressor = tune(model, tokenizer, pairs)
    assert compressor.facts["training"]["last_loss"] < compressor.facts["training"]["first_loss"]
    assert tuned.model.layers[1].mlp.up_proj.weight.shape[0] < 64
