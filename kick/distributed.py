"""Several processes on one model, as torchrun starts them: all compute, the first one writes and speaks."""

import os


def is_main() -> bool:
    """Whether this process is the first, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def wait() -> None:
    """Go on when all processes have come here."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.barrier()
