"""What does a sweep of thousands of evaluations cost kick itself, and does the cost grow linearly?

    python benchmarks/scale.py [--evaluations 1000 3000 10000] [--samples 10000000] [--out FILE]

Evaluations are scripted and instantaneous: a suite of 20 questions, ten times under other names, for N / 10 settings of
a tiny random model. Measured, each in a process of its own, with wall seconds and peak resident memory: making the
plan, finding what is missing (a resume that has nothing to do), and the whole report. Then one evaluation with many
samples is scored: its memory is that of ids and numbers, not of texts. Imports are not counted. Linux.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from kick import plugins
from kick.config import SweepConfig
from kick.files import sha256_of, to_json, write_json
from kick.meter import Meter
from kick.sweep.plan import Plan, make_plan
from kick.sweep.store import EvaluationStore, Store

SUITES, QUESTIONS = 10, 20
LIMITS = {"plan": "2 s", "resume": "10 s", "report": "60 s and 2 GB"}
PLUGIN = '''
"""A suite that is asked nothing: its answers are scripted."""
from kick.suite import Example, Metric, Sample, Suite

class Scripted(Suite):
    name = "scripted"
    metrics = (Metric("correct", value="correct", unit="share of questions"),)

    def examples(self, source):
        return [Example(f"q{n}", f"group {n % 4}", {"question": f"What is {n}?"}) for n in range(QUESTIONS)]

    def answer(self, lm, examples):
        for example in examples:
            yield Sample(example.id, example.group, example.content["question"], output="?", scores={"correct": 1.0})
'''.replace("QUESTIONS", str(QUESTIONS))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, nargs="+", default=[1000, 3000, 10_000])
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        for count in options.evaluations:
            job = {"folder": folder, "count": count}
            measure({**job, "step": "write"})
            for step in ("plan", "resume", "report"):
                found = measure({**job, "step": step})
                rows.append({"evaluations": count, "step": step, **found})
                each = 1000 * found["seconds"] / count
                print(
                    f"{count:>7,} evaluations, {step:<7}{found['seconds']:7.2f} s ({each:.2f} ms each), "
                    f"{found['peak_bytes'] / 1e9:.2f} GB (asked at 10,000: {LIMITS[step]})",
                    flush=True,
                )
        for count in (options.samples // 10, options.samples) if options.samples else ():
            found = measure({"folder": folder, "count": count, "step": "score"})
            rows.append({"samples": count, "step": "score", **found})
            print(f"{count:>11,} samples scored in {found['seconds']:.0f} s, {found['peak_bytes'] / 1e9:.2f} GB")
    if options.out:
        write_json(options.out, rows)
    return 0


def measure(job: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, "--job", json.dumps(job)], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# One step, in a process of its own


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    folder = Path(job["folder"])
    plugins.load_file(folder / "scripted.py")
    config = sweep_of(folder, job["count"]) if job["step"] != "score" else None
    run = folder / f"run-{job['count']}"
    import kick.lm.fast
    import kick.report.figures
    import kick.report.html  # noqa: F401 (imports are not measured)
    from kick.report import write_report
    from kick.sweep.run import missing_evaluations

    if job["step"] == "write":
        assert config is not None
        write_run(make_plan(config), run)
        return {}
    if job["step"] == "score":
        return score_many(folder / "many", job["count"])
    if job["step"] == "report":
        with Meter() as meter:
            write_report(run)
        return {
            "seconds": meter.seconds,
            "peak_bytes": meter.peak_bytes,
            "page_bytes": (run / "report.html").stat().st_size,
        }
    assert config is not None
    with Meter() as meter:
        plan = make_plan(config)
        assert plan.identity
    if job["step"] == "resume":
        with Meter() as meter:
            assert not missing_evaluations(plan, Store(run))
    return {"seconds": meter.seconds, "peak_bytes": meter.peak_bytes}


def make_model(folder: Path) -> None:
    """A tiny random Llama with a tokenizer of bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from kick.testing import tiny_tokenizer

    tiny_tokenizer().save_pretrained(folder / "model")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=257, **shape)).save_pretrained(folder / "model")
    (folder / "scripted.py").write_text(PLUGIN)


def sweep_of(folder: Path, evaluations: int) -> SweepConfig:
    levels = np.linspace(0.001, 0.9, evaluations // SUITES - 1)
    return SweepConfig(
        model=str(folder / "model"),
        settings=[{"compressor": "magnitude", "levels": [f"{level:.6f}" for level in levels]}],
        suites=[{"suite": "scripted", "label": f"suite {number}"} for number in range(SUITES)],
        data="embedded",
    )


def write_run(plan: Plan, root: Path) -> None:
    """What a sweep leaves: answers that get worse with the level."""
    rng = np.random.default_rng(0)
    layer = {"shape": [8, 8], "weights": 64, "zeros": 0, "sparsity": 0.0, "bits_per_weight": 32, "weight_error": 0.0}
    with Store.open(root, plan) as store:
        for number, setting in enumerate(plan.settings):
            level = number / len(plan.settings)
            facts = {"sparsity": level, "bits_per_weight": 32.0, "bytes": 4000, "dtype": "float32", "parameters": 1000}
            record = {"setting": setting.model_dump(mode="json"), "layers": {"a": layer}, "stages": [], "warnings": []}
            record |= facts
            store.keep_record(setting.name, record)
            for suite in plan.suites:
                own = store.evaluation(setting.name, suite.name)
                right = rng.random(QUESTIONS) > 0.3 + 0.6 * level
                rows = [sample_row(e.id, e.group, bool(ok)) for e, ok in zip(suite.examples, right, strict=True)]
                own.path.mkdir(parents=True, exist_ok=True)
                own.samples_path.write_text("".join(to_json(row, indent=None) + "\n" for row in rows))
                result = {"key": plan.key(setting, suite), "status": "complete", "asked_now": QUESTIONS, "seconds": 0.1,
                          "samples_sha256": sha256_of(own.samples_path)}  # fmt: skip
                own.scores_path.write_text(json.dumps(result))


def sample_row(id: str, group: str, right: bool) -> dict[str, Any]:
    return {"id": id, "group": group, "prompt": "What is it?", "output": "yes" if right else "no", "choices": None,
            "scores": {"correct": float(right)}, "truncated": False, "shots": 0, "n_prompt_tokens": 4,
            "n_output_tokens": 1, "error": None}  # fmt: skip


def score_many(folder: Path, count: int) -> dict[str, Any]:
    """Reading and scoring one evaluation of `count` samples."""
    from kick import compare

    own = EvaluationStore(folder)
    folder.mkdir(exist_ok=True)
    line = to_json(sample_row("ID", "all", True), indent=None)
    with open(own.samples_path, "w", encoding="utf-8") as file:
        for number in range(count):
            file.write(line.replace('"ID"', f'"q{number}"') + "\n")
    (kind, _) = plugins.suite_of("scripted")
    start = time.perf_counter()
    with Meter() as meter:
        scores = kind().score(own.read())
        assert compare.estimate(scores[0]).n == count
    own.samples_path.unlink()
    return {"seconds": time.perf_counter() - start, "peak_bytes": meter.peak_bytes}


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--job":
        print(json.dumps(run_job(json.loads(sys.argv[2]))))
        sys.exit(0)
    sys.exit(main())
