"""LMs whose model lives elsewhere: a server, vLLM; whether LMs agree; sweeps that use several."""

import io
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny_llama
from model_server import ModelServer

from kick import cli
from kick.errors import ConfigError, EngineError, KickError, NotGivenError
from kick.lm import generate, load_lm, loglikelihoods, rolling_loglikelihoods
from kick.lm.fast import FastLM
from kick.lm.generation import Decoding
from kick.lm.parity import ask, compare
from kick.lm.spec import LMSpec
from kick.lm.vllm import VLLM, Worker
from kick.progress import Silent
from kick.sweep.clock import Clock, Lane

PAIRS = [("The sea is", " wide"), ("The sea is", " deep and cold"), ("", "Rain"), ("A ", "b")]


def served(path, server, **params):
    params = {"base_url": server.url, "models": {"dense": "tiny"}, "retries": 1, **params}
    return load_lm(LMSpec(name="server", params=params), path, "float32", "cpu")


# A server


def test_a_served_model_says_what_the_model_says(lm, tiny_model):
    with ModelServer(lm) as server:
        other = served(tiny_model, server)
        for own, theirs in zip(loglikelihoods(lm, PAIRS), loglikelihoods(other, PAIRS), strict=True):
            assert theirs[0] == pytest.approx(own[0], abs=1e-4)
            assert theirs[1] == own[1]
        text = "Rivers carve valleys over thousands of years."
        assert rolling_loglikelihoods(other, [text]) == pytest.approx(rolling_loglikelihoods(lm, [text]), abs=1e-3)
        prompts = ["The lighthouse", "Bread is"]
        assert generate(other, prompts, ["."], 8) == generate(lm, prompts, ["."], 8)
        assert all(isinstance(body["prompt"], list) for body in server.bodies)
        assert generate(served(tiny_model, server, prompt="text"), prompts, [], 8) == generate(lm, prompts, [], 8)
        assert isinstance(server.bodies[-1]["prompt"], str)


def test_all_that_decides_a_completion_is_sent(lm, tiny_model):
    with ModelServer(lm) as server:
        stops = ["a1", "b2", "c3", "d4", "e"]
        (text,) = generate(
            served(tiny_model, server), ["The sea"], stops, 24, min_new_tokens=2, temperature=0.7, seed=3
        )
        body = server.bodies[-1]
    assert {key: body[key] for key in ("max_tokens", "temperature", "min_tokens")} == {
        "max_tokens": 24, "temperature": 0.7, "min_tokens": 2,
    }  # fmt: skip
    # what an engine would take from the model's generation_config.json is undone
    assert (body["repetition_penalty"], body["top_k"], body["min_p"]) == (1, -1, 0)
    assert body["stop"] == stops[:4]  # the protocol takes four; the fifth ends the text here
    assert "e" not in text


def test_repeated_prompts_are_sampled_anew_and_the_same_in_any_call(lm, tiny_model):
    with ModelServer(lm) as server:
        other = served(tiny_model, server)
        generate(other, ["The sea", "The sea", "Rain"], [], 4, temperature=0.7, seed=3)
        generate(other, ["Rain"], [], 4, temperature=0.7, seed=3)
        generate(other, ["Rain"], [], 4, temperature=0.7, seed=4)
        *first, again, changed = (body["seed"] for body in server.bodies)
    assert len(set(first)) == 3
    assert again in first
    assert changed not in first
    assert all(0 <= seed < 2**63 for seed in first)


def test_an_endpoint_that_knows_the_plain_protocol_alone_is_asked_in_it(lm, tiny_model):
    with ModelServer(lm, unknown={"repetition_penalty", "min_p", "top_k"}) as server:
        other = served(tiny_model, server)
        assert generate(other, ["The sea"], [], 6) == generate(lm, ["The sea"], [], 6)
        assert "defaults of top_k" in other.record()["decoding"]
        generate(other, ["Rain"], [], 6)
        assert ["top_k" in body for body in server.bodies] == [True, False, False]
        with pytest.raises(KickError, match="unknown: top_k"):  # asked for, and not to be dropped
            other.complete([[2, 3]], Decoding((), 4, temperature=0.7, top_k=5))


