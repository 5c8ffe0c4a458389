"""Expected values come from scipy, from published tables, or from a line of arithmetic in the comment."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from kick import statistics
from kick.statistics import TOLERANCE, Interval, sign_flip, verdict_p

MATCHING, NOT, UNDECIDED, NO_SIGNAL = "matching", "not matching", "undecided", "no signal"


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (3, 10), (10, 10), (50, 120), (1, 1), (655, 1000)])
def test_wilson_is_scipys(successes, n):
    ours = statistics.wilson(successes, n)
    theirs = scipy.stats.binomtest(successes, n).proportion_ci(method="wilson")
    assert ours.low == pytest.approx(theirs.low, abs=1e-12)
    assert ours.high == pytest.approx(theirs.high, abs=1e-12)


def test_mcnemar_by_hand():
    # 1 lost, 9 won: 2 * (C(10,0) + C(10,1)) / 2^10 = 22 / 1024
    assert statistics.mcnemar(1, 9) == pytest.approx(22 / 1024)
    assert statistics.mcnemar(9, 1) == pytest.approx(22 / 1024)
    assert statistics.mcnemar(5, 5) == 1.0
    assert statistics.mcnemar(0, 0) == 1.0


def test_holm_by_hand():
    # sorted .005 .01 .03 .04 times 4 3 2 1 = .02 .03 .06 .04; never falling: .02 .03 .06 .06
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    adjusted = statistics.holm([0.01, float("nan"), 0.02])  # the missing one is not counted
    assert adjusted[0] == pytest.approx(0.02)
    assert np.isnan(adjusted[1])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_sign_flip_agrees_with_scipys_permutation_test():
    differences = np.random.default_rng(3).normal(0.35, 1.0, 40)
    theirs = scipy.stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(0)
    ).pvalue
    assert statistics.sign_flip(differences) == pytest.approx(theirs, abs=0.01)
    assert statistics.sign_flip(np.zeros(5)) == 1.0
    assert 0 < statistics.sign_flip(np.full(30, 1.0)) < 0.001  # never exactly 0


def test_what_no_resample_reaches_is_rarer_than_one_in_all_of_them():
    """40 losses of about the same size: every sign would have to be the same, 2 arrangements of 2^40."""
    differences = np.linspace(0.9, 1.1, 40)
    exact = 2 / 2**40
    assert exact < sign_flip(differences, resamples=1000) < 1e-7
    assert sign_flip(np.ones(5)) == pytest.approx(2 / 2**5, rel=0.1)  # many resamples are as extreme: they are counted
    assert 0 < sign_flip(np.ones(5000), resamples=100) < 1e-300
    heavy = np.array([100.0, *np.full(20, 0.01)])  # where one value decides, the bound says nothing
    assert sign_flip(heavy) == pytest.approx(1 / 10_001)


def test_the_p_value_of_a_verdict_agrees_with_the_interval():
    line = 1 - TOLERANCE
    assert verdict_p(0.5, Interval(0.3, line), 10) == pytest.approx(0.05)
    assert verdict_p(0.99, Interval(line, 1.02), 1000) == pytest.approx(0.05)
    assert verdict_p(0.5, Interval(0.4, 0.6), 1000) < 1e-10
    assert verdict_p(0.5, Interval(0.4, 0.6), 4) == pytest.approx(
        2 * scipy.stats.t.sf(4.5 * scipy.stats.t.isf(0.025, 3), 3)
    )
    assert verdict_p(0.94, Interval(0.9, 0.98), 100) > 0.5
    assert np.isnan(verdict_p(0.5, Interval(float("nan"), float("nan")), 100))
    assert np.isnan(verdict_p(1.0, Interval(1.0, 1.0), 100))  # nothing was seen to vary


def test_the_bootstrap_of_a_mean_is_scipys():
    values = np.random.default_rng(0).exponential(size=300)
    sums = statistics.resampled_sums(values[:, None])
    ours = statistics.percentile_interval(sums[:, 0] / 300, n=300)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=10_000, rng=1
    ).confidence_interval
    assert ours.low == pytest.approx(theirs.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.high, abs=0.01)


def test_resampling_distinct_rows_is_resampling_rows():
    # right-or-wrong rows go through a multinomial over four kinds; the same rows made distinct go one by one
    rows = np.random.default_rng(1).integers(0, 2, (600, 2)).astype(float)
    together = statistics.resampled_sums(rows, seed=1)
    apart = statistics.resampled_sums(rows + np.arange(600)[:, None] * 1e-9, seed=2)
    assert together.mean(axis=0) == pytest.approx(apart.mean(axis=0), rel=0.002)
    assert np.cov(together.T) == pytest.approx(np.cov(apart.T), abs=10)  # about 150 on the diagonal


def test_resampling_is_repeatable():
    rows = np.random.default_rng(1).random((50, 2))
    assert (statistics.resampled_sums(rows) == statistics.resampled_sums(rows)).all()


def test_a_t_interval_is_what_a_few_normal_values_get():
    # The mean of 8 draws: the percentile interval alone is narrower than Student's by sqrt(7/8) * 1.96 / 2.36 = 0.78
    values = np.random.default_rng(5).normal(size=8)
    low, high = scipy.stats.ttest_1samp(values, 0).confidence_interval()
    sums = statistics.resampled_sums(values[:, None])
    ours = statistics.percentile_interval(sums[:, 0] / 8, n=8)
    assert ours.high - ours.low == pytest.approx(high - low, rel=0.12)


def test_one_sample_has_no_interval():
    interval = statistics.percentile_interval(np.ones(100), n=1)
    assert np.isnan(interval.low)
    assert statistics.verdict(interval, signal=True) == UNDECIDED


def test_corners_only_for_scores_within_bounds():
    assert statistics.corners(np.array([0.0, 0.0]), np.array([0.0, 0.0])).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    graded = statistics.corners(np.array([0.1, 0.2, 0.3]), np.array([0.4, 0.5]))  # the upper quartile is 0.4
    assert graded == pytest.approx(np.array([[0.0, 0.0], [0.0, 0.4], [0.4, 0.0], [0.4, 0.4]]))
    assert statistics.corners(np.array([0.0, 7.0]), np.array([1.0, 2.0])) is None
    rare = np.array([0.0] * 9 + [0.5])  # both quartiles are 0
    assert statistics.corners(rare, rare) == pytest.approx(0.5 * statistics.CORNERS)
    alike = statistics.corners(np.full(3, 0.3), np.full(3, 0.3))
    nearly = statistics.corners(np.array([0.3, 0.3, 0.31]), np.full(3, 0.3))
    assert alike == pytest.approx(0.3 * statistics.CORNERS)
    assert nearly == pytest.approx(alike, abs=0.01)
    assert statistics.corners(np.array([3.0]), np.array([7.0]), (1.0, 10.0))[1].tolist() == [1.0, 10.0]


def test_nothing_changed_in_a_small_sample_is_not_certainty():
    right = np.array([1.0] * 6 + [0.0] * 4)
    rows = np.stack([right, right], axis=1)
    sums = statistics.resampled_sums(rows, pseudo=statistics.corners(right, right))
    with np.errstate(invalid="ignore"):
        interval = statistics.percentile_interval(sums[:, 1] / sums[:, 0], n=10)
    assert interval.low < 0.95 < interval.high
    many = np.repeat(rows, 100, axis=0)  # the same in a thousand questions is
    sums = statistics.resampled_sums(many, pseudo=statistics.corners(many[:, 0], many[:, 1]))
    assert statistics.percentile_interval(sums[:, 1] / sums[:, 0], n=1000).low > 0.95


def test_the_paired_interval_covers_the_truth():
    # 60 questions, dense right on 60 %, one in five of those lost, one in ten of the others won: retained .52 / .60
    rng = np.random.default_rng(0)
    truth = (0.6 * 0.8 + 0.4 * 0.1) / 0.6
    covered = 0
    for trial in range(300):
        dense = (rng.random(60) < 0.6).astype(float)
        other = np.where(dense == 1, rng.random(60) < 0.8, rng.random(60) < 0.1).astype(float)
        sums = statistics.resampled_sums(
            np.stack([dense, other], axis=1), 1000, seed=trial, pseudo=statistics.corners(dense, other)
        )
        interval = statistics.percentile_interval(sums[:, 1] / sums[:, 0], n=60)
        covered += interval.low <= truth <= interval.high
    assert 0.92 <= covered / 300 <= 0.985  # nominal .95; three standard errors are .038


def rouge(rng, n):
    dense = rng.beta(4, 20, n)
    return dense, np.clip(dense * rng.uniform(0.6, 1.2, n) + rng.normal(0, 0.03, n), 0, 1)


def f1(rng, n):
    """Mostly right or wrong, and a fifth of the answers changed."""
    kind, fate = rng.random((2, n))
    dense = np.where(kind < 0.55, 0, np.where(kind < 0.8, 1, rng.uniform(0.2, 0.8, n)))
    return dense, np.where(fate < 0.8, dense, np.where(fate < 0.93, 0, rng.uniform(0, 1, n)))


def collapsing(rng, n):
    """All alike, and one in fourteen lost altogether, of which a small sample may hold none."""
    dense = rng.choice([0.8, 0.9], n)
    return dense, np.where(rng.random(n) < 0.07, 0, dense)


def rare(rng, n):
    """One answer in ten is worth something, and most of these are lost."""
    worth, kept = rng.random((2, n))
    dense = np.where(worth < 0.1, rng.uniform(0.2, 1, n), 0)
    return dense, np.where(kept < 0.3, dense, 0)


@pytest.mark.parametrize(
    ("kind", "n", "widest"),
    [
        (rouge, 18, 0.45),
        (rouge, 100, 0.12),
        (f1, 18, np.inf),
        (f1, 100, 0.32),
        (rare, 60, np.inf),
        (rare, 300, 0.6),
        (collapsing, 24, 0.35),
    ],
)
def test_intervals_of_graded_scores_cover_the_truth_and_are_no_wider_than_that_takes(kind, n, widest):
    whole, compressed = kind(np.random.default_rng(7), 1_000_000)
    truth = compressed.mean() / whole.mean()
    rng, covered, widths = np.random.default_rng(0), 0, []
    for trial in range(200):
        dense, other = kind(rng, n)
        rows = np.stack([dense, other], axis=1)
        sums = statistics.resampled_sums(rows, 1000, seed=trial, pseudo=statistics.corners(dense, other))
        with np.errstate(divide="ignore", invalid="ignore"):  # a draw may hold none that dense got right
            interval = statistics.percentile_interval(sums[:, 1] / sums[:, 0], n=n)
        covered += interval.low <= truth <= interval.high
        widths.append(interval.high - interval.low)
    assert covered / 200 >= 0.91  # nominal .95; three standard errors are .046
    assert np.median(widths) < widest


def test_verdicts():
    assert statistics.verdict(Interval(0.96, 1.02), True) == MATCHING
    assert statistics.verdict(Interval(0.60, 0.94), True) == NOT
    assert statistics.verdict(Interval(0.90, 0.99), True) == UNDECIDED
    assert statistics.verdict(Interval(0.95, 1.00), True) == UNDECIDED  # the line itself is not above it
    assert statistics.verdict(Interval(0.99, 1.01), False) == NO_SIGNAL


def test_signal_is_an_interval_above_chance():
    assert statistics.has_signal(Interval(0.27, 0.40), 0.25)
    assert not statistics.has_signal(Interval(0.26, 0.40), 0.25)  # of .26 a guesser keeps 96 %: it would match
    assert not statistics.has_signal(Interval(0.22, 0.40), 0.25)
    assert statistics.has_signal(Interval(0.01, 0.10), None)
    assert not statistics.has_signal(Interval(0.0, 0.10), None)
    assert not statistics.has_signal(Interval(float("nan"), float("nan")), None)


def test_how_many_would_decide():
    # the estimate lies .02 above the line, half the interval is .04, of 1.96 standard errors of .0204: such that the
    # line is 1.96 + .84 standard errors away, these must be .00714, 2.857 times smaller, with 8.16 times n
    found = statistics.n_to_decide(100, 0.97, Interval(0.93, 1.01))
    assert found == pytest.approx(100 * (0.0204 / 0.00714) ** 2, rel=0.01)
    assert statistics.n_to_decide(100, 0.95, Interval(0.9, 1.0)) is None
    assert statistics.n_to_decide(100, float("nan"), Interval(0.9, 1.0)) is None


def test_the_frontier_stops_at_the_first_level_that_does_not_match():
    assert statistics.frontier([(0.1, MATCHING), (0.2, MATCHING), (0.3, NOT)]) == 0.2
    assert statistics.frontier([(0.3, MATCHING), (0.1, NOT), (0.2, MATCHING)]) is None  # not monotone
    assert statistics.frontier([(0.1, MATCHING), (0.2, UNDECIDED), (0.3, MATCHING)]) == 0.1
    assert statistics.frontier([(0.1, NO_SIGNAL), (0.2, MATCHING)]) == 0.2
    assert statistics.frontier([(0.1, MATCHING), (0.2, MATCHING), (0.2, NOT), (0.3, MATCHING)]) == 0.1  # two seeds
    assert statistics.frontier([]) is None


@given(st.lists(st.floats(min_value=0, max_value=1), min_size=1, max_size=20))
@settings(max_examples=50)
def test_holm_never_makes_a_p_value_smaller_and_keeps_their_order(p_values):
    adjusted = statistics.holm(p_values)
    assert all(a >= p for a, p in zip(adjusted, p_values, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()
