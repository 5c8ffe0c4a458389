"""Works one after the other in this very process: for debuggers and notebooks. Nothing is isolated or timed out."""

from kick.sweep.executors.base import Ended, Executor
from kick.sweep.plan import Plan
from kick.sweep.work import Rules, Work, carry_out
from kick.sweep.workshop import Workshop


class Inline(Executor):
    slots = 1
    _workshop: Workshop | None = None
    _ended: Ended | None = None

    @classmethod
    def works_here(cls, plan: Plan) -> int:
        return 1

    def submit(self, work: Work) -> None:
        self._workshop = self._workshop or Workshop(self.plan, self.store)
        watch = self.watch()
        for _ in carry_out(self._workshop, work, watch, Rules(debug=self.job.debug)):
            pass
        watch.stop()
        self._ended = Ended(work)

    def wait(self, seconds: float) -> list[Ended]:
        ended, self._ended = self._ended, None
        return [ended] if ended else []

    def close(self) -> None:
        self._workshop = None
