"""The training loop: one function that reads from top to bottom. accelerate does devices, processes and precision.

A run that was stopped goes on from its last state and ends with the weights of an undisturbed one (float32, same seed):
batches are functions of seed and step, random numbers are part of the state.
"""

import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch import Tensor

from kick import heap
from kick.compressor import Progress
from kick.errors import ConfigError, KickError
from kick.progress import duration

from . import parallel, state
from .history import History
from .objective import Objective
from .spec import Training
from .text import Batch


class TrainingError(KickError):
    """Training that cannot go on."""


class Batches(Protocol):
    """Where batches come from."""

    def batch(self, step: int, size: int) -> Batch: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@heap.kept()
def train(
    objective: Objective,
    batches: Batches,
    spec: Training,
    folder: Path,
    *,
    seed: int,
    device: str,
    progress: Progress,
    what: str,
    more_follows: bool = False,
) -> History:
    """Train `objective` for the steps of `spec`, or those that `folder` does not hold yet.

    `folder` keeps history.jsonl and the last state; the very last step's only where `more_follows`, since otherwise the
    result is about to be written. Raises TrainingError for a loss that is not finite.
    """
    AcceleratorState._reset_state()  # an earlier stretch may have had another precision
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    accelerator = Accelerator(
        mixed_precision="bf16" if spec.bfloat16(device) else "no",
        cpu=device.partition(":")[0] == "cpu",
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False)
        ],  # each process comes to the same masks
    )
    world, rank = accelerator.num_processes, accelerator.process_index
    if spec.batch_size % world:
        raise ConfigError(
            f"batch_size {spec.batch_size} cannot be shared among {world} processes.", "Give a multiple of them."
        )
    share = spec.batch_size // world
    micro = min(spec.micro_batch or share, share)
    own = range(rank * share, (rank + 1) * share, micro)
    set_seed(seed + rank)
    objective.train()
    if spec.gradient_checkpointing:
        recompute_blocks(objective.model, True)
    sharded = spec.sharding == "fsdp" and world > 1
    model: Any = objective
    if sharded:
        parallel.shard(objective)
    else:
        model = accelerator.prepare(objective)
    optimizer = objective.optimizer(spec)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, spec.rate)

    folder.mkdir(parents=True, exist_ok=True)
    begin, rest = state.load(folder, objective, optimizer)
    if begin:
        batches.load_state_dict(rest["batches"])
        schedule.load_state_dict(rest["schedule"])
    history = History(folder, begin) if rank == 0 else None
    for step in range(begin, spec.steps):
        started = time.perf_counter()
        batch = batches.batch(step, spec.batch_size)
        total = batch.counted
        objective.begin_step(step, spec)
        sums: dict[str, Tensor] = {}
        for start in own:
            part = batch[start : min(start + micro, (rank + 1) * share)]
            weight = part.counted / total  # so that every prediction of the step counts the same
            # copies exchange gradients once a step; parts each time, since they hold no more than their own
            more = start != own[-1] and not sharded
            with accelerator.no_sync(model) if more else nullcontext():
                with accelerator.autocast():
                    losses = model(part.tokens.to(accelerator.device), part.labels.to(accelerator.device))
                (losses["loss"] * weight * world).backward()  # processes average their gradients
            for name, value in losses.items():
                sums[name] = sums.get(name, torch.zeros((), device=accelerator.device)) + value.detach() * weight
        if sharded:
            for parameter in objective.unshared():
                parameter.grad = accelerator.reduce(parameter.grad, "mean")
        means = {name: float(accelerator.reduce(value)) for name, value in sums.items()}
        norm = parallel.as_number(torch.nn.utils.clip_grad_norm_(objective.clipped(), spec.clip))
        broken = _not_finite({**means, "gradient norm": norm})
        if broken is not None:
            state.discard(folder, step)  # the weights at the beginning of this step are at fault
            raise _stopped(broken, step, batch, folder)
        if step == begin or step % spec.checkpoint_every == 0:
            state.prove(folder)
        optimizer.step()
        optimizer.zero_grad()
        rate = schedule.get_last_lr()[0]
        schedule.step()
        row = {"step": step, **means, "gradient_norm": norm, "learning_rate": rate, "tokens": sum(batch.lengths)}
        with accelerator.autocast():
            told = objective.end_step(step, spec)
        if (broken := _not_finite(_numbers(told))) is not None:
            raise _stopped(broken, step, batch, folder)
        row |= told
        row["seconds"] = time.perf_counter() - started
        if history is not None:
            history.add(row)
            left = (spec.steps - step - 1) * sum(r["seconds"] for r in history.rows[-20:]) / len(history.rows[-20:])
            speed = row["tokens"] / row["seconds"]
            detail = f"loss {means['loss']:.3f}, {speed:,.0f} tokens/s, {duration(left)} to train"
            progress(step + 1, spec.steps, what, detail)
        if (step + 1) % spec.checkpoint_every == 0 or (more_follows and step + 1 == spec.steps):
            rest = {"batches": batches.state_dict(), "schedule": schedule.state_dict()}
            state.save(folder, step + 1, objective, optimizer, rest)
    state.prove(folder)  # no step follows that could
    accelerator.wait_for_everyone()
    if sharded:
        parallel.unshard(objective)
    if spec.gradient_checkpointing:
        recompute_blocks(objective.model, False)
    objective.eval()
    accelerator.free_memory()
    return history or History(folder)


def recompute_blocks(model: Any, on: bool) -> None:
    """Whether the backward pass computes blocks again instead of keeping what they computed."""
    verb = "enable" if on else "disable"
    switch = getattr(model, f"activation_checkpointing_{verb}", None)  # its name from transformers 5.20 on
    switch = switch or getattr(model, f"gradient_checkpointing_{verb}")
    switch(*([{"use_reentrant": False}] if on else []))


def _numbers(told: dict[str, Any]) -> dict[str, float]:
    """The numbers in what a step tells, those of domains by name."""
    found: dict[str, float] = {}
    for name, value in told.items():
        if isinstance(value, dict):
            found |= {f"{name} of {inner}": number for inner, number in _numbers(value).items()}
        elif isinstance(value, int | float):
            found[name] = float(value)
    return found


def _not_finite(values: dict[str, float]) -> str | None:
    """The name of the first that is no finite number."""
    return next((name for name, value in values.items() if not math.isfinite(value)), None)


def _stopped(broken: str, step: int, batch: Batch, folder: Path) -> TrainingError:
    found = state.states(folder)
    last = f"The last good state is {found[-1]}." if found else "No state was saved before."
    return TrainingError(
        f"step {step}: {broken} is not finite. The batch was {', '.join(batch.origin)}.",
        f"{last} A smaller learning rate, float32 or cleaner text may help.",
    )