def test_what_an_endpoint_says_against_a_request_is_passed_on(lm, tiny_model):
    with ModelServer(lm, takes_tokens=False) as server, pytest.raises(KickError, match="prompt must be a string"):
        generate(served(tiny_model, server), ["The sea"], [], 4)


def test_a_special_token_as_stop_string_is_sent_as_a_token(lm, tiny_model):
    with ModelServer(lm) as server:
        generate(served(tiny_model, server), ["The sea"], ["</s>", "\n"], 4)
        assert server.bodies[-1]["stop_token_ids"] == [lm.tokenizer.eos_token_id]
        generate(served(tiny_model, server), ["The sea"], ["\n"], 4)
        assert "stop_token_ids" not in server.bodies[-1]


def test_a_chat_endpoint_gets_conversations_and_gives_no_likelihoods(lm, tiny_model):
    with ModelServer(lm) as server:
        other = served(tiny_model, server, api="chat")
        assert other.has_chat_template
        conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        talk = other.apply_chat_template(conversation)
        generate(other, [talk, "plain"], ["\n"], 4)
        asked = [body["messages"] for body in server.bodies]
        assert conversation in asked
        assert [{"role": "user", "content": "plain"}] in asked
        assert generate(other, ["plain"], ["\n"], 0) == [""]  # endpoints refuse to generate nothing
        assert len(server.bodies) == len(asked)
        with pytest.raises(KickError, match="chat endpoint gives no log-probabilities"):
            loglikelihoods(other, PAIRS)
        with pytest.raises(KickError, match="takes no token ids gives no log-probabilities"):
            loglikelihoods(served(tiny_model, server, prompt="text"), PAIRS)


def test_as_text_a_prompt_loses_only_what_the_server_puts_there_itself(lm, tiny_model):
    """A chat template may begin with what is called the beginning of text, though no tokenizer puts it there."""
    talk = "<s>user\nHello"
    with ModelServer(lm) as server:
        generate(served(tiny_model, server, prompt="text"), [talk], [], 4)
        assert server.bodies[-1]["prompt"] == talk
        other = served(tiny_model, server, prompt="text")
        other._begin = [lm.tokenizer.bos_token_id]  # as if it did
        generate(other, [talk], [], 4)
        assert server.bodies[-1]["prompt"] == "user\nHello"


@pytest.mark.parametrize("how", [{"prompt": "text"}, {"api": "chat"}])
def test_a_server_that_cuts_prompts_is_found_out(lm, tiny_model, how):
    text = "The sea is wide and deep. " * 20
    choice = {"text": "x", "message": {"content": "x"}}
    with ModelServer(lm, body={"choices": [choice], "usage": {"prompt_tokens": 64}}) as server:
        with pytest.raises(KickError, match="read 64 tokens where"):
            generate(served(tiny_model, server, **how), [text], [], 4)
        assert generate(served(tiny_model, server, **how), ["The sea"], [], 4) == ["x"]  # of a template, it may be


def test_a_chat_endpoint_cannot_go_on_with_an_answer(lm, tiny_model):
    with ModelServer(lm) as server, pytest.raises(NotGivenError, match="ends the assistant's turn"):
        served(tiny_model, server, api="chat").apply_chat_template(
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": "The answer is"}],
            add_generation_prompt=False,
        )


def test_replies_that_are_empty_for_a_reason_are_counted(lm, tiny_model):
    body = {"choices": [{"text": "", "finish_reason": "content_filter"}]}
    with ModelServer(lm, body=body) as server:
        other = served(tiny_model, server)
        assert generate(other, ["The sea", "Rain"], [], 4) == ["", ""]
        assert other.record()["empty_replies"] == {"content_filter": 2}


