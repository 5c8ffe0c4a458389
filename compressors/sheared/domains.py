"""Dynamic batch loading: text from the domains that lag behind what their loss should be (section 2.2).

    delta_i = max(loss_i - reference_i, 0)          w_i = w_i exp(delta_i) / sum_j w_j exp(delta_j)

The reference is the loss that a model of the target's size would have: by a scaling law fitted to models of a family,
by a table, or the source model's own.
"""

import math
from collections.abc import Mapping, Sequence

from scipy.optimize import brentq

from kick.errors import ConfigError

LLAMA2_PARAMETERS = (6_738_415_616, 13_015_864_320, 68_976_648_192)
LLAMA2_LOSSES = {  # of LLaMA2-7B, 13B and 70B on RedPajama's domains
    "cc": (1.7520, 1.6680, 1.4621),
    "github": (0.6216, 0.5791, 0.4890),
    "book": (1.9063, 1.8242, 1.6450),
    "stackexchange": (1.4482, 1.3936, 1.2805),
    "wiki": (1.4844, 1.3945, 1.2118),
    "arxiv": (1.2637, 1.2109, 1.1148),
    "c4": (1.9219, 1.8486, 1.6848),
}


def updated_weights(
    weights: Mapping[str, float],
    losses: Mapping[str, float],
    reference: Mapping[str, float],
    *,
    clamp: bool = True,
    floor: float = 0.0,
    cap: float = 1.0,
) -> dict[str, float]:
    """The weights after one evaluation, summing to 1.

    clamp: losses below their reference count as on it (the paper; the authors' code lets them lower the weight). floor:
    share of a uniform mixture that is mixed in (1e-4 in the code). cap: no domain gets more than this; what is above
    goes to the others in proportion.

    >>> {k: round(w, 3) for k, w in updated_weights({"a": .5, "b": .5}, {"a": 3., "b": 2.}, {"a": 2., "b": 2.}).items()}
    {'a': 0.731, 'b': 0.269}
    """
    deltas = {name: losses[name] - reference[name] for name in weights}
    raised = {
        name: weight * math.exp(max(deltas[name], 0) if clamp else deltas[name]) for name, weight in weights.items()
    }
    total = sum(raised.values())
    mixed = {name: (1 - floor) * weight / total + floor / len(weights) for name, weight in raised.items()}
    return _capped(mixed, cap)


def _capped(weights: dict[str, float], cap: float) -> dict[str, float]:
    if cap * len(weights) < 1:
        raise ConfigError(f"a cap of {cap} on {len(weights)} domains.", "They could not sum to 1: give a larger cap.")
    fixed: set[str] = set()
    while over := {name for name, weight in weights.items() if weight > cap + 1e-12 and name not in fixed}:
        fixed |= over
        rest = sum(weight for name, weight in weights.items() if name not in fixed)
        free = 1 - cap * len(fixed)
        weights = {
            name: cap if name in fixed else (weight * free / rest if rest else free / (len(weights) - len(fixed)))
            for name, weight in weights.items()
        }
    return weights


def predicted_loss(parameters: Sequence[float], losses: Sequence[float], target: float) -> float:
    """L(N) = A / N^b + c through three models' losses, at `target` parameters (appendix on reference losses).

    Raises ConfigError if there are not three, or no such curve goes through them.
    """
    if len(parameters) != 3 or len(losses) != 3:
        raise ConfigError(f"a scaling law through {len(losses)} models.", "Give the losses of three.")
    (n1, n2, n3), (l1, l2, l3) = zip(*sorted(zip(parameters, losses, strict=True)), strict=True)
    if not l1 > l2 > l3:
        raise ConfigError(f"losses {l1}, {l2}, {l3} do not fall with size.", "No scaling law goes through them.")

    def mismatch(b: float) -> float:  # (l1 - l2) / (l2 - l3), from which A and c have gone
        x1, x2, x3 = ((n / n1) ** -b for n in (n1, n2, n3))
        return (l1 - l2) * (x2 - x3) - (l2 - l3) * (x1 - x2)

    low, high = 1e-6, 20.0
    if mismatch(low) * mismatch(high) > 0:
        raise ConfigError(
            f"no curve A / N^b + c goes through losses {l1}, {l2}, {l3}.", "They must fall ever more slowly with log N."
        )
    b = brentq(mismatch, low, high, xtol=1e-14)
    a = (l1 - l2) / (1 - (n2 / n1) ** -b)
    return l1 - a + a * (target / n1) ** -b
