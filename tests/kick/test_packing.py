"""Requests packed into rows: what is shared stands once, nothing is lost, rows are full or even."""

import random

import pytest
import torch
from lm_reference import attends

from kick.lm.packing import PREFIX_STEP, Packed, clusters, pack, pack_evenly, shared_prefix
from kick.lm.runner import mask_of


def test_a_trie_holds_each_shared_token_once():
    (row,) = pack([[1, 2, 3], [1, 2, 4, 5], [1, 9]], [0, 1, 2], max_tokens=100)
    assert row.tokens == [1, 2, 3, 4, 5, 9]
    assert row.depth == [0, 1, 2, 2, 3, 1]
    assert row.parent == [-1, 0, 1, 1, 3, 0]
    assert row.paths == {0: [0, 1, 2], 1: [0, 1, 3, 4], 2: [0, 5]}


def test_a_token_sees_the_prefix_its_ancestors_and_itself():
    row = Packed(tokens=[7, 8, 9], depth=[0, 1, 1], parent=[-1, 0, 0])
    mask = mask_of(row, 1, torch.float32, torch.device("cpu"))
    assert (mask == 0).int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]
    assert mask[0, 2] == torch.finfo(torch.float32).min


def test_what_a_token_sees_follows_from_where_its_descendants_end():
    rng = random.Random(0)
    for _ in range(30):
        words = [[rng.randrange(3) for _ in range(rng.randrange(1, 9))] for _ in range(rng.randrange(1, 12))]
        (row,) = pack(words, sorted(range(len(words)), key=words.__getitem__), 1000)
        mask = mask_of(row, 2, torch.float64, torch.device("cpu"))
        assert torch.equal(mask == 0, attends(row, 2))


def test_rows_are_bounded_and_lose_nothing():
    sequences = [[1, 2, 3], [1, 2, 4], [5] * 10, [6]]
    rows = pack(sequences, range(4), max_tokens=4)
    assert [list(row.paths) for row in rows] == [[0, 1], [2], [3]]
    for row in rows:
        for index, path in row.paths.items():
            assert [row.tokens[place] for place in path] == sequences[index]


def test_shared_prefixes_are_cut_to_whole_steps():
    long = list(range(3 * PREFIX_STEP))
    assert shared_prefix([[*long, 1], [*long, 2]], limit=1000) == 3 * PREFIX_STEP
    assert shared_prefix([[*long[:-1], 1], [*long[:-1], 2]], limit=1000) == 2 * PREFIX_STEP
    assert shared_prefix([[*long, 1], [*long, 2]], limit=PREFIX_STEP + 5) == PREFIX_STEP


def test_clusters_share_what_is_not_scored():
    head = list(range(PREFIX_STEP))
    sequences = [[*head, 1], [500], [*head, 2], [501]]
    fits = PREFIX_STEP + 1
    assert clusters(sequences, [PREFIX_STEP, 0, PREFIX_STEP, 0], fits) == [(PREFIX_STEP, [0, 2]), (0, [1, 3])]
    assert clusters(sequences, [PREFIX_STEP, 0, 5, 0], fits) == [(0, [0, 2, 1, 3])]  # one scores inside it
    assert clusters(sequences, [PREFIX_STEP, 0, PREFIX_STEP, 0], fits + 1) == [(0, [0, 2, 1, 3])]  # a row holds them


def test_a_row_ends_where_the_next_shares_least():
    sequences = [[1, 2, 3, 4], [1, 2, 3, 5], [6, 7, 8, 9], [6, 7, 8, 1], [6, 7, 8, 2]]
    assert [list(row.paths) for row in pack(sequences, range(5), max_tokens=6)] == [[0, 1], [2, 3, 4]]
    early = pack(sequences, range(5), max_tokens=9)
    assert [list(row.paths) for row in early] == [[0, 1, 2], [3, 4]]  # 6 7 8 twice: five of nine is not nearly full
    long = [[*range(10), 1], [*range(10), 2], [*range(20, 23)], [*range(20, 23), 1]]
    assert [list(row.paths) for row in pack(long, range(4), max_tokens=15)] == [[0, 1], [2, 3]]


def test_equal_sequences_that_are_longer_than_a_row_stand_in_one():
    """Options of one token have one context: it is read once, however long."""
    rows = pack([list(range(9))] * 4, range(4), 5)
    assert [(row.tokens, len(row.paths)) for row in rows] == [(list(range(9)), 4)]


def test_rows_side_by_side_are_even():
    sequences = [[number] * 10 for number in range(24)]

    def sizes(count, lanes):
        return [len(row.tokens) for row in pack_evenly(sequences[:count], range(count), 100, lanes)]

    assert sizes(24, lanes=2) == [60, 60, 60, 60]  # done after 120 tokens; three rows of 100, 100 and 40 after 140
    assert sizes(21, lanes=2) == [100, 100, 10]  # after 110, with what is left for the lane that is free first
    assert sizes(4, lanes=2) == [40]  # little work
    assert sizes(8, lanes=2) == [40, 40]
    assert sizes(21, lanes=1) == [70, 70, 70]


@pytest.mark.parametrize(
    ("stem", "options", "own", "most", "expected"),
    [
        (600, 16, 25, 1024, [1000]),  # two rows would read the stem twice: 800 tokens on one core, not 500 on both
        (400, 4, 10, 512, [440]),
        (40, 16, 60, 1024, [520, 520]),
    ],
)
def test_what_rows_share_is_not_read_again_in_vain(stem, options, own, most, expected):
    sequences = [[*range(stem), *([10_000 + number] * own)] for number in range(options)]
    rows = pack_evenly(sequences, range(options), most, lanes=2)
    assert [len(row.tokens) for row in rows] == expected


def test_chunks_of_a_row_hold_all_that_their_tokens_see():
    (row,) = pack([[1, 2, 3], [1, 2, 4, 5], [6, 7], [6, 8], [9]], range(5), 100)  # 1 2 3 4 5 | 6 7 8 | 9
    assert list(row.chunks(4)) == [(0, 3, []), (3, 7, [0, 1]), (7, 9, [5])]
    assert list(row.chunks(6)) == [(0, 5, []), (5, 9, [])]
    for size in range(1, 10):
        chunks = list(row.chunks(size))
        assert [place for start, end, _ in chunks for place in range(start, end)] == list(range(9))
        for start, end, before in chunks:
            assert end - start <= size
            seen = attends(row, 0)[start:end].any(dim=0).nonzero()[:, 0].tolist()
            assert seen == [*before, *range(start, end)]