def test_what_may_go_by_itself_is_worth_another_try(lm, tiny_model):
    for status, kind in ((429, EngineError), (503, EngineError), (400, KickError)):
        with ModelServer(lm, status=status, faults=9) as server, pytest.raises(KickError) as raised:
            generate(served(tiny_model, server, retries=0), ["The sea"], [], 4)
        assert type(raised.value) is kind


def test_failures_that_pass_are_retried(lm, tiny_model):
    with ModelServer(lm, faults=2) as server:
        other = served(tiny_model, server, concurrency=1, retries=2)
        assert generate(other, ["The sea"], [], 4) == generate(lm, ["The sea"], [], 4)
        assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("server", "says"),
    [
        ({"status": 404, "faults": 9}, "failed: "),
        ({"status": 503, "faults": 9}, "failed: "),
        ({"echo": False}, "no log-probabilities of the prompt"),
        ({"body": {"object": "text_completion"}}, "no completion"),
        ({"body": {"object": "text_completion", "choices": []}}, "no completion"),
        (
            {"body": {"choices": [{"text": "", "logprobs": {"token_logprobs": [-1.0] * 9, "top_logprobs": [{}] * 9}}]}},
            "no log-probabilities of the prompt",
        ),
        ({"body": "cut"}, "no completion"),
    ],
)
def test_failures_that_stay_are_said_without_the_key(lm, tiny_model, monkeypatch, server, says):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key-of-mine")
    with ModelServer(lm, **server) as running:
        other = served(tiny_model, running, retries=1, concurrency=1)
        with pytest.raises(KickError, match=says) as raised:
            loglikelihoods(other, PAIRS)
    assert running.keys == {"Bearer secret-key-of-mine"}
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"choices": [{"text": None}]}, "no completion"),
        ({"choices": [{"message": {"content": "of a chat"}}]}, "no completion"),
        ({"choices": [{"text": "x"}], "usage": {"prompt_tokens": 99}}, "read 99 tokens where"),
    ],
)
def test_replies_of_another_shape_are_no_completions(lm, tiny_model, body, says):
    with ModelServer(lm, body=body) as server, pytest.raises(KickError, match=says):
        generate(served(tiny_model, server), ["The sea"], [], 4)


def test_a_message_without_content_says_nothing_and_no_message_is_an_error(lm, tiny_model):
    with ModelServer(lm, body={"choices": [{"message": {"content": None}}]}) as server:
        assert generate(served(tiny_model, server, api="chat"), ["The sea"], [], 4) == [""]
    with ModelServer(lm, body={"choices": [{"message": None}]}) as server, pytest.raises(KickError, match="completion"):
        generate(served(tiny_model, server, api="chat"), ["The sea"], [], 4)


def test_the_first_error_ends_it_whatever_else_is_under_way(lm, tiny_model):
    begun, go_on = [], threading.Event()

    def work(item):
        begun.append(item)
        if item == 0:
            go_on.wait(30)
        elif item == 1:
            raise KickError("refused")
        return item

    with ModelServer(lm) as server:
        other = served(tiny_model, server, concurrency=2)
        with pytest.raises(KickError, match="refused"):
            other._all(work, range(40))
        assert not go_on.is_set()
        assert len(begun) < 10
        go_on.set()


