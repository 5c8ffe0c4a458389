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


def lane_count(device: torch.device) -> int:
    """How many pieces are worked on at a time: on a CPU up to four, each with a core or more; on a GPU one."""
    return min(MOST_LANES, torch.get_num_threads()) if device.type == "cpu" else 1


def side_by_side(work: Callable[[Piece], Result], pieces: Sequence[Piece], most: int) -> list[Result]:
    """`work` of each piece, in order, at most `most` at a time.

    Of several errors that of the earliest piece is raised, once all lanes have stopped.
    """
    count = min(most, len(pieces))
    if count < 2:
        return [work(piece) for piece in pieces]
    threads = torch.get_num_threads()
    shares = iter([threads // count + (lane < threads % count) for lane in range(count)])
    inference = torch.is_inference_mode_enabled()  # like the number of threads, of a thread

    def begin() -> None:
        torch.get_num_threads()  # a new thread takes the number that was set last, once, when it first needs one
        torch.set_num_threads(next(shares))

    def one(piece: Piece) -> Result:
        with torch.inference_mode(inference):
            return work(piece)

    try:
        with ThreadPoolExecutor(count, initializer=begin) as pool:
            return list(pool.map(one, pieces))
    finally:
        torch.set_num_threads(threads)  # what is set last is also what threads yet to come begin with
