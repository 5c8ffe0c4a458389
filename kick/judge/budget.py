"""What may still be spent. A request is let through only if even its worst case stays inside the budget."""

import threading
from dataclasses import dataclass


class BudgetSpent(Exception):  # noqa: N818 (a state, not a fault)
    """No further request fits into the budget."""


@dataclass(frozen=True)
class Bound:
    """The most that one request can take."""

    prompt_tokens: int
    output_tokens: int


class Budget:
    """Counts tokens and money over all threads. Prices are in USD per million tokens; None is no limit. What was used
    before counts too.

    A reservation blocks while requests under way might still give back what they do not use, and raises BudgetSpent
    when there are none. So the sum of what was used is never above the budget.
    """

    def __init__(
        self,
        usd: float | None,
        tokens: int | None,
        price_in: float | None,
        price_out: float | None,
        prompt_tokens: int = 0,
        output_tokens: int = 0,
    ) -> None:
        self.limit_usd, self.limit_tokens = usd, tokens
        self.price_in, self.price_out = price_in or 0.0, price_out or 0.0
        self.prompt_tokens, self.output_tokens = prompt_tokens, output_tokens
        self._reserved: list[Bound] = []
        self._changed = threading.Condition()

    def reserve(self, bound: Bound) -> None:
        with self._changed:
            while not self._fits(bound):
                if not self._reserved:
                    raise BudgetSpent
                self._changed.wait()
            self._reserved.append(bound)

    def settle(self, bound: Bound, prompt_tokens: int, output_tokens: int) -> None:
        """A request ended: `bound` is given back, what it really took is counted."""
        with self._changed:
            self._reserved.remove(bound)
            self.prompt_tokens += prompt_tokens
            self.output_tokens += output_tokens
            self._changed.notify_all()

    @property
    def usd(self) -> float:
        return self._usd(self.prompt_tokens, self.output_tokens)

    def _fits(self, bound: Bound) -> bool:
        held = [*self._reserved, bound]
        prompt = self.prompt_tokens + sum(each.prompt_tokens for each in held)
        output = self.output_tokens + sum(each.output_tokens for each in held)
        if self.limit_tokens is not None and prompt + output > self.limit_tokens:
            return False
        return self.limit_usd is None or self._usd(prompt, output) <= self.limit_usd

    def _usd(self, prompt_tokens: int, output_tokens: int) -> float:
        return (prompt_tokens * self.price_in + output_tokens * self.price_out) / 1e6
