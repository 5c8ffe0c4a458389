"""An LM behind an endpoint: what is sent, what comes back, what goes wrong."""

import json
import signal
import socket
import subprocess
import sys
import threading

import pytest
from model_server import ModelServer, served

from kick import cli
from kick.errors import EngineError, KickError, NotGivenError
from kick.lm import generate, loglikelihoods, rolling_loglikelihoods
from kick.lm.generation import Decoding

PAIRS = [("The sea is", " wide"), ("The sea is", " deep and cold"), ("", "Rain"), ("A ", "b")]


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


def test_ctrl_c_ends_a_process_whose_endpoint_never_replies(tiny_model):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        ask = f"""
from pathlib import Path
from kick.lm import generate, load_lm
from kick.lm.spec import LMSpec
spec = LMSpec(name="server", params={{"base_url": {url!r}, "models": {{"dense": "m"}}}})
generate(load_lm(spec, Path({str(tiny_model)!r}), "float32", "cpu", "dense"), ["The sea"], [], 4)
"""
        asking = subprocess.Popen(
            [sys.executable, "-c", ask], stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells ignore it in the background
        )  # fmt: skip
        connection, _ = silent.accept()  # it has asked, and would wait for ten minutes
        asking.send_signal(signal.SIGINT)
        _, said = asking.communicate(timeout=60)
        connection.close()
    assert asking.returncode != 0
    assert said.rstrip().endswith("KeyboardInterrupt")


def test_an_endpoint_is_asked_again_after_it_failed(lm, tiny_model):
    with ModelServer(lm, status=404, faults=1) as server:
        other = served(tiny_model, server, concurrency=1)
        with pytest.raises(KickError, match="failed"):
            generate(other, ["The sea"], [], 4)
        assert generate(other, ["The sea"], [], 4) == generate(lm, ["The sea"], [], 4)
        other.close()
