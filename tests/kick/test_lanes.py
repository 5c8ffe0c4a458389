"""Pieces of work side by side on a CPU: the same results in order, and threads as they were."""

import threading

import pytest
import torch

from kick.lm import lanes

CPU = torch.device("cpu")


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("four_threads")
def test_pieces_run_at_the_same_time_with_a_share_of_the_cores_each():
    together = threading.Barrier(2, timeout=60)  # one after the other would wait for ever
    seen = []

    def work(piece):
        together.wait()
        seen.append((torch.get_num_threads(), torch.is_inference_mode_enabled()))
        return piece * 10

    with torch.inference_mode():
        assert lanes.side_by_side(CPU, work, [1, 2]) == [10, 20]
    assert seen == [(2, True), (2, True)]
    assert torch.get_num_threads() == 4
    threads = []
    late = threading.Thread(target=lambda: threads.append(torch.get_num_threads()))
    late.start()
    late.join()
    assert threads == [4]  # nor are threads that come later left with a lane's share


@pytest.mark.usefixtures("four_threads")
def test_order_is_kept_and_the_first_error_is_raised():
    assert lanes.lanes(CPU) == 4
    assert lanes.side_by_side(CPU, lambda piece: -piece, range(9)) == [-piece for piece in range(9)]

    def work(piece):
        if piece == 3:
            raise ZeroDivisionError
        return piece

    with pytest.raises(ZeroDivisionError):
        lanes.side_by_side(CPU, work, range(9))
    assert torch.get_num_threads() == 4


def test_a_gpu_gets_one_piece_after_the_other():
    own = threading.get_ident()
    assert lanes.lanes(torch.device("cuda")) == 1
    assert lanes.side_by_side(torch.device("cuda"), lambda _: threading.get_ident(), range(3)) == [own] * 3
