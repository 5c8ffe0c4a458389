"""What the settings of a plan that train would take, and what one worker needs for any of them."""

from kick.compressor import Cost
from kick.devices import is_usable
from kick.meter import product_speed, slow_precision
from kick.sweep import sizes
from kick.sweep.executors import find_executor
from kick.sweep.plan import MODELS_AT_ONCE, WORKER_BYTES, Plan

A100 = 312e12  # operations a second in bfloat16
TRAINING_SHARE = 0.35  # of the speed of plain products that training reaches


def training_seconds(plan: Plan, costs: dict[str, Cost], measured: bool = True) -> dict[str, float]:
    """What that takes here, by the names of the settings; on an A100, where the device is on other machines only.

    measured: False to take an A100's speed without a look.
    """
    if not costs:
        return {}
    speed = speed_of(plan, "float32" if plan.device == "cpu" else "bfloat16") if measured else A100
    return {name: cost.operations / (speed * TRAINING_SHARE) for name, cost in costs.items()}


def speed_of(plan: Plan, dtype: str) -> float:
    """Operations a second of plain products in `dtype`: measured, or an A100's."""
    return product_speed(plan.device, dtype) if is_usable(plan.device) else A100


def remarks(plan: Plan) -> list[str]:
    """What is allowed and hardly meant, in words."""
    found = [slow] if is_usable(plan.device) and (slow := slow_precision(plan.device, plan.dtype)) else []
    timed = [suite.name for suite in plan.suites if suite.suite.times_itself]
    at_once = plan.config.executor.workers
    if at_once == "auto":
        at_once = find_executor(plan.config.executor).works_here(plan) or len(plan.settings)
    if timed and min(at_once, len(plan.settings)) > 1:
        found.append(
            f"{timed[0]} is timed while other works run beside it; for seconds that can be compared give it a sweep of "
            "its own with executor.workers=1"
        )
    for name, steps in plan.steps.items():
        found += [f"{name}: {remark}" for step in steps for remark in step.compressor.remarks()]
    return list(dict.fromkeys([*found, *sizes.remarks(plan.config)]))


def checkpoint_bytes(plan: Plan, to_make: int, workers: int) -> float:
    """Disk of compressed checkpoints at the peak, where `to_make` are made by so many workers: what is kept of them
    within the budget, and what is at work.
    """
    at_work = min(max(1, workers), to_make) * plan.dense_bytes
    if not plan.config.keep_checkpoints:
        return at_work
    budget = plan.config.disk_budget_gb
    return to_make * plan.dense_bytes if budget is None else min(to_make * plan.dense_bytes, 1e9 * budget + at_work)


def worker_bytes(plan: Plan, training: dict[str, Cost]) -> float:
    """Memory of a process that does any of the plan's works."""
    most = max((cost.memory_bytes for cost in training.values()), default=0)
    return WORKER_BYTES + max(MODELS_AT_ONCE * plan.dense_bytes, most)
