"""A run's results in an experiment tracker: one tracked run for each setting, with the report beside it.

Where they go is what the tracker's own environment says (MLFLOW_TRACKING_URI, WANDB_MODE, ...).
"""

import math
import re
from collections.abc import Callable
from typing import Any

from kick.extras import import_extra
from kick.report.results import Results, SettingResult
from kick.suite import OVERALL


def log_to(name: str, results: Results) -> int:
    """Log every setting to the tracker called `name`; gives their number. Raises ConfigError if it is not installed."""
    return TRACKERS[name](results)


def _facts(results: Results, result: SettingResult) -> tuple[dict[str, Any], dict[str, float]]:
    """(what was run, what came out) of one setting."""
    what = {
        "model": results.run["model"]["name"],
        "setting": result.name,
        "compressor": result.setting.compressors,
        "level": result.setting.levels,
        "seed": result.setting.seed,
        "dtype": results.run["dtype"],
        "device": results.run["device"],
    }
    numbers: dict[str, Any] = {"sparsity": result.sparsity, "bits_per_weight": result.bits_per_weight}
    if mean := results.mean_retained(result.name):
        numbers |= {"mean_retained": mean[0], "mean_retained_low": mean[1].low, "mean_retained_high": mean[1].high}
    for suite in results.suites:
        for (metric, group), found in results.get(result.name, suite).estimates.items():
            if group == OVERALL:
                at = f"{suite}/{metric}"
                numbers |= {at: found.score, f"{at}_low": found.interval.low, f"{at}_high": found.interval.high}
    return what, {name: float(v) for name, v in numbers.items() if isinstance(v, int | float) and math.isfinite(v)}


def _mlflow(results: Results) -> int:
    mlflow = import_extra("mlflow", "mlflow", "--log-to mlflow")
    mlflow.set_experiment(f"kick {results.run['model']['name']}")
    for result in results.settings:
        what, numbers = _facts(results, result)
        with mlflow.start_run(run_name=result.name):
            mlflow.log_params(what)
            mlflow.log_metrics({re.sub(r"[^\w\-./ :]", "_", name): value for name, value in numbers.items()})
            for path in (results.path / "report.html", results.path / "scores.csv"):
                if path.is_file():
                    mlflow.log_artifact(str(path))
    return len(results.settings)


def _wandb(results: Results) -> int:
    wandb = import_extra("wandb", "wandb", "--log-to wandb")
    project = re.sub(r"[/\\#?%:]", "-", f"kick-{results.run['model']['name']}")
    for result in results.settings:
        what, numbers = _facts(results, result)
        with wandb.init(project=project, name=result.name, config=what, group=results.path.name) as tracked:
            tracked.summary.update(numbers)
    return len(results.settings)


TRACKERS: dict[str, Callable[[Results], int]] = {"mlflow": _mlflow, "wandb": _wandb}
