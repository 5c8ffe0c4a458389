"""What changes over a run, as pure functions of the step: the decay of pruned weights, and how many weights stay."""

from typing import Literal

from kick.levels import Pattern

Decay = Literal["annealing", "constant", "none"]
Masks = Literal["adaptive", "fixed", "iterative", "gradual"]


def decay_at(step: int, steps: int, most: float, kind: Decay, ramp: float = 0.25) -> float:
    """lambda(t): annealing SR-STE grows linearly to `most` over the first `ramp` of the steps, then stays (sec. 3.2).

    >>> [decay_at(step, 400, 1e-4, "annealing") for step in (0, 50, 100, 399)]
    [0.0, 5e-05, 0.0001, 0.0001]
    """
    if kind == "none":
        return 0.0
    if kind == "constant":
        return most
    return most * min(1.0, step / max(1.0, ramp * steps))


_RAMP = 0.5  # of the steps, in which masks come down to their pattern


def pattern_at(step: int, steps: int, pattern: Pattern, kind: Masks) -> Pattern:
    """The pattern that holds at `step`: the target, or one that keeps more while `iterative` or `gradual` still prunes.

    Iterative: from M:M down to N:M in equal stages over the first half of the steps. Gradual: the same numbers, by
    the cubic schedule of Zhu and Gupta (arXiv 1710.01878).

    >>> [str(pattern_at(step, 100, Pattern(keep=2, of=4), "iterative")) for step in (0, 24, 25, 60)]
    ['3:4', '3:4', '2:4', '2:4']
    """
    removed = pattern.of - pattern.keep
    done = min(1.0, (step + 1) / max(1.0, _RAMP * steps))
    if kind == "iterative":
        now = min(removed, 1 + int(removed * step / max(1.0, _RAMP * steps)))
    elif kind == "gradual":
        now = max(1, round(removed * (1 - (1 - done) ** 3)))
    else:
        now = removed
    return Pattern(keep=pattern.of - now, of=pattern.of)
