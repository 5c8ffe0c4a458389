"""How many tokens a model can be given at once: from the memory of the machine or GPU that it stands on."""

import gc
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from kick.cgroup import grants
from kick.lm.lanes import lane_count

CACHE_SHARE = 0.15
"""What keys and values of a generation batch may take, or those of kept prefixes.

This share and the two below are of what the weights leave of all memory, not of what happens to be free: rows and
batches of another size round differently, and the same run is to give the same scores.
"""

ROW_SHARE = 0.1
"""What computing the rows that are worked on at a time may take."""

PREFIX_SHARE = 0.3
"""What keys and values of the rows at work may take, copies of a prefix among them."""

MOST_ROW_TOKENS = {"cpu": 1024, "cuda": 4096}
"""Longer rows are no faster: products of this many rows keep a CPU's or a GPU's units busy."""

FEWEST_ROW_TOKENS = 16

_LIVE_HIDDEN, _LIVE_INTERMEDIATE = 8, 3  # vectors of a token that stand in memory at once inside a block


def row_tokens(model: Any) -> int:
    """Tokens of a row that `model` computes at once: a power of two that memory allows."""
    config, device = model.config.get_text_config(), model.device
    hidden = config.hidden_size
    values = _LIVE_HIDDEN * hidden + _LIVE_INTERMEDIATE * _intermediate(config)
    fits = ROW_SHARE * bytes_beside(model) / (lane_count(device) * values * model.dtype.itemsize)
    tokens = MOST_ROW_TOKENS.get(device.type, MOST_ROW_TOKENS["cpu"])
    while tokens > FEWEST_ROW_TOKENS and tokens > fits:
        tokens //= 2
    return tokens


def _intermediate(config: Any) -> int:
    """Width of an MLP: the widest layer's, and with experts that of those which a token passes."""
    size = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    widest = max(size) if isinstance(size, (list, tuple)) else size
    experts = getattr(config, "num_experts_per_tok", None) or 0
    return max(widest, experts * (getattr(config, "moe_intermediate_size", None) or 0))


SHARED_BY = "KICK_WORKERS_HERE"
"""Environment variable of a process that shares the machine's memory with others like it: how many they are."""


def bytes_beside(model: Any) -> int:
    """What the weights of `model` leave of the memory where it stands; on a CPU of this process's part of it."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    sharing = int(os.environ.get(SHARED_BY, 1)) if model.device.type == "cpu" else 1
    return max(0, total_bytes(model.device) // sharing - weights)


def lanes_beside(model: Any, held_bytes: int) -> int:
    """How many rows are worked on at a time, where each holds so much: its own copy of a prefix, and what it grows."""
    lanes = lane_count(model.device)
    if held_bytes == 0 or lanes == 1:
        return lanes
    return max(1, min(lanes, int(PREFIX_SHARE * bytes_beside(model) / held_bytes)))


def key_value_bytes(model: Any) -> int:
    """Of one token, by the configuration."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * groups * size * model.dtype.itemsize


_SAID = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: Exception) -> bool:
    """CPUs, CUDA itself and its libraries each have words of their own for it."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(said in str(error) for said in _SAID)


Result = TypeVar("Result")


def none_if_out_of_memory(work: Callable[[], Result]) -> Result | None:
    """What `work` gives; None where memory ran out. Other errors are raised."""
    try:
        return work()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    return None


def most_cached_tokens(model: Any, bytes_per_token: int) -> int:
    """How many tokens' keys and values a generation batch may hold, or the kept prefixes together."""
    return int(CACHE_SHARE * bytes_beside(model) / bytes_per_token)


def free_unreferenced(device: str) -> None:
    """Free the memory of models that are no longer referenced, so that other processes can use it."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def total_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([installed, *(grant.limit for grant in grants())])


def free_bytes(device: torch.device) -> int:
    """What is not in use now; on a CPU what the system calls available, page cache included."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return max(0, min([_available(), *(grant.limit - grant.used for grant in grants())]))


def _available() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return total_bytes(torch.device("cpu")) // 2
