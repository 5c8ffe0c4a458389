"""What the settings of a plan that train would take, and what one worker needs for any of them."""

from kick.compress import prepare
from kick.compressor import Compressor, Cost
from kick.devices import is_usable
from kick.loading import load_skeleton
from kick.meter import slow_precision
from kick.sweep import sizes
from kick.sweep.plan import MODELS_AT_ONCE, WORKER_BYTES, Plan


def training_costs(plan: Plan) -> dict[str, Cost]:
    """By the names of the settings; stages that train one after the other add up, but for their memory."""
    found: dict[str, Cost] = {}
    skeleton = None
    for setting in plan.made:
        for step in prepare(setting):
            if type(step.compressor).cost is Compressor.cost:
                continue
            skeleton = skeleton or load_skeleton(plan.path, "float32")
            cost = step.compressor.cost(step.level, skeleton)
            if cost is not None:
                before = found.get(setting.name, Cost(0, 0.0, 0))
                found[setting.name] = Cost(
                    before.tokens + cost.tokens,
                    before.operations + cost.operations,
                    max(before.memory_bytes, cost.memory_bytes),
                )
    return found


def remarks(plan: Plan) -> list[str]:
    """What is allowed and hardly meant, in words."""
    found = [slow] if is_usable(plan.device) and (slow := slow_precision(plan.device, plan.dtype)) else []
    for setting in plan.made:
        for step in prepare(setting):
            stages = (step.compressor.params, *vars(step.compressor.params).values())
            if any(getattr(stage, "sharding", None) == "fsdp" for stage in stages):
                found.append(
                    f"{setting.name}: sharding: fsdp shares the model among processes of torchrun (docs/train.md); a "
                    "sweep trains in one, which needs the memory of all"
                )
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
