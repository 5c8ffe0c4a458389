"""An LM behind vLLM, in a process of its own: what crosses, how it begins and ends. Its engine is a script here."""

import io
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from processes import is_running

from kick import cli
from kick.errors import EngineError, KickError
from kick.lm import generate, load_lm
from kick.lm.spec import LMSpec
from kick.lm.vllm import VLLM, Worker


def test_an_interpreter_without_vllm_is_said_before_anything_is_done(tiny_model, tmp_path, capsys):
    arguments = ["evaluate", str(tiny_model), "--suite", "mmlu", "--data", "embedded", "--lm", "vllm"]
    assert cli.main([*arguments, "--out", str(tmp_path / "run")]) == 2
    assert "has no vllm" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


FAKE = """
import json, sys
class EngineDeadError(Exception): pass
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
            if own.max_tokens == 14: raise EngineDeadError("see the root cause above")
            if own.max_tokens == 15: import time; time.sleep(300)
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
    worker._log, worker._timeout = io.StringIO(), 60.0
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
    ask += "Worker(sys.argv[1], 'cpu', 1, False, 600).ask(engine={'model': sys.argv[2]})"
    asking = subprocess.Popen([sys.executable, "-c", ask, fake_vllm, str(pids)])
    wait_until(lambda: pids.is_file() and len(pids.read_text().split()) == 2)
    asking.kill()
    asking.wait()
    wait_until(lambda: not any(is_running(int(pid)) for pid in pids.read_text().split()))


@pytest.mark.parametrize(
    ("new_tokens", "timeout", "reason"),
    [
        (13, 600, "the engine ended (exit 3)"),
        (
            14,
            600,
            "EngineDeadError: see the root cause above",
        ),  # the one that asks its processes lives
        (15, 10, "the engine gave no answer within 10 s"),
    ],
)
def test_an_engine_that_ends_under_a_suite_is_started_again_for_the_next(
    new_tokens, timeout, reason, fake_vllm, tiny_model, tmp_path
):
    sweep = {
        "model": str(tiny_model),
        "data": "embedded",
        "settings": ["dense"],
        "suites": [
            {"suite": "factoid_qa", "params": {"shots": 0, "max_new_tokens": new_tokens}, "limit": 2},
            {"suite": "mmlu", "params": {"shots": 0}, "limit": 2},
        ],
        "lm": {"name": "vllm", "params": {"python": fake_vllm, "timeout": timeout}},
        "executor": {"name": "inline", "retries": 1},
    }
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    assert cli.main(["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "run")]) == 1
    found = {
        path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("run/evaluations/dense/*/scores.json")
    }
    assert found["mmlu"]["status"] == "complete"
    assert found["factoid_qa"]["status"] == "failed"
    assert reason in found["factoid_qa"]["reason"]
    assert found["factoid_qa"]["try_again"]


@pytest.mark.parametrize(("visible", "expected"), [("", "1,2"), ("4,5,6", "5,6")])
def test_an_engine_sees_the_gpus_that_are_meant(monkeypatch, visible, expected):
    from kick.lm.vllm import _visible_devices

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _visible_devices(1, 2) == expected
    if visible:
        with pytest.raises(KickError, match="3 GPUs are visible"):
            _visible_devices(2, 2)


def wait_until(holds, seconds=60):
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.05)
