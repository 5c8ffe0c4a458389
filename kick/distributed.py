"""Several processes on one model, as torchrun starts them: all compute, the first one writes and speaks."""

import os


def rank() -> int:
    """Which of the processes this is, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process is the first, or the only one."""
    return rank() == 0


def own_device(device: str) -> str:
    """`cuda` becomes the GPU that goes with this process."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def wait() -> None:
    """Go on when all processes have come here."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.barrier()
