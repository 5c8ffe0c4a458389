"""What a stage cost, on a CPU and, as far as that can be seen without one, on a GPU."""

import numpy as np
import torch

from kick.meter import Meter


def test_the_peak_is_that_of_the_stage():
    with Meter() as before:
        pass
    with Meter() as large:
        held = np.ones(50_000_000)  # 400 MB
    del held
    with Meter() as after:
        pass
    assert large.peak_bytes - before.peak_bytes > 300e6
    assert large.peak_bytes - after.peak_bytes > 300e6
    assert large.seconds > 0


def test_a_gpu_is_woken_before_it_is_asked_for_its_memory(monkeypatch):
    """torch knows no statistics of 'cuda:0' in a process that has not used it yet."""
    calls = []
    monkeypatch.setattr(torch.cuda, "init", lambda: calls.append("init"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append(f"reset {device}"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    with Meter("cuda:0") as meter:
        pass
    assert (calls, meter.peak_bytes) == (["init", "reset cuda:0"], 7)
