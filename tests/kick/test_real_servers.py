"""The same model in kick's own process and behind servers that others wrote."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from loopback import free_port

from kick.config import SuiteSpec
from kick.lm import generate, load_lm
from kick.lm.parity import ask, compare, lead_of
from kick.lm.spec import LMSpec
from kick.sweep.plan import plan_suite

VLLM = os.environ.get("KICK_TEST_VLLM")
needs_vllm = pytest.mark.skipif(not VLLM, reason="set KICK_TEST_VLLM to an interpreter with vLLM")

PROMPTS = ["The lighthouse stood", "Q: What is the capital of France?\nA:"]


@contextmanager
def serving(command, port, log, seconds, **environment):
    """The URL of the server that `command` starts."""
    with open(log, "w") as output:
        process = subprocess.Popen(
            [*map(str, command), "--host", "127.0.0.1", "--port", str(port)],
            stdout=output, stderr=output, env={**os.environ, **environment}, start_new_session=True,
        )  # fmt: skip
    try:
        until = time.monotonic() + seconds
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, Path(log).read_text()[-2000:]
            assert time.monotonic() < until, Path(log).read_text()[-2000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


def served(path, url, name, **params):
    params = {"base_url": url, "models": {"dense": name}, "retries": 1, **params}
    return load_lm(LMSpec(name="server", params=params), path, "float32", "cpu")


@pytest.mark.real_model
@pytest.mark.skipif(not (find_spec("fastapi") and find_spec("uvicorn")), reason="transformers serve needs fastapi")
def test_transformers_serve_goes_on_as_fast_does(real_checkpoint, tmp_path):
    """It takes no token ids, gives no log-probabilities and refuses keys that it does not know."""
    path, port = real_checkpoint.path, free_port()
    own = generate(load_lm(LMSpec(), path, "float32", "cpu"), PROMPTS, ["\n"], 12)
    command = [Path(sys.executable).with_name("transformers"), "serve", path, "--device", "cpu", "--dtype", "float32"]
    with serving(command, port, tmp_path / "log", 120) as url:
        other = served(path, url, str(path), prompt="text")
        assert generate(other, PROMPTS, ["\n"], 12) == own
        chat = served(path, url, str(path), api="chat")
        question = chat.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}])
        (answer,) = generate(chat, [question], ["\n"], 12)
    assert "Paris" in answer
    assert "decoding" in other.record()


@pytest.mark.real_model
@needs_vllm
def test_vllm_serve_agrees_with_fast(real_checkpoint, tmp_path):
    path, port = real_checkpoint.path, free_port()
    server = [VLLM, "-m", "vllm.entrypoints.openai.api_server"]
    command = [*server, "--model", path, "--served-model-name", "m", "--dtype", "float32", "--max-model-len", "2048"]
    with serving(command, port, tmp_path / "log", 300, VLLM_CPU_KVCACHE_SPACE="1") as url:
        own = load_lm(LMSpec(), path, "float32", "cpu")
        mine, theirs = ask(own), ask(served(path, url, "m"))
        rows = compare(mine, theirs, "float32", lead_of(own, mine, theirs))
    assert all(row.agrees and row.n for row in rows)
    assert rows[0].difference < 1e-2


@pytest.mark.real_model
@needs_vllm
def test_vllm_scores_the_real_model_as_fast_does(real_checkpoint):
    other = load_lm(LMSpec(name="vllm", params={"python": VLLM}), real_checkpoint.path, "float32", "cpu")
    own = load_lm(LMSpec(), real_checkpoint.path, "float32", "cpu")
    mine, theirs = ask(own), ask(other)
    rows = compare(mine, theirs, "float32", lead_of(own, mine, theirs))
    other.close()
    assert all(row.agrees for row in rows)
    assert rows[0].difference < 1e-2


@pytest.mark.real_model
@needs_vllm
@pytest.mark.parametrize(
    ("suite", "params"),
    [
        ("factoid_qa", {"shots": 3, "max_new_tokens": 12}),
        ("mmlu", {"shots": 2}),
        ("mmlu", {"shots": 0, "format": "cloze"}),
        ("summarization", {"max_new_tokens": 24}),
        ("perplexity", {}),
    ],
)
def test_suites_give_in_vllm_what_they_give_in_fast(real_checkpoint, suite, params):
    """But for a question on which two answers are tied."""
    planned = plan_suite(SuiteSpec(suite=suite, params=params, limit=6), "embedded")
    found = []
    for spec in (LMSpec(), LMSpec(name="vllm", params={"python": VLLM})):
        with closing(load_lm(spec, real_checkpoint.path, "float32", "cpu")) as lm:
            found.append(list(planned.suite.answer(lm, planned.examples)))
    apart = [pair for pair in zip(*found, strict=True) if pair[0].output != pair[1].output]
    assert len(apart) <= 1
    for own, other in zip(*found, strict=True):
        if (own, other) not in apart:
            assert other.scores == pytest.approx(own.scores, rel=1e-3)
