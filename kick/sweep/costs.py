"""What the settings of a plan that train would take, and what one worker needs for any of them."""

from kick.compressor import Compressor, Cost
from kick.devices import is_usable
from kick.loading import load_skeleton
from kick.meter import product_speed, slow_precision
from kick.sweep import sizes
from kick.sweep.executors import find_executor
from kick.sweep.plan import MODELS_AT_ONCE, WORKER_BYTES, Plan

A100 = 312e12  # operations a second in bfloat16
TRAINING_SHARE = 0.35  # of the speed of plain products that training reaches


def training_costs(plan: Plan) -> dict[str, Cost]:
    """By the names of the settings; stages that train one after the other add up, but for their memory."""
    found: dict[str, Cost] = {}
    skeleton = None
    for name, steps in plan.steps.items():
        for step in steps:
            if type(step.compressor).cost is Compressor.cost:
                continue
            skeleton = skeleton or load_skeleton(plan.path, "float32")
            cost = step.compressor.cost(step.level, skeleton)
            if cost is not None:
                before = found.get(name, Cost(0, 0.0, 0))
                found[name] = Cost(
                    before.tokens + cost.tokens,
                    before.operations + cost.operations,
                    max(before.memory_bytes, cost.memory_bytes),
                )
    return found


def training_seconds(plan: Plan, costs: dict[str, Cost]) -> dict[str, float]:
    """What that takes here, by the names of the settings; on an A100, where the device is on other machines only."""
    if not costs:
        return {}
    speed = speed_of(plan, "float32" if plan.device == "cpu" else "bfloat16")
    return {name: cost.operations / (speed * TRAINING_SHARE) for name, cost in costs.items()}


def speed_of(plan: Plan, dtype: str) -> float:
    """Operations a second of plain products in `dtype`: measured, or an A100's."""
    return product_speed(plan.device, dtype) if is_usable(plan.device) else A100


def remarks(plan: Plan) -> list[str]:
    """What is allowed and hardly meant, in words."""
    found = [slow] if is_usable(plan.device) and (slow := slow_precision(plan.device, plan.dtype)) else []
    timed = [suite.name for suite in plan.suites if suite.suite.times_itself]
    if timed and find_executor(plan.config.executor).works_here(plan) != 1:
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
