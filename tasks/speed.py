"""What compression buys here and now: tokens per second, time to the first token, memory, bytes.

    kick sweep CONFIG.yaml       with a suite `speed`

Each measurement is repeated, and each time the dense model does the same work just before or after: `speedup` is dense
seconds over own seconds of such pairs, so that a noisy machine does not favour whoever was measured in a quiet minute.
Dense beside itself shows the noise. Nothing here is a verdict, and nothing enters a mean.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from kick.errors import ConfigError, KickError
from kick.jsonl import read_texts
from kick.lm import generate
from kick.spec import Spec
from kick.suite import CHARACTERS_PER_TOKEN, DataSource, Example, Metric, Sample, Suite

from . import sources


class Speed(Suite):
    name = "speed"
    description = "tokens per second of prompts and generation, time to first token, peak memory, bytes"
    needs_dense = True
    times_itself = True
    metrics = (
        Metric("speedup", value="dense_seconds", per="seconds", unit="times dense", descriptive=True),
        Metric("tokens_per_second", value="tokens", per="seconds", unit="tokens/s", descriptive=True),
        Metric("first_token_seconds", value="first_token", unit="s", higher_is_better=False, descriptive=True),
        Metric("peak_memory", value="peak_memory", unit="GB", higher_is_better=False, descriptive=True),
        Metric("disk", value="disk", unit="GB", higher_is_better=False, descriptive=True),
    )

    class Params(Spec):
        repeats: int = Field(default=5, ge=2)
        batch: int = Field(default=8, ge=2, description="the larger batch, beside 1")
        prompt_tokens: int = Field(default=256, ge=8, description="about so many")
        new_tokens: int = Field(default=32, ge=2)

    def examples(self, source: DataSource) -> list[Example]:
        """A measurement each. Repeats go round all kinds, so that a slow minute does not fall on one of them."""
        del source  # what is read does not matter; only that it is the same for all
        found = [Example("footprint", "footprint", {"kind": "footprint", "batch": 1})]
        for repeat in range(self.params.repeats):
            for batch in (1, self.params.batch):
                for kind in ("prompt", "generation"):
                    content = {"kind": kind, "batch": batch, "repeat": repeat}
                    found.append(Example(f"{kind}-{batch}-{repeat}", f"{kind}, batch {batch}", content))
        return found

    def answer(self, lm: Any, examples: Sequence[Example]) -> Iterator[Sample]:
        raise KickError("the suite 'speed' needs the dense model beside.", "Ask it in a sweep.")

    def answer_beside(self, lm: Any, dense: Any, examples: Sequence[Example]) -> Iterator[Sample]:
        warm: set[str] = set()
        for example in examples:
            if example.content["kind"] == "footprint":
                yield self._footprint(lm, example)
                continue
            prompts = _prompts(example.content["batch"], self.params.prompt_tokens, example.content["repeat"])
            self._check_room(lm, prompts)
            if example.group not in warm:
                for model in (lm, dense):
                    self._work(model, example, prompts)
                warm.add(example.group)
            order = (lm, dense) if example.content["repeat"] % 2 == 0 else (dense, lm)
            times = [self._work(model, example, prompts) for model in order]
            seconds, dense_seconds = times if order[0] is lm else reversed(times)
            yield self._sample(lm, example, prompts, seconds, dense_seconds)

    def _check_room(self, lm: Any, prompts: list[str]) -> None:
        """What does not fit would be cut, and tokens counted that were never read."""
        longest = max(len(lm.tok_encode(prompt)) for prompt in prompts)
        if longest + self.params.new_tokens > lm.max_length:
            raise ConfigError(
                f"speed: a prompt of {longest} tokens and {self.params.new_tokens} new ones do not fit the model's "
                f"context of {lm.max_length}.",
                "Ask for fewer prompt_tokens.",
            )

    def _work(self, lm: Any, example: Example, prompts: list[str]) -> float:
        new = self.params.new_tokens if example.content["kind"] == "generation" else 1
        start = time.perf_counter()
        generate(lm, prompts, [], max_new_tokens=new, min_new_tokens=new)
        return time.perf_counter() - start

    def _sample(self, lm: Any, example: Example, prompts: list[str], seconds: float, dense_seconds: float) -> Sample:
        read = sum(len(lm.tok_encode(prompt)) for prompt in prompts)
        made = len(prompts) * self.params.new_tokens if example.content["kind"] == "generation" else 0
        scores = {"seconds": seconds, "dense_seconds": dense_seconds, "tokens": float(made or read)}
        if example.content["kind"] == "prompt" and len(prompts) == 1:
            scores["first_token"] = seconds
        return Sample(
            example.id, example.group, "", scores=scores, n_prompt_tokens=read, n_output_tokens=made or len(prompts)
        )

    def _footprint(self, lm: Any, example: Example) -> Sample:
        """Peak memory of a fresh process that loads the checkpoint and answers once; nothing else is in the figure."""
        path = getattr(lm, "path", None)
        if path is None:
            return Sample(example.id, example.group, "", error="this LM does not say where its weights are")
        request = {
            "path": str(path),
            "dtype": str(lm.model.dtype).removeprefix("torch."),
            "device": str(lm.model.device),
            "prompt": _prompts(1, self.params.prompt_tokens, 0)[0],
            "new_tokens": self.params.new_tokens,
        }
        done = subprocess.run(
            [sys.executable, "-m", "kick.lm.footprint", json.dumps(request)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            return Sample(example.id, example.group, "", error=f"the measuring process failed: {done.stderr[-500:]}")
        disk = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
        scores = {"peak_memory": json.loads(done.stdout)["peak_bytes"] / 1e9, "disk": disk / 1e9}
        return Sample(example.id, example.group, "", scores=scores)

    def length(self, example: Example) -> int:
        return (
            2 * CHARACTERS_PER_TOKEN * example.content["batch"] * (self.params.prompt_tokens + self.params.new_tokens)
        )


def _prompts(batch: int, tokens: int, repeat: int) -> list[str]:
    """Texts of about `tokens` tokens that differ from their first word on, so that no prefix is shared."""
    text = " ".join(read_texts(sources.EMBEDDED / "perplexity" / "text.jsonl"))
    size = tokens * CHARACTERS_PER_TOKEN
    text *= 1 + 2 * size // len(text)
    starts = [(size * (repeat * batch + row) * 7) % (len(text) - size) for row in range(batch)]
    return [f"{row + 1}. {text[start : start + size]}" for row, start in enumerate(starts)]
