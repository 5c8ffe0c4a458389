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
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_bytes"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def product_speed(device: str, dtype: str) -> float:
    """Operations per second of [512, 1024] x [1024, 1024] products."""
    import torch

    a = torch.randn(512, 1024, device=device, dtype=getattr(torch, dtype))
    b = torch.randn(1024, 1024, device=device, dtype=getattr(torch, dtype))
    (a @ b).sum().item()
    start = time.perf_counter()
    rounds = 0
    while time.perf_counter() - start < 0.2:
        (a @ b).sum().item()
        rounds += 1
    return rounds * 2 * 512 * 1024 * 1024 / (time.perf_counter() - start)


def slow_precision(device: str, dtype: str) -> str | None:
    """In words, if products in half precision are slower here than in float32: CPUs without units for it; else None."""
    if not device.startswith("cpu") or dtype == "float32":
        return None
    ratio = product_speed(device, "float32") / product_speed(device, dtype)
    return (
        f"products in {dtype} are {ratio:.0f} times slower than in float32 here: dtype: float32" if ratio > 2 else None
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
