import math

import numpy as np
import pytest

from kick import compare
from kick.suite import Metric, Score

ACCURACY = Metric("accuracy", value="correct", chance=0.25)
PERPLEXITY = Metric("perplexity", value="nll", per="tokens", transform="exp", higher_is_better=False)


def score(metric, values, per=None, ids=None):
    values = np.array(values, dtype=float)
    per = np.ones_like(values) if per is None else np.array(per, dtype=float)
    return Score(metric, "overall", tuple(ids or map(str, range(len(values)))), values, per)


def test_an_accuracy_beside_dense_by_hand():
    dense = score(ACCURACY, [1] * 8 + [0] * 2)
    other = score(ACCURACY, [1] * 5 + [0] * 4 + [1])
    found = compare.compare(dense, other, signal=True)
    assert (found.lost, found.won, found.flips) == (3, 1, 4)
    assert found.dense == pytest.approx(0.8)
    assert found.retained == pytest.approx(0.6 / 0.8)
    assert found.p_value == pytest.approx(2 * (1 + 4) / 2**4)  # McNemar: 2 * (C(4,0) + C(4,1)) / 16
    assert found.interval.low < found.retained < found.interval.high


def test_only_questions_that_both_answered_are_compared():
    dense = score(ACCURACY, [1, 1, 0], ids=["a", "b", "c"])
    other = score(ACCURACY, [0, 1], ids=["c", "b"])
    found = compare.compare(dense, other, signal=True)
    assert found.n == 2
    assert (found.lost, found.won) == (0, 0)
    assert compare.compare(dense, score(ACCURACY, [1], ids=["z"]), signal=True).n == 0


def test_lower_is_better_retains_dense_over_other():
    dense = score(PERPLEXITY, [10.0, 20.0], [10, 10])  # exp(30 / 20)
    other = score(PERPLEXITY, [12.0, 22.0], [10, 10])  # exp(34 / 20)
    assert dense.point == pytest.approx(math.exp(1.5))
    found = compare.compare(dense, other, signal=True)
    assert found.retained == pytest.approx(math.exp(1.5) / math.exp(1.7))
    assert found.flips is None


def test_an_estimate_knows_whether_it_is_above_chance():
    assert compare.estimate(score(ACCURACY, [1] * 60 + [0] * 40)).signal
    assert not compare.estimate(score(ACCURACY, [1] * 30 + [0] * 70)).signal
    assert not compare.estimate(score(ACCURACY, [])).signal


def test_graded_scores_are_bootstrapped_within_their_bounds():
    f1 = Metric("f1", value="f1")
    values = np.random.default_rng(0).random(50)
    found = compare.estimate(score(f1, values))
    half = 1.96 * values.std() / np.sqrt(50)
    assert found.interval.low == pytest.approx(values.mean() - half, abs=0.015)
    assert found.interval.high == pytest.approx(values.mean() + half, abs=0.015)


def test_pairing_makes_the_interval_narrow():
    rng = np.random.default_rng(0)
    levels = rng.normal(3, 1, 40)  # texts differ much; the model is 2 % worse on each
    dense, other = score(PERPLEXITY, levels, np.ones(40)), score(PERPLEXITY, levels + 0.02, np.ones(40))
    found = compare.compare(dense, other, signal=True)
    assert found.retained == pytest.approx(math.exp(-0.02))
    assert found.interval.high - found.interval.low < 0.001
    assert found.verdict == "matching"


def test_sums_over_conversations_are_no_answers():
    """Four conversations of four turns, one right in each of three of them, by a suite without a divisor."""
    values = np.array([1.0, 0, 0, 0] * 3 + [0.0] * 4)
    ids = tuple(f"{talk}{turn}" for talk in "abcd" for turn in range(4))
    rated = Score(ACCURACY, "overall", ids, values, np.ones(16), clusters=tuple(id[0] for id in ids))
    found = compare.estimate(rated)
    assert found.score == pytest.approx(3 / 16)
    assert found.interval.low < 3 / 16 < found.interval.high
    assert found.interval.high <= 0.25 + 1e-9  # a conversation has a quarter at most: Wilson's of 3 in 16 reaches .43
    assert compare.compare(rated, rated, signal=True).flips is None


