"""States to resume from: a folder each, whole or not there. torch's distributed checkpoints hold the tensors, so a run
may go on with another number of processes."""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from kick import distributed
from kick.files import read_json, write_json

from .objective import Objective

_LEARNED = StateDictOptions(ignore_frozen_params=True, strict=False)  # the rest is as it came
_STEP, _REST = "step.json", "rest-{rank}.pt"


def states(folder: Path) -> list[Path]:
    """Those in `folder` that are whole, the last one at the end."""
    return sorted(path for path in folder.glob("state-*") if (path / _STEP).is_file())


def save(folder: Path, step: int, objective: Objective, optimizer: torch.optim.Optimizer, rest: dict[str, Any]) -> None:
    """All that is needed to go on after `step` steps, beside the states before: `prove` lets go of them.

    rest: of each process, what is not in tensors of the objective or its optimizer.
    """
    final, partial = folder / f"state-{step:08d}", folder / f".state-{step:08d}.partial"
    if distributed.is_main():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    distributed.wait()
    model_state, optimizer_state = get_state_dict(objective, optimizer, options=_LEARNED)
    with _quietly():
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=partial)
    random = {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}
    torch.save({**rest, "random": random}, partial / _REST.format(rank=distributed.rank()))
    distributed.wait()
    if distributed.is_main():
        write_json(partial / _STEP, step)
        if final.exists():
            shutil.rmtree(final)
        partial.replace(final)
    distributed.wait()


def prove(folder: Path) -> None:
    """The last state led to a finite loss, or is the last of all: those before it are let go."""
    if distributed.is_main():
        for path in states(folder)[:-1]:
            shutil.rmtree(path)


def discard(folder: Path, step: int) -> None:
    """The state after `step` steps led to no finite loss: what it holds is broken."""
    if distributed.is_main():
        shutil.rmtree(folder / f"state-{step:08d}", ignore_errors=True)


def load(folder: Path, objective: Objective, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, Any]]:
    """Set back to the last whole state in `folder`: (the step to go on with, the rest), or (0, {}) without one."""
    found = states(folder)
    if not found:
        return 0, {}
    path = found[-1]
    model_state, optimizer_state = get_state_dict(objective, optimizer, options=_LEARNED)
    with _quietly():
        dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)
    set_state_dict(
        objective, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state, options=_LEARNED
    )
    file = path / _REST.format(rank=distributed.rank())
    rest = torch.load(file if file.is_file() else path / _REST.format(rank=0), weights_only=True)
    random = rest.pop("random")
    torch.set_rng_state(random["torch"])
    if random["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])
    return read_json(path / _STEP), rest


@contextmanager
def _quietly() -> Iterator[None]:
    """One process is no mistake, whatever torch says of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
