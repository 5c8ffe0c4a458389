"""The table that LLM-KICK reports for Vicuna-7B (arXiv 2310.01382) through scores, verdicts and the frontier rule."""

import numpy as np
import pytest

from kick import statistics
from kick.compare import compare, estimate
from kick.suite import Metric, Score

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5)
# (task, method): dense, then the score at each level; which levels lose at most 5 %, worked out by hand; the frontier
GOLDEN = {
    ("factoid", "magnitude"): (65.44, [61.74, 66.53, 60.84, 42.06, 13.99], "nynnn", None),  # passes only at 20 %
    ("factoid", "sparsegpt"): (65.44, [63.84, 62.44, 58.54, 55.54, 42.86], "yynnn", 0.2),
    ("factoid", "wanda"): (65.44, [63.34, 65.23, 61.24, 58.24, 44.66], "yynnn", 0.2),
    ("mmlu", "magnitude"): (0.471, [0.466, 0.455, 0.422, 0.339, 0.050], "yynnn", 0.2),
    ("mmlu", "sparsegpt"): (0.471, [0.470, 0.460, 0.437, 0.395, 0.308], "yynnn", 0.2),
    ("mmlu", "wanda"): (0.471, [0.469, 0.460, 0.455, 0.425, 0.386], "yyynn", 0.3),
    ("coherence", "magnitude"): (5.883, [6.112, 5.855, 5.567, 4.329, 1.233], "yynnn", 0.2),
    ("coherence", "sparsegpt"): (5.883, [6.033, 5.533, 6.067, 5.567, 5.067], "ynynn", 0.1),  # not monotone either
    ("coherence", "wanda"): (5.883, [6.0, 5.783, 5.933, 5.267, 5.033], "yyynn", 0.3),
    ("instructions", "magnitude"): (7.763, [7.567, 7.621, 7.201, 6.208, 3.308], "yynnn", 0.2),
    ("instructions", "sparsegpt"): (7.763, [7.645, 7.50, 7.188, 6.905, 6.206], "yynnn", 0.2),
    ("instructions", "wanda"): (7.763, [7.731, 7.546, 7.202, 7.071, 6.838], "yynnn", 0.2),
}


@pytest.mark.parametrize("key", GOLDEN, ids=" ".join)
def test_point_verdicts_and_the_frontier(key):
    dense, scores, matching, frontier = GOLDEN[key]
    found = [statistics.point_verdict(score / dense) for score in scores]
    assert found == [letter == "y" for letter in matching]
    verdicts = ["matching" if matches else "not matching" for matches in found]
    assert statistics.frontier(list(zip(LEVELS, verdicts, strict=True))) == frontier


CORRECT = Metric("contains", value="correct")


def answers(right, n, changed, rng):
    """`right` of n answers right; `changed` of the first `right` questions are wrong and as many others right."""
    value = np.zeros(n)
    value[:right] = 1
    for place in rng.choice(right, changed, replace=False):
        value[place] = 0
    for place in right + rng.choice(n - right, changed, replace=False):
        value[place] = 1
    return value


def score(value):
    return Score(CORRECT, "overall", tuple(f"q{i:05d}" for i in range(len(value))), value, np.ones(len(value)))


def test_a_thousand_questions_leave_most_verdicts_near_the_line_undecided():
    """The paper's factoid scores as answers to 1,000 questions, 60 of which flip in each direction besides."""
    rng = np.random.default_rng(0)
    dense = score(answers(654, 1000, 0, rng))
    assert estimate(dense).score == 0.654
    verdicts = {}
    for level, percent in zip(LEVELS, GOLDEN["factoid", "magnitude"][1], strict=True):
        pair = compare(dense, score(answers(round(10 * percent), 1000, 60, rng)), signal=True)
        assert pair.dense == 0.654
        assert pair.retained == pytest.approx(percent / 65.4, abs=1e-3)
        assert pair.lost - pair.won == 654 - round(10 * percent)
        verdicts[level] = pair.verdict
    # a loss of 3.7 points of 65.4 is 5.7 %, a gain is none; flips in both directions make the interval wider than that
    assert verdicts == {
        0.1: "undecided", 0.2: "matching", 0.3: "undecided", 0.4: "not matching", 0.5: "not matching",
    }  # fmt: skip
    assert statistics.frontier(list(verdicts.items())) is None
