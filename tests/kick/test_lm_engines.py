"""Whether LMs agree, and sweeps that use several."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny_llama
from model_server import ModelServer, served

from kick import cli
from kick.errors import ConfigError, KickError
from kick.lm import load_lm
from kick.lm.fast import FastLM
from kick.lm.parity import GENERATION, ask, compare, lead_of
from kick.lm.spec import LMSpec
from kick.progress import Silent
from kick.sweep.clock import Clock, Lane

# Do they agree?


def test_an_lm_agrees_with_itself_and_not_with_a_shifted_one(lm, tiny_model, tokenizer):
    answers = ask(lm)
    assert all(row.agrees and row.difference == 0 for row in compare(answers, answers, "float32"))

    class Shifted(FastLM):
        def _loglikelihood_tokens(self, requests, **kwargs):  # as an engine that adds a token in front
            return super()._loglikelihood_tokens([(words, [5, *context], more) for words, context, more in requests])

    rows = {row.kind: row for row in compare(answers, ask(Shifted(make_tiny_llama(), tokenizer)), "float32")}
    assert not rows["continuations"].agrees
    assert not rows["whole text"].agrees


def test_an_lm_that_gives_no_number_does_not_agree(lm):
    answers = ask(lm)
    broken = {**answers, "continuations": [*answers["continuations"][:-1], float("nan")]}
    assert [row.agrees for row in compare(answers, broken, "float32")] == [False, True, True]


@pytest.mark.parametrize(
    ("other", "agrees"),
    [
        (lambda text: text, True),
        (lambda text: text + "\nand more", False),  # it does not end at the stop string
        (lambda text: text[:3], False),
        (lambda text: "zz" + text[2:], False),
    ],
)
def test_texts_count_beside_likelihoods_that_agree(lm, other, agrees):
    answers = ask(lm)
    theirs = {**answers, GENERATION: [other(text) for text in answers[GENERATION]]}
    *_, texts = compare(answers, theirs, "float32", lead_of(lm, answers, theirs))
    assert texts.agrees == agrees
    assert bool(texts.reason) != agrees


def test_a_text_that_follows_the_other_of_two_tied_tokens_agrees(tokenizer):
    model = make_tiny_llama()
    lm = FastLM(model, tokenizer)
    answers = ask(lm)
    text = answers[GENERATION][0]
    first = tokenizer(text, add_special_tokens=False)["input_ids"][0]
    twin = next(token for token in range(300, 600) if token != first and tokenizer.decode([token]).isalpha())
    with torch.no_grad():
        model.lm_head.weight[twin] = model.lm_head.weight[first]
    tied = FastLM(model, tokenizer)
    mine = ask(tied)
    theirs = {**mine, GENERATION: [tokenizer.decode([twin]) + mine[GENERATION][0][4:], mine[GENERATION][1]]}
    assert theirs != mine
    assert lead_of(tied, mine, theirs) == pytest.approx(0.0, abs=1e-5)


def test_the_doctor_compares_fast_with_the_stock_lm(tiny_model, capsys, monkeypatch):
    assert cli.main(["doctor", str(tiny_model), "--lm", "fast", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["reference"] == "lm-eval's hf"
    assert [row["difference"] for row in found["requests"]] == pytest.approx([0, 0, 0], abs=1e-3)
    monkeypatch.setattr(FastLM, "complete", lambda self, contexts, decoding: ["zzz"] * len(contexts))
    assert cli.main(["doctor", str(tiny_model), "--lm", "fast"]) == 1
    said = capsys.readouterr().out
    assert "greedy generation (2): 1 of the texts differ  DISAGREES (a text parts where" in said
    assert "DISAGREES with lm-eval's hf" in said


def test_the_doctor_compares_an_lm_with_fast(lm, tiny_model, capsys):
    with ModelServer(lm) as server:
        arguments = ["doctor", str(tiny_model), "--lm", "server", "--param", f"lm.base_url={server.url}"]
        assert cli.main([*arguments, "--param", "lm.models.dense=tiny", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["agrees"] is True
    assert max(row["difference"] for row in found["requests"]) < 1e-3
    torn = make_tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    with ModelServer(FastLM(torn, lm.tokenizer)) as server:
        arguments = ["doctor", str(tiny_model), "--lm", "server", "--param", f"lm.base_url={server.url}"]
        assert cli.main([*arguments, "--param", "lm.models.dense=tiny"]) == 1
    assert "DISAGREES" in capsys.readouterr().out


def test_an_lm_that_cannot_be_asked_does_not_agree(tiny_model, capsys):
    arguments = ["doctor", str(tiny_model), "--lm", "server", "--param", "lm.base_url=http://127.0.0.1:9/v1"]
    assert cli.main([*arguments, "--param", "lm.models.dense=tiny", "--param", "lm.retries=0"]) == 1
    assert "DISAGREES with fast" in capsys.readouterr().out


def test_a_chat_endpoint_is_not_blamed_for_what_it_cannot_give(lm, tiny_model, capsys):
    with ModelServer(lm) as server:
        rows = {row.kind: row for row in compare(ask(lm), ask(served(tiny_model, server, api="chat")), "float32")}
        arguments = ["doctor", str(tiny_model), "--lm", "server", "--param", f"lm.base_url={server.url}"]
        assert cli.main([*arguments, "--param", "lm.models.dense=tiny", "--param", "lm.api=chat"]) == 1
    assert [(row.agrees, row.difference) for row in rows.values()] == [(True, None)] * 3
    assert "chat endpoint gives no log-probabilities" in rows["continuations"].reason
    assert "nothing could be compared with fast" in capsys.readouterr().out


def test_where_there_are_no_likelihoods_texts_tell_another_model(lm, tiny_model):
    other = FastLM(make_tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 100.0}), lm.tokenizer)
    other.model.lm_head.weight = torch.nn.Parameter(other.model.lm_head.weight.flip(0))
    for asked, agrees in ((lm, True), (other, False)):
        with ModelServer(asked, echo=False) as server:
            *likelihoods, texts = compare(ask(lm), ask(served(tiny_model, server)), "float32")
        assert [row.difference for row in likelihoods] == [None, None]
        assert texts.agrees == agrees


def test_an_lm_that_does_not_start_costs_its_own_suites_only(tiny_model, tmp_path, capsys):
    lm = {"name": "server", "params": {"base_url": "http://127.0.0.1:9/v1", "models": {"dense": "x"}, "retries": 0}}
    suites = [{"suite": "factoid_qa", "limit": 3, "lm": lm}, {"suite": "mmlu", "params": {"shots": 0}, "limit": 3}]
    sweep = {"model": str(tiny_model), "suites": suites, "data": "embedded"}
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    assert cli.main(["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "run")]) == 1
    statuses = [
        json.loads((tmp_path / "run" / "evaluations" / "dense" / suite / "scores.json").read_text())["status"]
        for suite in ("factoid_qa", "mmlu")
    ]
    assert statuses == ["failed", "complete"]
    parity = json.loads((tmp_path / "run" / "run.json").read_text())["parity"]
    assert not any(row["agrees"] for row in parity)


def test_the_doctor_looks_at_the_machine(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gflops"]["float32"] > 0
    assert found["broken"] == []
    assert cli.main(["doctor", "--lm", "fast"]) == 2


# Several in one sweep


def test_a_suite_may_have_an_lm_of_its_own_and_dense_may_be_asked_again(lm, tiny_model, tmp_path):
    with ModelServer(lm) as server:
        other = {
            "name": "server",
            "params": {"base_url": server.url, "models": {"dense": "tiny", "dense again": "another"}},
        }
        sweep = {
            "model": str(tiny_model),
            "settings": [{"compressor": "dense", "params": {"dtype": "bfloat16"}, "label": "dense again"}],
            "suites": [
                {"suite": "factoid_qa", "limit": 6, "lm": other},
                {"suite": "mmlu", "params": {"shots": 0}, "limit": 6},
            ],
            "data": "embedded",
        }
        (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
        assert cli.main(["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "run")]) == 0
    run = tmp_path / "run"
    lms = {
        (setting, suite): json.loads((run / "evaluations" / setting / suite / "scores.json").read_text())["lm"]
        for setting in ("dense", "dense again")
        for suite in ("factoid_qa", "mmlu")
    }
    assert [lm["name"] for lm in lms.values()] == ["server", "fast", "server", "fast"]
    assert [lms[setting, "factoid_qa"]["model"] for setting in ("dense", "dense again")] == ["tiny", "another"]
    assert lms["dense", "mmlu"]["dtype"] == "float32"
    assert lms["dense again", "mmlu"]["dtype"] == "bfloat16"
    parity = json.loads((run / "run.json").read_text())["parity"]
    assert {row["kind"] for row in parity} == {"continuations", "whole text", "greedy generation"}
    assert all(row["agrees"] for row in parity)
    scores = (run / "scores.csv").read_text()
    assert "dense again" in scores
    report = (run / "report.html").read_text()
    assert "dense again" in report
    assert "server beside fast" in report


def test_dense_takes_no_other_parameters(tiny_model, tmp_path, capsys):
    sweep = {
        "model": str(tiny_model),
        "settings": [{"compressor": "dense", "params": {"shots": 3}, "label": "again"}],
        "suites": ["mmlu"],
        "data": "embedded",
    }
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    assert cli.main(["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "run")]) == 2
    assert "unknown key 'shots'" in capsys.readouterr().err


def test_an_lm_that_fails_the_check_of_parity_is_closed_before_the_next_is_loaded(tmp_path, monkeypatch):

    from kick.sweep import work

    events = []

    class Model:
        def __init__(self, name):
            self.name = name

        def close(self):
            events.append(f"close {self.name}")

    def load(spec, *_):
        events.append(f"load {spec.name}")
        return Model(spec.name)

    def ask_it(lm):
        if lm.name == "fast":
            raise RuntimeError("CUDA error")
        raise KickError("it cannot")

    monkeypatch.setattr(work, "load_lm", load)
    monkeypatch.setattr(work, "ask", ask_it)
    kept = []
    store = SimpleNamespace(parity=lambda: None, keep_parity=kept.extend)
    specs = [LMSpec(name="fast"), LMSpec(name="vllm")]
    monkeypatch.setattr(work, "lms", lambda config: specs)
    plan = SimpleNamespace(config=None, dense=None, dtype="float32", device="cpu")
    workshop = SimpleNamespace(plan=plan, store=store, checkpoint=lambda *_: SimpleNamespace(path=None))
    display = Silent()
    display.note = events.append
    work.check_parity(workshop, Lane(Clock(display, {})), work.Rules())
    assert events[:4] == ["load vllm", "close vllm", "load fast", "close fast"]
    assert kept


def test_parameters_of_an_lm_are_checked():
    with pytest.raises(ConfigError, match="lm 'fast': unknown key 'rows'"):
        load_lm(LMSpec(params={"rows": 3}), None, "float32", "cpu")
