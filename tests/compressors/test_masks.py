import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kick_compressors.masks import keep_largest

from kick.errors import KickError, LevelError
from kick.levels import Bits, Pattern, Sparsity

HALF = Sparsity(fraction=0.5)
TWO_FOUR = Pattern(keep=2, of=4)


def test_two_four_keeps_the_two_largest_of_each_four():
    score = torch.tensor([[4.0, 1.0, 3.0, 2.0, 0.0, 0.0, 5.0, 0.0]])
    # the tie of three zeros is broken by position: the first stays
    assert keep_largest(score, TWO_FOUR, dim="row").tolist() == [[True, False, True, False, True, False, True, False]]


def test_one_two_keeps_one_of_each_two():
    score = torch.tensor([[1.0, 2.0, 3.0, 3.0]])
    assert keep_largest(score, Pattern(keep=1, of=2), dim="row").tolist() == [[False, True, True, False]]


def test_rows_are_compared_within_themselves_and_matrices_as_a_whole():
    score = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    assert keep_largest(score, HALF, dim="row").tolist() == [[False, False, True, True]] * 2
    assert keep_largest(score, HALF, dim="matrix").tolist() == [[False] * 4, [True] * 4]


def test_ties_are_broken_by_position():
    mask = keep_largest(torch.ones(2, 5), Sparsity(fraction=0.4), dim="row")
    assert mask.tolist() == [[True, True, True, False, False]] * 2
    whole = keep_largest(torch.ones(2, 3), HALF, dim="matrix")
    assert whole.tolist() == [[True, True, True], [False, False, False]]


def by_sorting(row, remove):
    """The slow, obvious way: sort by score, earlier first among equals, and drop the last."""
    order = sorted(range(len(row)), key=lambda place: (-row[place], place))
    kept = set(order[: len(row) - remove])
    return [place in kept for place in range(len(row))]


small_ints = st.lists(st.lists(st.integers(0, 4), min_size=12, max_size=12), min_size=1, max_size=5)


@given(small_ints, st.floats(0.01, 0.99))
@settings(max_examples=200)
def test_any_sparsity_is_exact_and_agrees_with_sorting(rows, fraction):
    score = torch.tensor(rows, dtype=torch.float32)
    level = Sparsity(fraction=fraction)
    assert keep_largest(score, level, dim="row").tolist() == [by_sorting(row, round(fraction * 12)) for row in rows]
    flat = [value for row in rows for value in row]
    whole = keep_largest(score, level, dim="matrix")
    assert whole.flatten().tolist() == by_sorting(flat, round(fraction * len(flat)))


@given(small_ints, st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 6), (5, 12)]))
@settings(max_examples=200)
def test_any_pattern_is_exact_and_agrees_with_sorting(rows, pattern):
    keep, of = pattern
    mask = keep_largest(torch.tensor(rows, dtype=torch.float32), Pattern(keep=keep, of=of), dim="row").tolist()
    for row, kept in zip(rows, mask, strict=True):
        for start in range(0, 12, of):
            assert kept[start : start + of] == by_sorting(row[start : start + of], of - keep)


def test_errors():
    with pytest.raises(LevelError, match="4 does not divide"):
        keep_largest(torch.ones(1, 6), TWO_FOUR, dim="row")
    with pytest.raises(LevelError):
        keep_largest(torch.ones(1, 6), Bits(width=4), dim="row")
    with pytest.raises(KickError, match="not a number"):
        keep_largest(torch.tensor([[1.0, float("nan")]]), HALF, dim="row")
