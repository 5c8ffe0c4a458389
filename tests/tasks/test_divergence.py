"""Divergence from the dense model: by an explicit sum over the vocabulary, and in a sweep."""

import csv
import json
import math

import pytest
import torch
from conftest import make_tiny_llama
from kick_tasks.divergence import Divergence
from kick_tasks.speed import Speed, _prompts
from test_suites import ScriptedLM

from kick import cli
from kick.errors import ConfigError, KickError
from kick.lm.fast import FastLM
from kick.suite import DataSource, Example


def test_kl_and_agreement_of_two_models_token_by_token(tokenizer):
    dense, other = FastLM(make_tiny_llama(), tokenizer), FastLM(make_tiny_llama(), tokenizer)
    with torch.no_grad():
        other.model.model.layers[0].mlp.down_proj.weight.mul_(0.2)
    example = Example("w", "text", {"text": "The harbour was quiet in the morning."})
    (sample,) = Divergence().answer_beside(other, dense, [example])

    ids = [0, *tokenizer(example.content["text"], add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        p = dense.model(torch.tensor([ids[:-1]])).logits[0].double().softmax(-1).tolist()
        q = other.model(torch.tensor([ids[:-1]])).logits[0].double().softmax(-1).tolist()
    kl = sum(
        a * math.log(a / b) for row, other_row in zip(p, q, strict=True) for a, b in zip(row, other_row, strict=True)
    )
    agree = sum(row.index(max(row)) == other_row.index(max(other_row)) for row, other_row in zip(p, q, strict=True))
    assert sample.scores["tokens"] == len(ids) - 1
    assert sample.scores["kl"] == pytest.approx(kl, rel=1e-4)
    assert sample.scores["agree"] == agree
    assert sample.scores["kl"] > 0.01
    (same,) = Divergence().answer_beside(dense, dense, [example])
    assert (same.scores["kl"], same.scores["agree"]) == (0.0, len(ids) - 1)


def test_an_lm_without_whole_distributions_is_refused():
    with pytest.raises(KickError, match="does not give whole distributions"):
        list(Divergence().answer_beside(ScriptedLM(), ScriptedLM(), [Example("w", "t", {"text": "word"})]))


def test_models_of_two_vocabularies_are_refused(tokenizer):
    dense, other = FastLM(make_tiny_llama(), tokenizer), FastLM(make_tiny_llama(vocab_size=640), tokenizer)
    with pytest.raises(KickError, match="one vocabulary"):
        list(Divergence().answer_beside(other, dense, [Example("w", "t", {"text": "word"})]))


def test_the_same_windows_as_perplexity():
    source = DataSource.parse("embedded")
    texts = [example.content["text"] for example in Divergence().examples(source)]
    assert len(texts) > 50
    assert all(len(text.encode()) <= 1024 + 40 for text in texts)


def test_divergence_in_half_precision_is_of_exact_logits(tokenizer):
    dense, other = (FastLM(make_tiny_llama().to(torch.bfloat16), tokenizer) for _ in range(2))
    with torch.no_grad():
        other.model.model.layers[0].mlp.down_proj.weight.mul_(0.5)
    text = "The harbour was quiet in the morning."
    (sample,) = Divergence().answer_beside(other, dense, [Example("w", "text", {"text": text})])
    tokens = torch.tensor([[0, *tokenizer(text, add_special_tokens=False)["input_ids"]][:-1]])
    p, q = (
        (lm.model.model(tokens).last_hidden_state[0].float() @ lm.model.lm_head.weight.float().T).log_softmax(-1)
        for lm in (dense, other)
    )
    assert sample.scores["kl"] == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-4)


def test_speed_refuses_what_would_be_cut(tokenizer):
    lm = FastLM(make_tiny_llama(max_position_embeddings=128), tokenizer)
    speed = Speed(Speed.Params(repeats=2, batch=2, prompt_tokens=1000, new_tokens=8))
    asked = [example for example in speed.examples(DataSource.parse("embedded")) if example.group != "footprint"]
    with pytest.raises(ConfigError, match=r"and 8 new ones do not fit the model's context of 128"):
        next(speed.answer_beside(lm, lm, asked))


@pytest.mark.parametrize("tokens", [8, 256, 15_000, 19_000, 30_000])
def test_prompts_of_any_length_begin_at_different_places(tokens):
    prompts = [prompt for repeat in range(3) for prompt in _prompts(2, tokens, repeat)]
    assert {len(prompt) for prompt in prompts} == {4 * tokens + len("1. ")}
    assert len({prompt[3:40] for prompt in prompts}) == 6


def test_in_a_sweep_divergence_and_speed_describe_and_give_no_verdict(tmp_path, tiny_model):
    (tmp_path / "s.yaml").write_text(
        f"model: {tiny_model}\ndata: embedded\nsettings: [magnitude@0.5]\nsuites:\n"
        "  - {suite: divergence, limit: 3, params: {window_bytes: 256}}\n"
        "  - {suite: speed, params: {repeats: 2, batch: 2, prompt_tokens: 16, new_tokens: 3}}\n"
        "  - {suite: mmlu, limit: 8, params: {shots: 0}}\n"
    )
    assert cli.main(["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "run")]) == 0
    with open(tmp_path / "run/scores.csv") as file:
        rows = {(r["setting"], r["suite"], r["metric"], r["group"]): r for r in csv.DictReader(file)}
    kl = rows["magnitude@0.5", "divergence", "kl", "overall"]
    assert float(kl["score"]) > 0
    assert (kl["verdict"], kl["n"]) == ("", "3")
    assert float(rows["dense", "divergence", "kl", "overall"]["score"]) == 0.0
    assert float(rows["dense", "divergence", "top1_agreement", "overall"]["score"]) == 1.0
    for setting in ("dense", "magnitude@0.5"):
        assert float(rows[setting, "speed", "tokens_per_second", "generation, batch 2"]["score"]) > 0
        assert float(rows[setting, "speed", "peak_memory", "footprint"]["score"]) > 0.05
        assert rows[setting, "speed", "speedup", "overall"]["n"] == "8"
    page = (tmp_path / "run/report.html").read_text()
    assert "over no suite with a signal" in page or "over mmlu" in page  # neither of the two enters the mean


def test_a_checkpoint_by_itself_cannot_be_compared_with_dense(tmp_path, tiny_model, capsys):
    assert cli.main(["compress", str(tiny_model), "magnitude@0.5", "--out", str(tmp_path / "c")]) == 0
    arguments = ["evaluate", str(tmp_path / "c"), "--suite", "divergence", "--data", "embedded"]
    assert cli.main([*arguments, "--out", str(tmp_path / "run")]) == 2
    assert "compares with the dense model" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_interrupted_conversation_suite_ends_with_the_same_bytes(tmp_path, tiny_model):
    """A suite with two samples a question is taken up at whole questions."""
    (tmp_path / "s.yaml").write_text(
        f"model: {tiny_model}\ndata: embedded\nlm: {{batch_size: 2}}\n"
        "suites:\n  - {suite: mt_bench, params: {max_new_tokens: 4}, limit: 6}\n"
    )
    run = ["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "run")]
    assert cli.main(run) == 0
    folder = tmp_path / "run/evaluations/dense/mt_bench"
    whole = (folder / "samples.jsonl").read_bytes()
    lines = whole.split(b"\n")
    assert len(lines) == 12 + 1
    (folder / "samples.jsonl").write_bytes(b"\n".join(lines[:7]) + b"\n" + lines[7][:20])
    (folder / "scores.json").unlink()
    assert cli.main(run) == 0
    assert (folder / "samples.jsonl").read_bytes() == whole
    assert json.loads((folder / "scores.json").read_text())["asked_now"] == 4  # the second and third pair of questions
