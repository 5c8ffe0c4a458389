"""One evaluation: one setting's model asked one suite's questions, sample by sample onto disk."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

from kick.compare import estimate
from kick.files import sha256_of
from kick.suite import Sample
from kick.sweep.clock import Watch
from kick.sweep.plan import PlannedSuite
from kick.sweep.store import EvaluationStore


def evaluate(
    lm: Any, dense: Any, planned: PlannedSuite, store: EvaluationStore, key: str, batch_size: int, watch: Watch
) -> dict[str, Any]:
    """Ask what is not on disk yet, then write scores.json. Safe to kill and call again.

    Batches are the same whatever was done before, so that an interrupted evaluation ends with the same samples.
    `dense` is the dense model's LM for a suite that compares with it while asking, else None.
    """
    suite = planned.suite
    batches = suite.batches(planned.examples, batch_size)
    ids = [[id for example in batch for id in suite.sample_ids(example)] for batch in batches]
    done = store.resume(ids)
    before = sum(map(len, batches[:done]))
    watch.skip(before)
    start = time.perf_counter()
    with store.appending() as appender:
        for batch in batches[done:]:
            answers = suite.answer_beside(lm, dense, batch) if suite.needs_dense else suite.answer(lm, batch)
            for sample in answers:
                appender.add(sample)
            appender.sync()
            watch.advance(len(batch))
    seconds = time.perf_counter() - start
    counts = Counts()
    samples: Iterable[Sample] = counts.over(store.read())
    scores = suite.score(samples if suite.scores_in_one_pass else list(samples))
    result = {
        "key": key,
        "status": "complete",
        "samples_sha256": sha256_of(store.samples_path),
        "n": counts.n,
        "truncated": counts.truncated,
        "failed": counts.failed,
        "shots": counts.shots,
        "asked_now": len(planned.examples) - before,
        "seconds": round(seconds, 3),
        "lm": lm.record() if hasattr(lm, "record") else {"name": type(lm).__name__},
        "suite": suite.record(lm),
        "batch_size": batch_size,
        "scores": [estimate(score).as_row() for score in scores],
    }
    store.finish(result)
    return result


class Counts:
    """What is counted of samples as they pass. shots: how many had how many examples in front of them."""

    def __init__(self) -> None:
        self.n = self.truncated = self.failed = 0
        self.shots: dict[str, int] = {}

    def over(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        for sample in samples:
            self.n += 1
            self.truncated += sample.truncated
            self.failed += sample.error is not None
            self.shots[str(sample.shots)] = self.shots.get(str(sample.shots), 0) + 1
            yield sample
