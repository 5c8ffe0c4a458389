"""How fast do the LMs answer, and do they answer the same, beside stock lm-eval on the same rows and model?

    python benchmarks/answer.py --data DIR [--only mmlu-5]... [--repeats 3] [--vllm PYTHON] [--out FILE]

The same suite asks each LM the same questions, one LM after the other, each alone in a process of its own: kick's
`fast` in float32 and bfloat16, stock `HFLM` in float32, and, with an interpreter that has vLLM, kick's `vllm` LM.
`fast` is asked as a sweep asks it, in batches of the sweep's default size; HFLM gets all questions at once, and its
batch size is the fastest of those tried on the first round. Seconds, CPU seconds and peak resident memory are those of
the answering alone, without imports and loading.

"useful" tokens are those that must be computed at least once: distinct beginnings of all requests. Their operations
(2 for each weight of a linear layer, attention to the tokens before, the vocabulary where something is scored), over
the time and over the speed of plain matrix products in the same process, are the share of the bound that was reached.

Prints medians and ratios, and writes every run to --out as JSON; runs that are already there are not repeated. Linux.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from kick import loading, models
from kick.config import SuiteSpec
from kick.lm import load_lm
from kick.lm.spec import LMSpec
from kick.meter import Meter
from kick.sweep.plan import PlannedSuite, plan_suite

MODEL = "smollm2-135m"
SUBJECTS = (
    "high_school_european_history",
    "anatomy",
    "astronomy",
    "college_biology",
    "professional_medicine",
    "virology",
)
WORKLOADS: dict[str, dict[str, Any]] = {
    "mmlu-5": {"suite": "mmlu", "params": {"shots": 5, "subjects": SUBJECTS}, "limit_per_group": 60},
    "mmlu-0": {"suite": "mmlu", "params": {"shots": 0, "format": "cloze", "subjects": SUBJECTS}, "limit_per_group": 30},
    "hellaswag": {"suite": "lm_eval:hellaswag", "limit": 100},
    "arc_easy": {"suite": "lm_eval:arc_easy", "limit": 200},
    "short-answers": {"suite": "factoid_qa", "params": {"max_new_tokens": 32}, "limit": 100},
    "summaries": {"suite": "summarization", "params": {"max_new_tokens": 128}},
    "questions-100": {"suite": "mmlu", "params": {"shots": 0, "subjects": SUBJECTS[1:]}, "limit": 100},
    "questions-1000": {"suite": "mmlu", "params": {"shots": 0, "subjects": SUBJECTS[1:]}, "limit": 1000},
}
LIKELIHOOD_BATCHES, GENERATION_BATCHES = (1, 4, 8), (20, 50, 100)
GENERATES = ("short-answers", "summaries")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--only", action="append", choices=WORKLOADS, default=[])
    parser.add_argument("--side", action="append", default=[], help="fast:float32, fast:bfloat16, hflm:float32, ...")
    parser.add_argument("--hflm-batch", type=int, help="instead of trying several")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vllm", metavar="PYTHON", help="an interpreter that has vLLM")
    parser.add_argument("--out", type=Path, default=Path("answer.json"))
    options = parser.parse_args()
    store = Runs(
        options.out,
        {
            "data": options.data,
            "vllm": options.vllm,
            "checkpoint": str(options.out.resolve().with_suffix(".checkpoint")),
        },
    )
    sides = options.side or [
        "fast:float32",
        "fast:bfloat16",
        "hflm:float32",
        *(["vllm:float32"] if options.vllm else []),
    ]
    for workload in options.only or WORKLOADS:
        for repeat in range(options.repeats):
            for side in sides if repeat % 2 == 0 else sides[::-1]:
                name, dtype = side.split(":")
                for batch in _batches(store, workload, name, repeat, options.hflm_batch):
                    store.measure(workload, name, dtype, batch, repeat)
        print_results(store, workload)
    return 0


def _batches(store: "Runs", workload: str, side: str, repeat: int, given: int | None) -> tuple[int, ...]:
    """HFLM: several batch sizes in the first round, the fastest of them in the others. 0: the side's own way."""
    if side != "hflm":
        return (0,)
    if given:
        return (given,)
    if repeat == 0:
        return GENERATION_BATCHES if workload in GENERATES else LIKELIHOOD_BATCHES
    first = [run for run in store.of(workload, "hflm") if run["repeat"] == 0]
    return (min(first, key=lambda run: run["wall"])["batch"],) if first else (8,)


