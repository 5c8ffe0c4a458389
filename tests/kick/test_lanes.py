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
        assert lanes.side_by_side(work, [1, 2], most=4) == [10, 20]
    assert seen == [(2, True), (2, True)]
    assert torch.get_num_threads() == 4
    threads = []
    late = threading.Thread(target=lambda: threads.append(torch.get_num_threads()))
    late.start()
    late.join()
    assert threads == [4]  # nor are threads that come later left with a lane's share


@pytest.mark.parametrize(("threads", "pieces", "shares"), [(7, 4, [1, 2, 2, 2]), (4, 3, [1, 1, 2]), (5, 2, [2, 3])])
@pytest.mark.usefixtures("four_threads")
def test_no_core_is_idle_where_they_cannot_be_shared_evenly(threads, pieces, shares):
    torch.set_num_threads(threads)
    together = threading.Barrier(pieces, timeout=60)

    def work(_):
        together.wait()
        torch.ones(300, 300) @ torch.ones(300, 300)  # what a thread first computes settles its number
        return torch.get_num_threads()

    assert sorted(lanes.side_by_side(work, range(pieces), most=4)) == shares


@pytest.mark.usefixtures("four_threads")
def test_order_is_kept_and_the_earliest_error_is_raised():
    assert lanes.lane_count(CPU) == 4
    later = threading.Event()

    def slow_at_first(piece):
        if piece == 0:
            assert later.wait(60)
        if piece == 3:
            later.set()
        return -piece

    assert lanes.side_by_side(slow_at_first, range(4), most=4) == [0, -1, -2, -3]
    later.clear()

    def work(piece):
        if piece == 1:
            assert later.wait(60)
            raise ZeroDivisionError
        if piece == 3:
            later.set()
            raise IndexError
        return piece

    with pytest.raises(ZeroDivisionError):
        lanes.side_by_side(work, range(4), most=4)
    assert torch.get_num_threads() == 4


def test_a_gpu_gets_one_piece_after_the_other():
    own = threading.get_ident()
    assert lanes.lane_count(torch.device("cuda")) == 1
    assert lanes.side_by_side(lambda _: threading.get_ident(), range(3), most=1) == [own] * 3
