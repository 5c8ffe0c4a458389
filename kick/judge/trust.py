"""How far a judge can be trusted: with itself, with the order of answers, with their length, with people.

Pure functions on judgments. The figures stand in judge.json and in the report beside the judge's name.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from kick.judge.questions import Answer, Judgment

Figures = dict[str, float | int | None]


def with_itself(judgments: Sequence[Judgment]) -> Figures:
    """Questions asked again: the share with the same answer, and how far ratings move on average."""
    first = {judgment.id: judgment for judgment in judgments if judgment.repeat == 0}
    same = moved = ratings = pairs = 0
    distance = 0.0
    for again in judgments:
        before = first.get(again.id.removesuffix(f"#{again.repeat}"))
        if again.repeat == 0 or before is None or before.answer is None or again.answer is None:
            continue
        pairs += 1
        same += before.answer == again.answer
        for one, other in zip(_numbers(before.answer), _numbers(again.answer), strict=True):
            ratings += 1
            distance += abs(one - other)
            moved += one != other
    return {
        "asked_again": pairs,
        "same_answer": same / pairs if pairs else None,
        "mean_rating_change": distance / ratings if ratings else None,
    }


def with_the_order(judgments: Sequence[Judgment]) -> Figures:
    """Pairs judged in both orders: the share of verdicts that turn with the order, and how often A wins then."""
    orders: dict[str, dict[str, str]] = {}
    for judgment in judgments:
        asked = judgment.repeat == 0 and judgment.kind == "pair" and judgment.asks > 0
        if asked and judgment.answer is not None:
            orders.setdefault(judgment.sample, {})[judgment.order] = judgment.answer["winner"]
    both = [seen for seen in orders.values() if len(seen) == 2]
    turned = [seen for seen in both if (seen["ab"], seen["ba"]) not in (("A", "B"), ("B", "A"), ("tie", "tie"))]
    decided = [winner for seen in turned for winner in seen.values() if winner != "tie"]
    return {
        "pairs_in_both_orders": len(both),
        "swap_disagreement": len(turned) / len(both) if both else None,
        "first_shown_wins_when_they_disagree": decided.count("A") / len(decided) if decided else None,
    }


def with_length(judgments: Sequence[Judgment], words: Mapping[str, int]) -> Figures:
    """Spearman's rank correlation of a rating with the length of the answer. words: by sample id."""
    rated = [
        (float(np.mean(list(judgment.own_ratings().values()))), words[judgment.sample])
        for judgment in judgments
        if judgment.repeat == 0 and judgment.kind == "single" and judgment.asks and judgment.answer is not None
    ]
    scores, lengths = [score for score, _ in rated], [length for _, length in rated]
    constant = len(set(scores)) < 2 or len(set(lengths)) < 2
    return {
        "ratings": len(rated),
        "correlation_with_length": None if constant else float(spearmanr(scores, lengths).statistic),
    }


def with_verdicts(judgments: Sequence[Judgment], verdicts: Mapping[str, Answer]) -> Figures:
    """Against reference verdicts, by question id: the share of equal answers, and the mean distance of ratings."""
    pairs = [
        (judgment.answer, verdicts[judgment.id])
        for judgment in judgments
        if judgment.repeat == 0 and judgment.asks and judgment.answer is not None and judgment.id in verdicts
    ]
    distances = [abs(a - b) for own, other in pairs for a, b in zip(_numbers(own), _numbers(other), strict=False)]
    return {
        "with_reference_verdict": len(pairs),
        "agrees_with_reference": sum(own == other for own, other in pairs) / len(pairs) if pairs else None,
        "mean_distance_from_reference": float(np.mean(distances)) if distances else None,
    }


def _numbers(answer: Answer) -> Iterable[float]:
    for value in answer.values():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float):
                yield float(number)


def table(judgments: Sequence[Judgment], words: Mapping[str, int], verdicts: Mapping[str, Answer]) -> dict[str, Any]:
    """All figures of one suite."""
    own = with_verdicts(judgments, verdicts) if verdicts else {}
    return {**with_itself(judgments), **with_the_order(judgments), **with_length(judgments, words), **own}
