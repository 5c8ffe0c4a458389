"""Several processes on one model, as torchrun starts them: all compute, the first one writes and speaks."""

import os


def rank() -> int:
    """Which of the processes this is, from 0."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def begun() -> bool:
    """Whether they can talk to each other yet."""
    import torch.distributed as dist

    return world() > 1 and dist.is_initialized()


def begin(device: str) -> None:
    """Let them talk, where there are several."""
    import torch.distributed as dist

    if world() > 1 and not dist.is_initialized():
        if device.startswith("cuda"):
            import torch

            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")


def end() -> None:
    import torch.distributed as dist

    if begun():
        dist.destroy_process_group()


def is_main() -> bool:
    """Whether this process is the first, or the only one."""
    return rank() == 0


def own_device(device: str) -> str:
    """`cuda` becomes the GPU that goes with this process."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def wait() -> None:
    """Go on when all processes have come here."""
    if begun():
        import torch.distributed as dist

        dist.barrier()
