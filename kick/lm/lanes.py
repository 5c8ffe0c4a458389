"""Independent pieces of work side by side on a CPU, each with a share of the cores.

A product of a thousand rows keeps one core busier than it keeps two: between products every thread waits for the last
one, and what is no product (norms, masks, allocation, Python) uses one. Pieces in threads of their own fill these gaps.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

MOST_LANES = 4
"""Each lane holds what computing its piece takes in memory."""

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def lanes(device: torch.device) -> int:
    """How many pieces are worked on at a time: threads of this process share no more than a CPU's cores."""
    return min(MOST_LANES, torch.get_num_threads()) if device.type == "cpu" else 1


def side_by_side(device: torch.device, work: Callable[[Piece], Result], pieces: Sequence[Piece]) -> list[Result]:
    """`work` of each piece, in order. The first error is raised once all lanes have stopped."""
    count = min(lanes(device), len(pieces))
    if count < 2:
        return [work(piece) for piece in pieces]
    threads = torch.get_num_threads()
    inference = torch.is_inference_mode_enabled()  # like the number of threads, of a thread

    def one(piece: Piece) -> Result:
        with torch.inference_mode(inference):
            return work(piece)

    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(threads // count,)) as pool:
            return list(pool.map(one, pieces))
    finally:
        torch.set_num_threads(threads)  # what is set last is also what threads yet to come begin with
