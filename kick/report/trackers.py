"""A run's results in an experiment tracker: one tracked run for each setting, with the report beside it.

A tracker that cannot be reached must not cost a sweep its outcome: what it raises becomes a TrackerError.

Where they go is what the tracker's own environment says (MLFLOW_TRACKING_URI, WANDB_MODE, ...).
"""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kick.errors import TrackerError, first_line
from kick.extras import import_extra
from kick.report.results import Results, SettingResult
from kick.suite import OVERALL


def check(name: str) -> None:
    """Raise ConfigError if the tracker called `name` is not installed."""
    import_extra(name, name, f"--log-to {name}")


def log_to(name: str, results: Results, report: Path) -> int:
    """Log every setting to the tracker called `name`, with the files in the folder `report`; gives their number.

    Raises ConfigError if it is not installed, TrackerError if it cannot be used.
    """
    check(name)
    files = [path for path in (report / "report.html", report / "scores.csv") if path.is_file()]
    try:
        return _TRACKERS[name](results, files)
    except Exception as error:  # each tracker has kinds of its own: no server, not logged in, a name refused
        raise TrackerError(
            f"{name} did not take the results: {first_line(error)}",
            "They are in the run folder; kick report --log-to tries again.",
        ) from error


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


def _mlflow(results: Results, files: Sequence[Path]) -> int:
    import mlflow

    mlflow.set_experiment(f"kick {results.run['model']['name']}")
    for result in results.settings:
        what, numbers = _facts(results, result)
        with mlflow.start_run(run_name=result.name):
            mlflow.log_params(what)
            mlflow.log_metrics({re.sub(r"[^\w\-./ :]", "_", name): value for name, value in numbers.items()})
            for path in files:
                mlflow.log_artifact(str(path))
    return len(results.settings)


def _wandb(results: Results, files: Sequence[Path]) -> int:
    import wandb

    project = re.sub(r"[/\\#?%:]", "-", f"kick-{results.run['model']['name']}")
    for result in results.settings:
        what, numbers = _facts(results, result)
        with wandb.init(project=project, name=result.name, config=what, group=results.path.name) as tracked:
            tracked.summary.update(numbers)
            for path in files:
                tracked.save(path, base_path=path.parent, policy="now")
    return len(results.settings)


_TRACKERS: dict[str, Callable[[Results, Sequence[Path]], int]] = {"mlflow": _mlflow, "wandb": _wandb}
