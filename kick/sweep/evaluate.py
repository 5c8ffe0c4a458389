"""One evaluation: one setting's model asked one suite's questions, sample by sample onto disk."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from kick.compare import estimate
from kick.errors import KickError
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
        for batch, wanted in zip(batches[done:], ids[done:], strict=True):
            answers = suite.answer_beside(lm, dense, batch) if suite.needs_dense else suite.answer(lm, batch)
            for sample in _as_asked(answers, wanted, planned.name):
                appender.add(sample)
            appender.sync()
            watch.advance(len(batch))
    seconds = time.perf_counter() - start
    counts = Counts()
    samples: Iterable[Sample] = counts.over(store.read())
    scores = suite.score(samples if suite.scores_in_one_pass else list(samples))
    if counts.n > counts.truncated + counts.failed and not suite.judged_metrics and not any(s.n for s in scores):
        values = ", ".join(f"'{metric.value}'" for metric in suite.metrics)
        raise KickError(
            f"the suite '{planned.name}' scored none of its {counts.n} answers.",
            f"Its metrics read {values} in a sample's scores (kick.testing.check_suite).",
        )
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


def _as_asked(answers: Iterable[Sample], wanted: Sequence[str], suite: str) -> Iterator[Sample]:
    """`answers`, one for each id and in that order; a score that is no number makes its sample one that failed.

    Raises KickError for a suite that answers anything else: what it left out would be in no count.
    """
    given = 0
    for given, sample in enumerate(answers, 1):
        if given > len(wanted) or sample.id != wanted[given - 1]:
            expected = f"'{wanted[given - 1]}'" if given <= len(wanted) else "nothing more"
            raise KickError(
                f"the suite '{suite}' answered '{sample.id}' where {expected} was asked.",
                "A suite yields one sample for each question, in their order (kick.testing.check_suite).",
            )
        if any(math.isnan(value) for value in sample.scores.values()) and sample.error is None:
            sample = replace(sample, error="a score is not a number")
        yield sample
    if given < len(wanted):
        raise KickError(
            f"the suite '{suite}' answered {given} of {len(wanted)} questions; the first without an answer is "
            f"'{wanted[given]}'.",
            "A suite yields one sample for each question, in their order (kick.testing.check_suite).",
        )


class Counts:
    """What is counted of samples as they pass. shots: how many had how many examples in front of them."""

    def __init__(self) -> None:
        self.n = self.truncated = self.failed = 0
        self.shots: dict[str, int] = {}

    def over(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        for sample in samples:
            self.n += 1
            self.truncated += sample.left_out == "truncated"
            self.failed += sample.left_out == "failed"
            self.shots[str(sample.shots)] = self.shots.get(str(sample.shots), 0) + 1
            yield sample
