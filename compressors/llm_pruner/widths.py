"""How many units a ratio takes away: the rule that gives LLM-Pruner's published parameter counts.

Of C channels n = C - int(C (1 - r)) go; heads only whole, n // head_dim of them.
"""

from collections.abc import Callable

from kick.errors import LevelError


def channels_removed(channels: int, ratio: float) -> int:
    """
    >>> channels_removed(11008, 0.25), channels_removed(4096, 0.25)
    (2752, 1024)
    """
    return channels - int(channels * (1 - ratio))


def heads_removed(heads: int, head_dim: int, ratio: float) -> int:
    """Key heads, with their query heads.

    >>> heads_removed(32, 128, 0.25), heads_removed(3, 64, 0.25)
    (8, 0)
    """
    return channels_removed(heads * head_dim, ratio) // head_dim


def rounded(kept: int, multiple: int, most: int) -> int:
    """`kept` to the nearest multiple, no more than `most`: widths that hardware likes."""
    if multiple <= 1:
        return kept
    return min(most, max(multiple, multiple * round(kept / multiple)))


def ratio_for(share: float, removed: Callable[[float], float]) -> float:
    """The ratio whose `removed` share of parameters comes nearest to `share`. Raises LevelError if none does.

    `removed` grows with the ratio, in steps.
    """
    low, high = 0.0, 0.999
    if removed(high) < share:
        raise LevelError(
            f"{share:.0%} of the parameters cannot be removed: these groups hold {removed(1.0):.0%}.",
            "Protect fewer layers, or ask for less.",
        )
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if removed(middle) >= share else (middle, high)
    return min((low, high), key=lambda ratio: abs(removed(ratio) - share))
