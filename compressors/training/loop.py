"""The training loop: one function that reads from top to bottom. accelerate does devices, processes and precision.

A run that was stopped goes on from its last state and ends with the weights of an undisturbed one (float32, same seed):
batches are functions of seed and step, random numbers are part of the state.
"""

import logging
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import Tensor

from kick.compressor import Progress
from kick.errors import ConfigError, KickError
from kick.files import read_json, write_json
from kick.progress import duration

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
) -> History:
    """Train `objective` for the steps of `spec`, or those that `folder` does not hold yet.

    `folder` keeps history.jsonl and the last state. Raises TrainingError for a loss that is not finite.
    """
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns of tied weights at every state
    AcceleratorState._reset_state()  # an earlier stretch may have had another precision
    accelerator = Accelerator(
        mixed_precision="bf16" if spec.bfloat16(device) else "no", cpu=device.partition(":")[0] == "cpu"
    )
    world, rank = accelerator.num_processes, accelerator.process_index
    if spec.batch_size % world:
        raise ConfigError(f"batch_size {spec.batch_size} for {world} processes.", "Give a multiple of them.")
    share = spec.batch_size // world
    micro = min(spec.micro_batch or share, share)
    set_seed(seed + rank)
    objective.train()
    if spec.gradient_checkpointing:
        recompute_blocks(objective.model, True)
    model = accelerator.prepare(objective)
    optimizer = accelerator.prepare(objective.optimizer(spec))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, spec.rate)
    accelerator.register_for_checkpointing(batches, schedule, _Run(objective))

    begin = _resume(accelerator, folder)
    history = History(folder, begin) if rank == 0 else None
    for step in range(begin, spec.steps):
        started = time.perf_counter()
        batch = batches.batch(step, spec.batch_size)
        total = batch.counted
        objective.begin_step(step, spec)
        sums: dict[str, Tensor] = {}
        own = range(rank * share, (rank + 1) * share, micro)
        for start in own:
            part = batch[start : min(start + micro, (rank + 1) * share)]
            weight = part.counted / total  # so that every prediction of the step counts the same
            with nullcontext() if start == own[-1] else accelerator.no_sync(model):
                losses = model(part.tokens.to(accelerator.device), part.labels.to(accelerator.device))
                accelerator.backward(losses["loss"] * weight * world)  # processes average their gradients
            for name, value in losses.items():
                sums[name] = sums.get(name, torch.zeros((), device=accelerator.device)) + value.detach() * weight
        means = {name: float(accelerator.reduce(value)) for name, value in sums.items()}
        norm = float(accelerator.clip_grad_norm_(objective.clipped(), spec.clip))
        _check_finite({**means, "gradient norm": norm}, step, batch, folder)
        optimizer.step()
        optimizer.zero_grad()
        rate = schedule.get_last_lr()[0]
        schedule.step()
        row = {"step": step, **means, "gradient_norm": norm, "learning_rate": rate, "tokens": batch.tokens.numel()}
        row |= objective.end_step(step, spec)
        row["seconds"] = time.perf_counter() - started
        if history is not None:
            history.add(row)
            left = (spec.steps - step - 1) * sum(r["seconds"] for r in history.rows[-20:]) / len(history.rows[-20:])
            speed = row["tokens"] / row["seconds"]
            words = f"{what}, loss {means['loss']:.3f}, {speed:,.0f} tokens/s, {duration(left)} left"
            progress(step + 1, spec.steps, words)
        if (step + 1) % spec.checkpoint_every == 0 or step + 1 == spec.steps:
            _save(accelerator, folder, step + 1)
    accelerator.wait_for_everyone()
    if spec.gradient_checkpointing:
        recompute_blocks(objective.model, False)
    objective.eval()
    accelerator.free_memory()
    return history or History(folder, spec.steps)


def recompute_blocks(model: Any, on: bool) -> None:
    """Whether the backward pass computes blocks again instead of keeping what they computed."""
    verb = "enable" if on else "disable"
    switch = getattr(model, f"activation_checkpointing_{verb}", None)  # its name from transformers 5.20 on
    switch = switch or getattr(model, f"gradient_checkpointing_{verb}")
    switch(**({"gradient_checkpointing_kwargs": {"use_reentrant": False}} if on else {}))


class _Run:
    """The part of an objective's state that is not in tensors, as accelerate wants it."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def state_dict(self) -> dict[str, Any]:
        return self.objective.state_of_run()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.objective.restore_run(state)


def _states(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("state-*") if (path / "step.json").is_file())


def _save(accelerator: Accelerator, folder: Path, step: int) -> None:
    """All that is needed to go on after `step` steps; the one before is let go once this one is whole."""
    final, partial = folder / f"state-{step:08d}", folder / f".state-{step:08d}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(partial / "step.json", step)
        earlier = _states(folder)
        partial.replace(final)
        for path in earlier:
            shutil.rmtree(path)
    accelerator.wait_for_everyone()


def _resume(accelerator: Accelerator, folder: Path) -> int:
    """Load the last whole state in `folder`; the step to go on with, 0 without one."""
    folder.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    states = _states(folder)
    if not states:
        return 0
    accelerator.load_state(str(states[-1]))
    return read_json(states[-1] / "step.json")


def _check_finite(values: dict[str, float], step: int, batch: Batch, folder: Path) -> None:
    bad = [name for name, value in values.items() if value != value or abs(value) == float("inf")]
    if bad:
        states = _states(folder)
        last = f"The last good state is {states[-1]}." if states else "No state was saved before."
        raise TrainingError(
            f"step {step}: {bad[0]} is not finite. The batch was {', '.join(batch.origin)}.",
            f"{last} A smaller learning rate, float32 or cleaner text may help.",
        )
