"""What a plan would cost, before it is carried out: questions, time and disk, from rates measured here."""

from pathlib import Path
from typing import Any

from kick.meter import product_speed
from kick.progress import duration
from kick.sweep.plan import Plan
from kick.sweep.run import missing_evaluations
from kick.sweep.store import RUN, Store, check_usable

_CHARACTERS_PER_TOKEN = 4.0
_OVERHEAD = 3.0
"""Measured wall seconds over matrix products at full speed alone, on the packaged model: attention, generation token by
token, loading, and the few-shot examples in front of a question."""


def describe(plan: Plan, out: Path, fresh: bool = False) -> tuple[str, dict[str, Any]]:
    """The plan in words and as a document. Nothing is written; what the run would refuse is refused here."""
    check_usable(out, plan, fresh)
    store = Store(out)
    missing = {s.name: plan.suites for s in plan.settings} if fresh else missing_evaluations(plan, store)
    parameters = _parameters(plan.path)
    seconds = _seconds(plan, store, {name: [s.name for s in suites] for name, suites in missing.items()}, parameters)
    width = {"float32": 4, "bfloat16": 2, "float16": 2}[plan.dtype]
    kept = len(plan.settings) if plan.config.keep_checkpoints else min(2, len(missing))
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
        "estimated_seconds": round(seconds),
        "estimated_disk_bytes": kept * parameters * width + len(missing) * questions * 3000,
    }
    todo = sum(map(len, missing.values()))
    lines = [
        f"{plan.source.name} in {plan.dtype} on {plan.device}, into {out}",
        f"{len(plan.settings)} settings: {', '.join(document['settings'])}",
        "suites: " + ", ".join(f"{name} ({count} questions)" for name, count in document["suites"].items()),
        f"{document['evaluations']} evaluations, {document['evaluations'] - todo} already there, {todo} to do",
        f"about {duration(seconds)} and {document['estimated_disk_bytes'] / 1e9:.1f} GB of disk at the peak",
    ]
    return "\n".join(lines), document


def _seconds(plan: Plan, store: Store, missing: dict[str, list[str]], parameters: int) -> float:
    """From this run's own rates where it has some, else from a measured matrix product and the questions' length."""
    rates = {}
    for setting in plan.settings:
        for suite in plan.suites:
            result = store.evaluation(setting.name, suite.name).result()
            if result and result["status"] == "complete" and result["asked_now"]:
                rates[suite.name] = result["seconds"] / result["asked_now"]
    speed = None
    total = 0.0
    for names in missing.values():
        for suite in plan.suites:
            if suite.name not in names:
                continue
            if suite.name in rates:
                total += rates[suite.name] * len(suite.examples)
                continue
            speed = speed or product_speed(plan.device, plan.dtype)
            tokens = sum(map(suite.suite.length, suite.examples)) / _CHARACTERS_PER_TOKEN
            total += _OVERHEAD * tokens * 2 * parameters / speed
    calibrated = 2 * plan.config.calibration.samples * plan.config.calibration.sequence_length
    if missing:
        speed = speed or product_speed(plan.device, plan.dtype)
        total += len(missing) * (calibrated * 2 * parameters / speed + 2 * parameters * 4 / 1e9)
    return total


def _parameters(path: Path) -> int:
    """Counted from the headers of the weight files: no weight is read."""
    if path.is_file():
        from gguf import GGUFReader

        return sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)
    from safetensors import safe_open

    total = 0
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a dict)
                count = 1
                for size in tensors.get_slice(key).get_shape():
                    count *= size
                total += count
    return total