RATING = Metric("rating", value="ratings", per="rated", bounds=(1.0, 10.0))


def conversations(*ratings):
    """Of two turns each."""
    ids = [f"{number}-{turn}" for number in range(len(ratings)) for turn in (1, 2)]
    values = np.repeat(np.array(ratings, dtype=float), 2)
    clusters = tuple(id.partition("-")[0] for id in ids)
    return Score(RATING, "overall", tuple(ids), values, np.ones_like(values), clusters=clusters)


def test_a_few_unanimous_ratings_claim_no_certainty():
    alike = conversations(5, 5, 5, 5, 5)
    assert compare.compare(alike, alike, signal=True).verdict == "undecided"
    many = conversations(*[5, 7, 6, 8] * 500)
    assert compare.compare(many, many, signal=True).verdict == "matching"


def test_ratings_that_rarely_collapse_are_not_taken_for_matching():
    """One conversation in fourteen falls from 8 or 9 to 1: .94 of the score is left, which does not match."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(100):
        before = rng.choice([8.0, 9.0], 24)
        after = np.where(rng.random(24) < 0.07, 1.0, before)
        found = compare.compare(conversations(*before), conversations(*after), signal=True)
        wrong += found.verdict == "matching"
    assert wrong <= 9  # nominal 2.5; four standard errors are 6.2


def test_a_verdict_does_not_rest_on_the_survivors():
    dense = score(ACCURACY, [1, 0] * 500)
    most = score(ACCURACY, [1, 0] * 480, ids=map(str, range(960)))
    few = score(ACCURACY, [1, 0] * 200, ids=map(str, range(400)))
    assert compare.compare(dense, most, signal=True).verdict == "matching"
    found = compare.compare(dense, few, signal=True)
    assert (found.verdict, found.n_to_decide, found.n) == ("undecided", None, 400)


def test_the_worst_may_be_said_though_answers_are_missing():
    """Of a thousand a hundred are missing: were all of them right, it still would not match."""
    dense = score(ACCURACY, [1] * 600 + [0] * 400)
    broken = score(ACCURACY, [1] * 90 + [0] * 810, ids=map(str, range(900)))
    found = compare.compare(dense, broken, signal=True)
    assert (found.verdict, found.whole) == ("not matching", False)


def test_what_is_missing_may_not_turn_a_match():
    """Of a thousand right answers 11 are wrong and 49 missing: 98.8 % of those there, 94 % if all are wrong."""
    dense = score(ACCURACY, [1] * 1000)
    other = score(ACCURACY, [1] * 940 + [0] * 11, ids=map(str, range(951)))
    found = compare.compare(dense, other, signal=True)
    assert found.interval.low > 0.95
    assert (found.verdict, found.whole, found.n_to_decide) == ("undecided", True, None)
    more = score(ACCURACY, [1] * 1000 + [0] * 100)  # it also answered a hundred that dense did not
    assert compare.compare(dense, more, signal=True).verdict == "matching"
    fewer = score(ACCURACY, [1] * 960 + [0] * 11, ids=map(str, range(971)))  # 96 % if all 29 are wrong
    assert compare.compare(dense, fewer, signal=True).verdict == "matching"


def test_conversations_right_or_wrong_have_corners_of_their_size():
    def turns(*right):
        ids = tuple(f"{number}-{turn}" for number in range(len(right)) for turn in (1, 2))
        clusters = tuple(id.partition("-")[0] for id in ids)
        value = np.array([own for pair in right for own in pair], dtype=float)
        return Score(Metric("accuracy", value="correct"), "overall", ids, value, np.ones(len(ids)), clusters=clusters)

    for pairs in ([(1, 1), *[(0, 0), (1, 0)] * 4, (0, 1)], [(0, 0), (1, 0)] * 5):
        found = compare.compare(turns(*pairs), turns(*pairs), signal=True)
        assert found.verdict == "undecided"
        assert found.interval.low < 0.8
        assert found.interval.high > 1.2


def test_a_metric_comes_back_from_json():
    import json
    from dataclasses import asdict

    again = Metric(**json.loads(json.dumps(asdict(RATING))))
    assert again == RATING
    assert hash(again) == hash(RATING)