class Runs:
    """Measurements on disk, each made once."""

    def __init__(self, path: Path, where: dict[str, Any]) -> None:
        self.path, self.where = path, where
        self.runs: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []

    def of(self, workload: str, side: str, dtype: str | None = None) -> list[dict[str, Any]]:
        return [r for r in self.runs if (r["workload"], r["side"]) == (workload, side) and dtype in (None, r["dtype"])]

    def measure(self, workload: str, side: str, dtype: str, batch: int, repeat: int) -> None:
        job = {"workload": workload, "side": side, "dtype": dtype, "batch": batch, "repeat": repeat}
        if any(job.items() <= run.items() for run in self.runs):
            return
        command = [sys.executable, __file__, "--job", json.dumps(job | self.where)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        run = job | json.loads(done.stdout.splitlines()[-1])
        self.runs.append(run)
        self.path.write_text(json.dumps(self.runs, indent=1))
        used = f", CPU {run['cpu']:.0f} s, peak {run['peak'] / 1e9:.2f} GB" if run["peak"] else ""
        print(f"{workload} {side} {dtype} batch {batch or 'own'}: {run['wall']:.1f} s{used}", flush=True)


def print_results(store: Runs, workload: str) -> None:
    """Medians beside stock HFLM, and how far the answers agree with it."""
    best = _best(store.of(workload, "hflm"))
    for side, dtype in dict.fromkeys((run["side"], run["dtype"]) for run in store.runs if run["workload"] == workload):
        runs = _best(store.of(workload, side, dtype))
        wall, peak = median(run["wall"] for run in runs), max(run["peak"] or 0 for run in runs)
        line = f"{workload} | {side} {dtype} | {len(runs)} runs | {wall:.1f} s"
        line += f" | peak {peak / 1e9:.2f} GB" if peak else ""
        if "share" in runs[0]:
            line += f" | {median(run['share'] for run in runs):.0%} of the bound"
        if best and side != "hflm":
            line += f" | {median(run['wall'] for run in best) / wall:.2f}x faster than HFLM (batch {best[0]['batch']})"
            line += f" | {agreement(runs[0]['answers'], best[0]['answers'])}"
        print(line, flush=True)


def _best(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs with the batch size that was fastest."""
    if not runs:
        return []
    fastest = min(runs, key=lambda run: run["wall"])["batch"]
    fastest = next((run["batch"] for run in runs if run["repeat"] > 0), fastest)
    return [run for run in runs if run["batch"] == fastest]


def agreement(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    """In words: answers that differ, the largest difference of a log-likelihood, the score of each."""
    if any(a["prompt"] != b["prompt"] for a, b in zip(ours, theirs, strict=True)):
        raise SystemExit("The two were asked different prompts: their times say nothing about each other.")
    different = sum(_answer(a) != _answer(b) for a, b in zip(ours, theirs, strict=True))
    pairs = [
        abs(x - y) for a, b in zip(ours, theirs, strict=True) for x, y in zip(a["values"], b["values"], strict=True)
    ]
    words = f"{different} of {len(ours)} answers differ"
    if pairs:
        words += f", log-likelihoods by at most {max(pairs):.1e}"
    scores = [sum(row["score"] for row in rows) / len(rows) for rows in (ours, theirs)]
    return f"{words}, score {scores[0]:.3f} and {scores[1]:.3f}"


def _answer(row: dict[str, Any]) -> Any:
    """Suites of lm-eval only rank options: there it is the likeliest one."""
    values = row["values"]
    return row["output"] if row["output"] is not None else max(range(len(values)), key=values.__getitem__)


# One measurement, in a process of its own


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    if job["side"] in ("fast", "vllm"):
        path = models.fetch(models.find_source(MODEL))
        spec = LMSpec()
        if job["side"] == "vllm":
            path, spec = _directory(path, Path(job["checkpoint"])), LMSpec(name="vllm", params={"python": job["vllm"]})
        lm = load_lm(spec, path, job["dtype"], "cpu")
    else:
        lm = _hflm(job["dtype"], job["batch"])
    planned = planned_suite(job["workload"], job["data"])
    if job["side"] == "fast":
        pieces = planned.suite.batches(planned.examples, LMSpec().batch_size)
    else:
        pieces = [planned.examples]
    cpu = _cpu_seconds()
    with Meter() as meter:
        samples = [sample for piece in pieces for sample in planned.suite.answer(lm, piece)]
    result: dict[str, Any] = {"wall": meter.seconds, "cpu": _cpu_seconds() - cpu, "peak": meter.peak_bytes}
    if job["side"] == "vllm":  # it works in other processes
        result |= {"cpu": None, "peak": None}
    metric = planned.suite.metrics[0]
    result["answers"] = [
        {
            "prompt": hashlib.sha256(sample.prompt.encode()).hexdigest()[:16],
            "output": sample.output,
            "values": [choice["loglikelihood"] for choice in sample.choices or []],
            "score": sample.scores.get(metric.value, 0.0),
        }
        for sample in samples
    ]
    if job["side"] == "fast" and job["workload"] not in GENERATES:
        result["flops"] = useful_flops(lm, planned)
        result["flops_per_second"] = product_speed(lm)
        result["share"] = result["flops"] / meter.seconds / result["flops_per_second"]
    if hasattr(lm, "close"):
        lm.close()
    return result


def planned_suite(workload: str, data: str) -> PlannedSuite:
    planned = plan_suite(SuiteSpec(**WORKLOADS[workload]), data)
    if workload != "summaries":
        return planned
    by_words = sorted(planned.examples, key=lambda example: abs(len(example.content["article"].split()) - 500))
    return replace(planned, examples=by_words[:20])  # stories of about 500 words


def _directory(path: Path, folder: Path) -> Path:
    """The model as a directory, which engines want; made once."""
    if not (folder / "config.json").is_file():
        loading.load_tokenizer(path).save_pretrained(folder)
        loading.load_model(path, "float32", "cpu").save_pretrained(folder)
    return folder


def _hflm(dtype: str, batch: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    path = models.fetch(models.find_source(MODEL))
    tokenizer = loading.load_tokenizer(path)
    lm = HFLM(pretrained=loading.load_model(path, dtype, "cpu"), tokenizer=tokenizer, batch_size=batch)
    lm.has_chat_template = bool(tokenizer.chat_template)  # the suites ask, and else it would get other prompts
    return lm


def _cpu_seconds() -> float:
    """Of this process and the children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def useful_flops(lm: Any, planned: PlannedSuite) -> float:
    """Operations that any way of answering must do: each distinct beginning once."""
    config = lm.model.config
    linear = sum(
        p.numel() for n, p in lm.model.named_parameters() if p.dim() == 2 and "embed" not in n and "head" not in n
    )
    head = config.vocab_size * config.hidden_size
    wide = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    total = 0.0
    previous: tuple[int, ...] = ()
    scored: set[tuple[int, ...]] = set()
    for context, continuation in sorted(requests(lm, planned)):
        sequence = (*context, *continuation[:-1])
        new = len(sequence) - _common(previous, sequence)
        depth = len(sequence) - new
        total += 2 * linear * new + 4 * wide * config.num_hidden_layers * sum(range(depth + 1, len(sequence) + 1))
        scored |= {sequence[: len(context) + i] for i in range(len(continuation))}
        previous = sequence
    return total + 2 * head * len(scored)


def requests(lm: Any, planned: PlannedSuite) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(context, continuation) of everything that the suite asks, in tokens."""
    seen: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def note(asked: list[Any], **_: Any) -> list[tuple[float, bool]]:
        seen.extend((tuple(context), tuple(continuation)) for _, context, continuation in asked)
        return [(0.0, False)] * len(asked)

    lm._loglikelihood_tokens, answering = note, lm._loglikelihood_tokens
    list(planned.suite.answer(lm, planned.examples))
    lm._loglikelihood_tokens = answering
    yield from seen


def _common(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def product_speed(lm: Any) -> float:
    """Operations per second of plain products, of the shapes of this model's MLP with 512 rows: the best of five."""
    weight = next(p for n, p in lm.model.named_parameters() if "gate_proj" in n).detach()
    rows = torch.randn(512, weight.shape[1]).to(weight.dtype)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(20):
            torch.nn.functional.linear(rows, weight)
        best = max(best, 20 * 2 * 512 * weight.numel() / (time.perf_counter() - start))
    return best


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--job":
        print(json.dumps(run_job(json.loads(sys.argv[2]))))
        sys.exit(0)
    sys.exit(main())
