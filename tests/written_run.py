"""A run directory written by hand: reports need no model."""

import json

from kick.files import sha256_of
from kick.suite import Sample

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</td></table><h1>mine</h1>",
    "\u202eright to left\u202c",
    "broken \udcff surrogate",
    "x" * 100_000,
    "{{ 7 * 7 }} {% raw %}",
    "]]> &amp; &lt;",
]

# right answers of 100 questions: dense 60; small loses 1 and wins 1; large loses 40
DENSE = [1] * 60 + [0] * 40
SMALL = [0] + [1] * 59 + [1] + [0] * 39
LARGE = [1] * 20 + [0] * 80
TRUNCATED = range(97, 100)


def write_run(root, settings, suites, failing=()):
    root.mkdir()
    unset = {"label": "", "params": {}, "data": None, "limit": None, "limit_per_group": None, "seed": 0}
    specs = [{"suite": suite, **unset} for suite in suites]
    rows = []
    for name, sparsity in settings:
        compressor, _, level = name.partition("@")
        row = {"compressor": compressor, "level": level, "params": {}, "seed": 0, "label": ""}
        rows.append({**row, "name": name})
        folder = root / "evaluations" / name
        folder.mkdir(parents=True)
        layer = {
            "shape": [10, 10],
            "weights": 100,
            "zeros": round(100 * sparsity),
            "sparsity": sparsity,
            "weight_error": 0.1,
            "bits_per_weight": 32,
        }
        record = {"setting": row, "sparsity": sparsity, "bits_per_weight": 32, "bytes": 4_000_000, "dtype": "float32",
                  "parameters": 1_000_000, "layers": {"a": layer}, "stages": [],
                  "warnings": ["a dead column"] if sparsity == 0.2 else []}  # fmt: skip
        (folder / "kick.json").write_text(json.dumps(record))
    run = {
        "format": 1, "started": "2026-01-01T00:00:00+00:00",
        "model": {"name": "<b>model</b>", "kind": "directory", "note": "", "fingerprint": "f" * 64},
        "dtype": "float32", "device": "cpu", "settings": rows, "hardware": {"cores": 2},
        "versions": {"torch": "2"},
        "suites": {s: {"source": "x", "params": {}, "questions": 100, "data": "d"} for s in suites},
        "config": {"suites": specs, "lm": {"name": "fast"}, "calibration": {"source": "embedded"}},
    }  # fmt: skip
    (root / "run.json").write_text(json.dumps(run))
    for (name, _), suite in [(setting, suite) for setting in settings for suite in suites]:
        folder = root / "evaluations" / name / suite
        folder.mkdir()
        if (name, suite) in failing:
            (folder / "scores.json").write_text(
                json.dumps({"key": "k", "status": "failed", "reason": "it <i>broke</i>"})
            )
            continue
        with open(folder / "samples.jsonl", "w", encoding="utf-8", errors="backslashreplace") as file:
            for sample in samples(name, suite):
                file.write(json.dumps(sample.to_json(), ensure_ascii=False) + "\n")
        _complete(folder)
    return root


def change_samples(folder, change, start=0):
    """Replace the rows of an evaluation from `start` on, and have them all count as what was scored."""
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    rows[start:] = map(change, rows[start:])
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _complete(folder)


def _complete(folder):
    scored = {"key": "k", "status": "complete", "samples_sha256": sha256_of(folder / "samples.jsonl")}
    (folder / "scores.json").write_text(json.dumps(scored))


def samples(setting, suite):
    right = {"dense": DENSE, "magnitude@0.2": SMALL, "wanda@0.1": DENSE}.get(setting, LARGE)
    for index, correct in enumerate(right):
        hostile = HOSTILE[0] + HOSTILE[6] + HOSTILE[index % len(HOSTILE)]
        if suite == "perplexity":
            worse = 1.0 if setting == "dense" else 1.3
            nll = (2.0 + 0.01 * index) * worse
            yield Sample(
                f"w{index}", "t", hostile, scores={"nll": nll, "tokens": 1.0, "bits": nll / 0.693, "bytes": 4.0}
            )
        elif suite == "summarization":
            scores = {"rougeL": 0.3 * correct, "rouge1": 0.4 * correct, "rouge2": 0.1 * correct, "empty": 0.0}
            scores |= {"words": 40.0 + 10 * correct, "novel_2grams": 0.5 + 0.1 * correct, "over_limit": 0.0}
            scores |= {"compression": 9.0 - correct, "copied_4grams": 0.2 * correct, "repetition": 0.3 - 0.2 * correct}
            yield Sample(f"s{index}", "short", "A story.", output="A summary.", scores=scores)
        else:
            correct = correct or (setting == "dense" and index == 98)  # and it was cut: nothing changed there
            scores = {"contains": float(correct), "exact_match": float(correct), "f1": float(correct)}
            yield Sample(
                f"q{index:03d}", "topic", f"{hostile} Why?", output=hostile, scores=scores, truncated=index in TRUNCATED
            )


SETTINGS = [("dense", 0.0), ("magnitude@0.2", 0.2), ("magnitude@0.5", 0.5), ("wanda@0.1", 0.1), ("wanda@2:4", 0.5)]
