"""What a stage cost: wall seconds and peak memory, and the versions and hardware it ran with."""

import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_RECORDED = ("llm-kick", "torch", "transformers", "tokenizers", "lm-eval", "datasets", "numpy", "safetensors")


class Meter:
    """Seconds and peak memory between `__enter__` and now.

    Peak memory is the process's resident set on a CPU, and what torch allocated on CUDA. Linux lets a process start its
    peak anew; elsewhere the peak since the process began is given.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def __enter__(self) -> "Meter":
        self._start = time.perf_counter()
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.init()  # of a device with a number, the statistics are there only after that
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            _reset_peak()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.seconds = time.perf_counter() - self._start
        self.peak_bytes = self._peak()

    def _peak(self) -> int:
        if self.device.startswith("cuda"):
            import torch

            return torch.cuda.max_memory_allocated(self.device)
        import resource

        status = Path("/proc/self/status")
        if status.exists():
            for line in status.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _reset_peak() -> None:
    clear = Path("/proc/self/clear_refs")
    if os.access(clear, os.W_OK):
        clear.write_text("5")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _RECORDED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def hardware(device: str) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "machine": platform.machine(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_bytes"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.startswith("cuda") and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def computes_on(device: str) -> str:
    """The name of the GPU, or of the processor."""
    import torch

    on_gpu = device.startswith("cuda") and torch.cuda.is_available()
    return torch.cuda.get_device_name(device) if on_gpu else processor()


def product_speed(device: str, dtype: str) -> float:
    """Operations per second of products of square matrices: small ones on a CPU, large ones in a row on a GPU.

    A GPU is done with a small one before it is given the next.
    """
    import torch

    on_cpu = device.startswith("cpu")
    size, in_a_row = (1024, 1) if on_cpu else (4096, 8)
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))

    def work() -> None:
        for _ in range(in_a_row):
            product = a @ b
        product[0, 0].item()  # waits until all of it is there

    work()
    start = time.perf_counter()
    rounds = 0
    while time.perf_counter() - start < 0.2:
        work()
        rounds += 1
    return rounds * in_a_row * 2 * size**3 / (time.perf_counter() - start)


def slow_precision(device: str, dtype: str) -> str | None:
    """In words, if products in half precision are slower than in float32 here, as on many CPUs; else None."""
    if not device.startswith("cpu") or dtype == "float32":
        return None
    ratio = product_speed(device, "float32") / product_speed(device, dtype)
    if ratio < 1.2:
        return None
    return (
        f"matrix products take {ratio:.2g} times as long in {dtype} as in float32 on this CPU; dtype float32 is faster"
    )


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
