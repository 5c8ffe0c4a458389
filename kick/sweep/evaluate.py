"""One evaluation: one setting's model asked one suite's questions, sample by sample onto disk."""

import time
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
    samples = store.samples()
    result = {
        "key": key,
        "status": "complete",
        "samples_sha256": sha256_of(store.samples_path),
        "n": len(samples),
        "truncated": sum(sample.truncated for sample in samples),
        "failed": sum(sample.error is not None for sample in samples),
        "shots": _shots(samples),
        "asked_now": len(planned.examples) - before,
        "seconds": round(seconds, 3),
        "lm": lm.record() if hasattr(lm, "record") else {"name": type(lm).__name__},
        "suite": suite.record(lm),
        "batch_size": batch_size,
        "scores": [estimate(score).as_row() for score in suite.score(samples)],
    }
    store.finish(result)
    return result


def _shots(samples: list[Sample]) -> dict[str, int]:
    """How many samples had how many examples in front of them."""
    counts: dict[str, int] = {}
    for sample in samples:
        counts[str(sample.shots)] = counts.get(str(sample.shots), 0) + 1
    return counts
