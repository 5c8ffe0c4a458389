"""What a plan would cost, before it is carried out: questions, time and disk, from rates measured here."""

from collections import Counter
from pathlib import Path
from typing import Any

from kick.devices import is_usable
from kick.models import bytes_to_fetch
from kick.progress import duration
from kick.settings import DENSE
from kick.suite import CHARACTERS_PER_TOKEN
from kick.sweep.costs import (
    A100,
    TRAINING_SHARE,
    checkpoint_bytes,
    remarks,
    speed_of,
    training_seconds,
    worker_bytes,
)
from kick.sweep.executors import find_executor
from kick.sweep.plan import Plan
from kick.sweep.run import missing_evaluations
from kick.sweep.store import RUN, Store, check_usable

_OVERHEAD = 3.0
"""Measured wall seconds over matrix products at full speed alone, on the packaged model: attention, generation token by
token, loading, and the few-shot examples in front of a question."""


def describe(plan: Plan, out: Path, fresh: bool = False) -> tuple[str, dict[str, Any]]:
    """The plan in words and as a document. Nothing is written; what the run would refuse is refused here."""
    check_usable(out, plan, fresh)
    store = Store(out)
    missing = {s.name: plan.suites for s in plan.settings} if fresh else missing_evaluations(plan, store)
    held = out if (out / RUN).is_file() and not fresh else None
    parameters = plan.parameters
    names = {name: [s.name for s in suites] for name, suites in missing.items()}
    own, machine = _seconds(plan, store, names, parameters)
    costs = {name: cost for name, cost in plan.training.items() if name in missing}
    here = training_seconds(plan, costs)
    training = {
        name: {
            "tokens": cost.tokens,
            "memory_bytes": cost.memory_bytes,
            "seconds_here": here[name],
            "a100_hours": cost.operations / (A100 * TRAINING_SHARE) / 3600,
        }
        for name, cost in costs.items()
    }
    machine += sum(cost["seconds_here"] for cost in training.values())
    workers = find_executor(plan.config.executor).works_here(plan)
    memory = max(1, workers) * worker_bytes(plan, costs)
    compressed = [name for name in missing if name != DENSE]
    asked = plan.config.executor.workers
    known = workers or (0 if asked == "auto" else asked)  # a cluster gives as many as it has
    side_by_side = max(1, min(known, len(missing)))
    # on a CPU workers share the cores that products were measured on
    seconds = own / side_by_side + machine / (1 if workers and plan.device == "cpu" else side_by_side)
    checkpoints = plan.dense_bytes * bool(missing) + checkpoint_bytes(plan, len(compressed), known or len(compressed))
    questions = sum(len(suite.examples) for suite in plan.suites)
    document: dict[str, Any] = {
        "out": str(out),
        "exists": (out / RUN).is_file(),
        "model": plan.source.name,
        "dtype": plan.dtype,
        "device": plan.device,
        "settings": [setting.name for setting in plan.settings],
        "suites": {suite.name: len(suite.examples) for suite in plan.suites},
        "evaluations": len(plan.settings) * len(plan.suites),
        "missing": {name: [suite.name for suite in suites] for name, suites in missing.items()},
        "bytes_to_fetch": bytes_to_fetch(plan.source, plan.path),
        "estimated_seconds": round(seconds),
        "estimated_disk_bytes": round(checkpoints + len(missing) * questions * 3000),
        "estimated_memory_bytes": memory,
        "workers_here": workers,
        "training": training,
        "judge": _judge(plan, names, held),
    }
    todo = sum(map(len, missing.values()))
    where = " of one node" if workers == 0 else f", by {workers} workers" if workers > 1 else ""
    judged = document["judge"]
    lines = [
        f"{plan.source.name} in {plan.dtype} on {plan.device}, into {out}",
        f"{len(plan.settings)} settings: {', '.join(document['settings'])}",
        "suites: " + ", ".join(f"{name} ({count} questions)" for name, count in document["suites"].items()),
        f"{document['evaluations']} evaluations, {document['evaluations'] - todo} already there, {todo} to do",
        f"about {duration(seconds)}{'' if known else ' of one worker'}, "
        f"{document['estimated_disk_bytes'] / 1e9:.1f} GB of disk and "
        f"{memory / 1e9:.1f} GB of memory at the peak{where}",
    ]
    if (to_fetch := document["bytes_to_fetch"]) != 0:
        size = "weights (the hub does not say how large)" if to_fetch is None else f"{to_fetch / 1e9:.1f} GB of weights"
        lines.append(f"first {size} would be fetched from the Hugging Face hub")
    if not is_usable(plan.device):
        lines.append(f"there is no {plan.device} on this machine: times are those of an A100")
    lines += remarks(plan)
    for name, cost in training.items():
        what = f"trains on at most {cost['tokens']:,} tokens" if cost["tokens"] else "takes gradients"
        lines.append(
            f"{name} {what}: about {duration(cost['seconds_here'])} here, {cost['a100_hours']:.1f} hours of an A100; "
            f"{cost['memory_bytes'] / 1e9:.1f} GB for weights, gradients and optimizer"
        )
    if judged:
        usd = "" if judged["estimated_usd"] is None else f", about {judged['estimated_usd']:.2f} USD"
        lines.append(f"judge: at most {judged['questions']:,} questions, {judged['tokens']:,} tokens{usd}")
    return "\n".join(lines), document


def _judge(plan: Plan, missing: dict[str, list[str]], held: Path | None) -> dict[str, Any] | None:
    """What grading the missing answers, and those in the run `held` that are not graded, may take at most."""
    spec = plan.config.judge
    if spec is None:
        return None
    from kick.judge.estimate import expected_of

    found = expected_of(plan, missing, held, spec)
    tokens = found.prompt_tokens + found.reply_tokens
    return {"questions": found.questions, "tokens": tokens, "estimated_usd": found.usd(spec)}


def _seconds(plan: Plan, store: Store, missing: dict[str, list[str]], parameters: int) -> tuple[float, float]:
    """(of one worker, of the machine): by this run's own rates where it has some, each of one of its workers; else by
    a matrix product, measured on all cores, and the questions' length.
    """
    seconds: Counter[str] = Counter()
    answered: Counter[str] = Counter()
    for setting in plan.settings:
        for suite in plan.suites:
            result = store.evaluation(setting.name, suite.name).result()
            if result and result["status"] == "complete" and result["asked_now"]:
                seconds[suite.name] += result["seconds"]
                answered[suite.name] += result["asked_now"]
    speed = None
    own = machine = 0.0
    for names in missing.values():
        for suite in plan.suites:
            if suite.name not in names:
                continue
            if answered[suite.name]:
                own += seconds[suite.name] / answered[suite.name] * len(suite.examples)
                continue
            speed = speed or speed_of(plan, plan.dtype)
            tokens = sum(map(suite.suite.length, suite.examples)) / CHARACTERS_PER_TOKEN
            machine += _OVERHEAD * tokens * 2 * parameters / speed
    for setting in plan.settings:
        if setting.name not in missing:
            continue
        machine += 2 * parameters * 4 / 1e9  # to read and write weights
        if setting.name in plan.calibrated:
            speed = speed or speed_of(plan, plan.dtype)
            spec = setting.calibration or plan.config.calibration
            machine += 2 * spec.samples * spec.sequence_length * 2 * parameters / speed  # a block runs before and after
    return own, machine
