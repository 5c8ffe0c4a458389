"""A run as results files of lm-eval, one for each setting: for tools that read those."""

from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from kick.files import safe_name, write_json
from kick.report.results import Results
from kick.suite import OVERALL, Score


def write_lm_eval(results: Results, out: Path) -> list[Path]:
    """`SETTING/results.json` in `out` for every setting that was evaluated."""
    written = []
    for result in results.settings:
        document = document_of(results, result.name)
        if document["results"]:
            path = out / safe_name(result.name) / "results.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, document)
            written.append(path)
    return written


def document_of(results: Results, setting: str) -> dict[str, Any]:
    """What lm-eval's `--output_path` would hold. Groups (subjects, turns) are tasks `SUITE:GROUP`."""
    run = results.run
    document: dict[str, Any] = {
        "results": {},
        "configs": {},
        "versions": {},
        "n-shot": {},
        "higher_is_better": {},
        "n-samples": {},
        "config": {
            "model": run["config"]["lm"]["name"],
            "model_args": f"pretrained={run['model']['name']},dtype={run['dtype']}",
            "model_dtype": run["dtype"],
            "device": run["device"],
            "compression": setting,
        },
        "model_name": run["model"]["name"],
        "model_name_sanitized": run["model"]["name"].replace("/", "__"),
        "date": datetime.fromisoformat(run["started"]).timestamp(),
        "lm_eval_version": run["versions"].get("lm-eval"),
        "transformers_version": run["versions"].get("transformers"),
        "kick_version": run["versions"].get("llm-kick"),
    }
    for suite in results.suites:
        evaluation = results.get(setting, suite)
        for (metric, group), score in evaluation.scores.items():
            task = suite if group == OVERALL else f"{suite}:{group}"
            own = document["results"].setdefault(task, {"alias": task})
            own[f"{metric},none"] = score.point if score.n else "N/A"
            own[f"{metric}_stderr,none"] = _standard_error(score)
            document["higher_is_better"].setdefault(task, {})[metric] = score.metric.higher_is_better
            document["n-samples"][task] = {
                "original": len(score.ids) + score.truncated + score.failed,
                "effective": score.n,
            }
            document["configs"][task] = {"task": task, "metadata": run["suites"][suite]["params"]}
            document["versions"][task] = run["suites"][suite].get("plugin")
            document["n-shot"][task] = run["suites"][suite]["params"].get("shots", 0)
    return document


def _standard_error(score: Score) -> float | str:
    """Of a plain mean, over its independent units; lm-eval writes N/A where it has none."""
    if score.metric.per is not None or score.metric.transform != "mean" or score.n < 2 or score.clusters:
        return "N/A"
    return float(np.std(score.value, ddof=1) / np.sqrt(score.n))
