"""What a suite yields is what it was asked, or the evaluation fails and says so."""

import math

import pytest

from kick.errors import KickError
from kick.suite import Sample
from kick.sweep.evaluate import _as_asked


def sample(id, score=1.0):
    return Sample(id=id, group="g", prompt="p", scores={"correct": score})


def test_answers_in_order_pass():
    given = [sample("a"), sample("b", 0.0)]
    assert list(_as_asked(iter(given), ["a", "b"], "mine")) == given


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (["a"], "answered 1 of 2 questions; the first without an answer is 'b'"),
        ([], "answered 0 of 2 questions; the first without an answer is 'a'"),
        (["b", "a"], "answered 'b' where 'a' was asked"),
        (["a", "x"], "answered 'x' where 'b' was asked"),
        (["a", "b", "c"], "answered 'c' where nothing more was asked"),
    ],
)
def test_other_answers_fail_the_evaluation(ids, says):
    with pytest.raises(KickError, match=says):
        list(_as_asked(map(sample, ids), ["a", "b"], "mine"))


def test_a_score_that_is_no_number_is_a_failed_answer():
    (found,) = _as_asked([sample("a", math.nan)], ["a"], "mine")
    assert found.error == "a score is not a number"