def test_every_setting_needs_a_served_model(tiny_model, tmp_path, capsys):
    sweep = {
        "model": str(tiny_model),
        "settings": ["magnitude@0.5"],
        "suites": ["factoid_qa"],
        "data": "embedded",
        "lm": {"name": "server", "params": {"base_url": "http://localhost:1/v1", "models": {"dense": "x"}}},
    }
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    assert cli.main(["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "run")]) == 2
    assert "no served model is named for the setting 'magnitude@0.5'" in capsys.readouterr().err
    sweep["lm"]["params"]["base_url"] = "http://me:secret@localhost:1/v1"
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    assert cli.main(["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "run")]) == 2
    assert "the endpoint's URL holds a credential" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_evaluating_a_served_model_from_the_command_line(lm, tiny_model, tmp_path):
    with ModelServer(lm) as server:
        arguments = ["evaluate", str(tiny_model), "--suite", "factoid_qa", "--data", "embedded", "--limit", "4"]
        arguments += ["--lm", "server", "--param", f"lm.base_url={server.url}", "--param", "lm.models.dense=tiny"]
        assert cli.main([*arguments, "--out", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run" / "evaluations" / "dense" / "factoid_qa" / "scores.json").read_text())
    assert result["lm"]["name"] == "server"
    assert result["n"] == 4


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
    from types import SimpleNamespace

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
    assert events[:4] == ["load fast", "close fast", "load vllm", "close vllm"]
    assert kept


# vLLM


def test_an_interpreter_without_vllm_is_said_before_anything_is_done(tiny_model, tmp_path, capsys):
    arguments = ["evaluate", str(tiny_model), "--suite", "mmlu", "--data", "embedded", "--lm", "vllm"]
    assert cli.main([*arguments, "--out", str(tmp_path / "run")]) == 2
    assert "has no vllm" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


FAKE = """
import json, sys
class Logprob:
    def __init__(self, logprob, rank): self.logprob, self.rank = logprob, rank
class SamplingParams:
    logprob_token_ids = None
    def __init__(self, **options): self.__dict__.update(options)
class LLM:
    def __init__(self, model, **options):
        if "parent" in model:
            import os, subprocess, time
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
            open(model, "w").write(f"{os.getpid()} {child.pid}")
            time.sleep(300)  # an engine that hangs
        if "broken" in model:
            print("RuntimeError: the model is broken", file=sys.stderr)
            raise ValueError("see above")
        class Config: max_model_len = options.get("max_model_len", 2048)
        class Engine: model_config = Config
        self.llm_engine = Engine
        print("noise on standard output")
    def generate(self, prompts, parameters, use_tqdm):
        found = []
        for prompt, own in zip(prompts, parameters):
            tokens = prompt["prompt_token_ids"]
            class Output: prompt_logprobs = None
            class Generated:
                token_ids = [max(own.logprob_token_ids)] if own.logprob_token_ids else [*tokens[:own.max_tokens], 9]
                finish_reason, stop_reason = "stop", own.stop[0] if getattr(own, "stop", None) else None
                logprobs = [{t: Logprob(-float(t), 1) for t in own.logprob_token_ids or []}]
            if own.max_tokens == 13: import os; os._exit(3)
            if hasattr(own, "prompt_logprobs"):
                Output.prompt_logprobs = [None] + [{t: Logprob(-t / 10, 1 if t % 2 else 2)} for t in tokens[1:]]
            Output.outputs = [Generated]
            found.append(Output)
        return found
__version__ = "0.0"
"""


@pytest.fixture
def fake_vllm(tmp_path, monkeypatch):
    """A vLLM that knows every token's log-likelihood, in this interpreter's place: the path to it is what is tested."""
    import kick.interpreter

    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "vllm.py").write_text(FAKE)
    python = tmp_path / "python"
    code = f"import sys, runpy; sys.path.insert(0, {str(tmp_path / 'engine')!r}); "
    code += "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    python.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} -I -c "{code}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(kick.interpreter, "version_in", lambda *_: "0.0")
    return str(python)


def test_what_crosses_to_an_engine_and_back(fake_vllm, tiny_model):
    other = load_lm(LMSpec(name="vllm", params={"python": fake_vllm}), tiny_model, "float32", "cpu")
    pairs = [([2, 3], [7]), ([2, 3], [9]), ([2], [5, 11]), ([2], [6])]
    asked = [(("", ""), context, continuation) for context, continuation in pairs]
    # single tokens of one context are asked for at once; a context with a longer option by prompt log-probabilities
    assert other._loglikelihood_tokens(asked) == [
        (-7.0, False),
        (-9.0, True),
        (pytest.approx(-1.6), True),
        (pytest.approx(-0.6), False),
    ]
    # the fake says the beginning of the prompt again, then an end
    assert generate(other, ["The sea is wide"], [], 2) == ["The se"]
    nine = other.tokenizer.decode([9])
    assert generate(other, ["The sea is wide"], ["!"], 2) == ["The se" + nine]  # cut here, not by the engine
    assert generate(other, ["The sea is wide"], ["se", "The"], 2) == [""]  # the first of all stops, not of one token
    assert other.max_length == 2046
    with pytest.raises(KickError, match=r"the engine ended \(exit 3\)"):
        generate(other, ["The sea"], [], 13)
    other.close()


def test_a_line_that_was_cut_is_the_end_of_an_engine():
    worker = Worker.__new__(Worker)
    worker._process = SimpleNamespace(
        stdin=io.StringIO(), stdout=io.StringIO('{"result": [1'), wait=lambda _: None, returncode=-9
    )
    worker._log = io.StringIO()
    with pytest.raises(EngineError, match=r"the engine ended \(exit -9\)"):
        worker.ask(score={})


def test_two_engines_need_half_a_gpu_each():
    assert not VLLM.leaves_room_for_another(VLLM.Params(), "cuda")
    assert VLLM.leaves_room_for_another(VLLM.Params(memory_utilization=0.45), "cuda")
    assert VLLM.leaves_room_for_another(VLLM.Params(), "cpu")


def test_an_engine_that_does_not_start_says_why(fake_vllm, tiny_model, tmp_path):
    (tmp_path / "broken").symlink_to(tiny_model)
    with pytest.raises(KickError, match="ValueError: see above") as raised:
        load_lm(LMSpec(name="vllm", params={"python": fake_vllm}), tmp_path / "broken", "float32", "cpu")
    assert "RuntimeError: the model is broken" in str(raised.value)


def test_nothing_of_an_engine_outlives_the_process_that_asked(fake_vllm, tmp_path):
    """Killed in a moment in which the engine does not listen; its child holds the GPU's memory."""
    pids = tmp_path / "parent"
    ask = "from kick.lm.vllm import Worker; import sys; "
    ask += "Worker(sys.argv[1], 'cpu', 1, False).ask(engine={'model': sys.argv[2]})"
    asking = subprocess.Popen([sys.executable, "-c", ask, fake_vllm, str(pids)])
    wait_until(lambda: pids.is_file() and len(pids.read_text().split()) == 2)
    asking.kill()
    asking.wait()
    wait_until(lambda: not any(is_running(int(pid)) for pid in pids.read_text().split()))


def test_an_engine_that_ends_under_a_suite_is_started_again_for_the_next(fake_vllm, tiny_model, tmp_path):
    sweep = {
        "model": str(tiny_model),
        "data": "embedded",
        "settings": ["dense"],
        "suites": [
            {"suite": "factoid_qa", "params": {"shots": 0, "max_new_tokens": 13}, "limit": 2},
            {"suite": "mmlu", "params": {"shots": 0}, "limit": 2},
        ],
        "lm": {"name": "vllm", "params": {"python": fake_vllm}},
        "executor": {"name": "inline", "retries": 1},
    }
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    assert cli.main(["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "run")]) == 1
    found = {
        path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("run/evaluations/dense/*/scores.json")
    }
    assert found["mmlu"]["status"] == "complete"
    assert found["factoid_qa"]["status"] == "failed"
    assert "the engine ended (exit 3)" in found["factoid_qa"]["reason"]


def wait_until(holds, seconds=60):
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.05)


def is_running(pid):
    """Also where nobody waits for processes that have ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("visible", "expected"), [("", "1,2"), ("4,5,6", "5,6")])
def test_an_engine_sees_the_gpus_that_are_meant(monkeypatch, visible, expected):
    from kick.lm.vllm import _visible_devices

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _visible_devices(1, 2) == expected
    if visible:
        with pytest.raises(KickError, match="3 GPUs are visible"):
            _visible_devices(2, 2)


def test_parameters_of_an_lm_are_checked():
    with pytest.raises(ConfigError, match="lm 'fast': unknown key 'rows'"):
        load_lm(LMSpec(params={"rows": 3}), None, "float32", "cpu")
