"""Dynamic batch loading: text from domains that lag behind what their loss should be (arXiv 2310.06694, section 2.2).

    delta_i = max(loss_i - reference_i, 0)          w_i = w_i exp(delta_i) / sum_j w_j exp(delta_j)

The reference is the loss that a model of the target's size would have: by a scaling law fitted to models of a family,
by a table, or the source model's own.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator
from scipy.optimize import brentq

from kick import distributed
from kick.errors import ConfigError, unknown_name
from kick.spec import Spec

from .objective import Objective, mean_loss
from .text import Mixture, beginnings, fingerprint

_AT_ONCE = 8  # held-out sequences

LLAMA2_PARAMETERS = (6_738_415_616, 13_015_864_320, 68_976_648_192)
LLAMA2_LOSSES: dict[str, float | tuple[float, float, float]] = {  # of LLaMA2-7B, 13B and 70B on RedPajama's domains
    "cc": (1.7520, 1.6680, 1.4621),
    "github": (0.6216, 0.5791, 0.4890),
    "book": (1.9063, 1.8242, 1.6450),
    "stackexchange": (1.4482, 1.3936, 1.2805),
    "wiki": (1.4844, 1.3945, 1.2118),
    "arxiv": (1.2637, 1.2109, 1.1148),
    "c4": (1.9219, 1.8486, 1.6848),
}


class Loading(Spec):
    """Dynamic batch loading: how the weights of the domains follow their losses."""

    reference: str | dict[str, float | tuple[float, float, float]] = Field(
        default="source",
        description="losses to reach: source (the dense model's own), llama2 (a scaling law through 7B, 13B and 70B), "
        "or for each domain a number, or the losses of three models of `sizes`",
    )
    sizes: tuple[float, float, float] = Field(default=LLAMA2_PARAMETERS, description="parameters of those models")
    held_out: int = Field(default=16, ge=1, description="sequences a domain, for its loss")
    validation: str | dict[str, str] | None = Field(
        default=None, description="where those are from, in the form of `data`; else kept back from it"
    )
    dynamic: bool = Field(default=True, description="false: the weights stay, losses are logged all the same")
    clamp: bool = Field(default=True, description="false: losses below their reference lower a weight (authors' code)")
    floor: float = Field(default=0.0, ge=0, lt=1, description="share of a uniform mixture; 1e-4 in the authors' code")
    cap: float = Field(default=1.0, gt=0, le=1, description="the most that one domain gets")

    @model_validator(mode="after")
    def _limits_what_moves(self) -> "Loading":
        if not self.dynamic and (unread := sorted(self.model_fields_set & {"cap", "clamp", "floor"})):
            raise ValueError(f"{unread[0]} is about new weights of domains, and dynamic: false sets none")
        return self

    @model_validator(mode="after")
    def _knows_whose_losses(self) -> "Loading":
        given = self.reference.values() if isinstance(self.reference, dict) else ()
        if any(isinstance(losses, tuple) for losses in given) and "sizes" not in self.model_fields_set:
            raise ValueError("reference holds the losses of three models: say in sizes how many parameters they have")
        return self

    def measuring(self, domains: int, updates: int, length: int, parameters: int) -> float:
        """Operations that the losses of so many updates take, for sequences of `length` and a model of `parameters`."""
        return 2.0 * updates * domains * self.held_out * length * parameters

    def held_out_beginnings(self, field: str) -> Iterator[str]:
        """The first documents of the text that decides weights and is not trained on, where it is from elsewhere."""
        return beginnings(self.validation, field) if self.validation is not None else iter(())

    def held_out_fingerprint(self) -> dict[str, str]:
        """Identity of the text that is not trained on, where it is from elsewhere."""
        return {"validation": fingerprint(self.validation)} if self.validation is not None else {}


class Domains:
    """The held-out loss of each domain, and what it makes of the mixture's weights.

    parameters: of the model that the reference losses are meant for; `source` is the one whose own are taken.
    micro_batch: sequences at once, as in training. Raises UnknownNameError for a domain without a reference, and
    ConfigError for a cap under which weights could not sum to 1.
    """

    def __init__(self, mixture: Mixture, params: Loading, source: Any, parameters: int, micro_batch: int = 0) -> None:
        check_cap(params.cap, len(mixture.streams))
        self.mixture, self.params = mixture, params
        self._at_once = min(micro_batch or _AT_ONCE, _AT_ONCE)
        device = next(source.parameters()).device
        self.held = {
            name: torch.from_numpy(stream.held.astype(np.int64)).to(device) for name, stream in mixture.streams.items()
        }
        self.reference = self._reference(source, parameters)

    def measure(self, objective: Objective) -> dict[str, float]:
        """Of each domain, by all processes together: each takes its share of the sequences, all get the same means."""
        was_training = objective.training
        objective.eval()
        world, rank = distributed.world(), distributed.rank()
        parts = {name: _parts(held, rank, world if distributed.begun() else 1) for name, held in self.held.items()}
        own = {
            name: sum(weight * mean_loss(objective, part, self._at_once) for part, weight in own)
            for name, own in parts.items()
        }
        objective.train(was_training)
        everyone = [own]
        if distributed.begun():
            everyone = [None] * world  # type: ignore[list-item]
            torch.distributed.all_gather_object(everyone, own)
        return {name: sum(losses[name] for losses in everyone) / len(everyone) for name in own}

    def update(self, objective: Objective) -> dict[str, Any]:
        """Measure, set new weights; what the history should tell of it."""
        losses = self.measure(objective)
        if self.params.dynamic and all(map(math.isfinite, losses.values())):  # else training is about to stop
            self.mixture.weights = updated_weights(
                self.mixture.weights,
                losses,
                self.reference,
                clamp=self.params.clamp,
                floor=self.params.floor,
                cap=self.params.cap,
            )
        return {"domain_loss": losses, "domain_reference": self.reference, "domain_weight": self.mixture.weights}

    def _reference(self, source: Any, parameters: int) -> dict[str, float]:
        given = self.params.reference
        if given == "source":
            return self.measure(Objective(source))
        if isinstance(given, str):
            if given != "llama2":
                raise ConfigError(f"reference '{given}'.", "Expected source, llama2, or losses by domain.")
            given = dict(LLAMA2_LOSSES)
        found = {}
        for name in self.mixture.streams:
            if name not in given:
                raise unknown_name("reference loss for the domain", name, given)
            values = given[name]
            found[name] = predicted_loss(self.params.sizes, values, parameters) if isinstance(values, tuple) else values
        return found


def _parts(held: torch.Tensor, rank: int, world: int) -> list[tuple[torch.Tensor, float]]:
    """What a process reads of `held` [n, length], and the weights by which the means over it enter the mean over all.

    Shares are equal, so that none waits for another in vain: what does not divide is read by all.
    """
    even = len(held) // world * world
    pieces = [(held[rank:even:world], even), (held[even:], len(held) - even)]
    return [(piece, size / len(held)) for piece, size in pieces if size]


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
    above = {name: max(delta, 0.0) if clamp else delta for name, delta in deltas.items()}
    most = max(above.values())  # which divides out
    raised = {name: weight * math.exp(above[name] - most) for name, weight in weights.items()}
    total = sum(raised.values())
    mixed = {name: (1 - floor) * weight / total + floor / len(weights) for name, weight in raised.items()}
    return _capped(mixed, cap)


def check_cap(cap: float, domains: int) -> None:
    if cap * domains < 1:
        raise ConfigError(
            f"a cap of {cap} on {domains} domains: their weights could not sum to 1.", "Give a larger cap."
        )


def _capped(weights: dict[str, float], cap: float) -> dict[str, float]:
    check_cap(cap, len(weights))
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
