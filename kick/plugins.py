"""Discovery of compressors and suites: entry points of installed packages, and single files given by `--plugin`.

A package registers its classes in its pyproject.toml:

    [project.entry-points."kick.compressors"]
    mine = "my_package.mine:Mine"

Nothing is imported before it is asked for by name.
"""

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kick.errors import ConfigError, KickError, unknown_name

if TYPE_CHECKING:
    from kick.compressor import Compressor
    from kick.suite import Suite

COMPRESSORS = "kick.compressors"
SUITES = "kick.suites"
_KIND = {COMPRESSORS: "compressor", SUITES: "suite"}


@dataclass(frozen=True)
class Plugin:
    """A class that can be loaded. `origin` and `version` enter the identity of what it produces."""

    name: str
    origin: str
    version: str
    load: Callable[[], type]


_files: list[str] = []
_from_files: dict[str, dict[str, Plugin]] = {COMPRESSORS: {}, SUITES: {}}


def available(group: str) -> dict[str, Plugin]:
    """All plugins of `group` by name, without importing any of them."""
    return _installed(group) | _from_files[group]


@cache
def _installed(group: str) -> dict[str, Plugin]:
    """Those of installed packages; what is installed does not change while a process runs."""
    found: dict[str, Plugin] = {}
    for entry in entry_points(group=group):
        origin = entry.dist.name if entry.dist else entry.value
        version = entry.dist.version if entry.dist else "unknown"
        if entry.name in found and found[entry.name].origin != origin:
            raise KickError(
                f"two packages provide a {_KIND[group]} '{entry.name}': {found[entry.name].origin} and {origin}.",
                "Uninstall one of them.",
            )
        found[entry.name] = Plugin(entry.name, origin, version, entry.load)
    return found


def find(group: str, name: str) -> Plugin:
    """The plugin called `name`. Raises UnknownNameError with the nearest names."""
    plugins = available(group)
    if name not in plugins:
        kind = _KIND[group]
        raise unknown_name(kind, name, plugins, f"`kick list {kind}s` describes them; --plugin FILE adds one.")
    return plugins[name]


def compressor(name: str) -> "type[Compressor]":
    from kick.compressor import Compressor

    return _load_checked(COMPRESSORS, name, Compressor)


def suite(name: str) -> "type[Suite]":
    from kick.suite import Suite

    return _load_checked(SUITES, name, Suite)


def suite_of(name: str) -> "tuple[type[Suite], dict[str, str]]":
    """The suite that `name` names, and the parameter that stands in the name: `lm_eval:arc_easy`."""
    plain, colon, value = name.partition(":")
    kind = suite(plain)
    if bool(colon) != bool(kind.argument):
        raise ConfigError(
            f"the suite '{name}' {'takes nothing after a colon' if colon else f'names no {kind.argument}'}.",
            f"For example {plain}:{kind.argument.upper()}." if kind.argument else f"Its name is '{plain}'.",
        )
    return kind, {kind.argument: value} if colon else {}


def _load_checked(group: str, name: str, base: type) -> Any:
    plugin = find(group, name)
    try:
        loaded = plugin.load()
    except KickError:
        raise
    except Exception as error:
        raise KickError(
            f"{_KIND[group]} '{name}' of {plugin.origin} {plugin.version} cannot be imported: {error!r}.",
            "Install what it needs, or remove that package. --debug shows where it fails.",
        ) from error
    if not (inspect.isclass(loaded) and issubclass(loaded, base)):
        raise KickError(
            f"the plugin '{name}' of {plugin.origin} is {loaded!r}, not a {base.__name__}.",
            f"Its entry point must name a subclass of {base.__module__}.{base.__name__}.",
        )
    called = getattr(loaded, "name", None)
    if called != name:
        raise KickError(
            f"the plugin '{name}' of {plugin.origin} calls itself '{called}'.",
            "The entry point and the class must have the same name.",
        )
    _check_whole(group, loaded, plugin.origin)
    return loaded


_REQUIRED = {
    COMPRESSORS: ("knob", "knob = Knob.SPARSITY"),
    SUITES: ("metrics", 'metrics = (Metric("accuracy", value="correct"),)'),
}


def _check_whole(group: str, loaded: type, origin: str) -> None:
    """Raise KickError for a class without what no base class can say for it."""
    from kick.levels import Knob
    from kick.suite import Metric

    attribute, example = _REQUIRED[group]
    if not hasattr(loaded, attribute):
        raise KickError(f"{loaded.__name__} of {origin} has no `{attribute}`.", f"For example {example}.")
    value = getattr(loaded, attribute)
    if hasattr(value, "__get__"):  # known once the parameters are
        return
    if group == COMPRESSORS:
        fits = isinstance(value, Knob)
    else:
        fits = isinstance(value, tuple | list) and all(isinstance(metric, Metric) for metric in value)
    if not fits:
        raise KickError(f"{attribute} of {loaded.__name__} in {origin} is {value!r}.", f"For example {example}.")


def load_file(path: Path) -> list[str]:
    """Register the compressors and suites that are defined in the Python file `path`; gives their names.

    Running a file is running its code: only files that the user names are loaded.
    """
    from kick.compressor import Compressor
    from kick.suite import Suite

    if not path.is_file():
        raise KickError(f"no plugin file {path}.", "--plugin takes the path of a Python file.")
    source = path.read_bytes()
    version = hashlib.sha256(source).hexdigest()[:16]
    module = _import_file(path, f"kick_plugin_{version}")
    names = []
    for value in list(vars(module).values()):
        if not inspect.isclass(value) or value.__module__ != module.__name__ or inspect.isabstract(value):
            continue
        for group, base in ((COMPRESSORS, Compressor), (SUITES, Suite)):
            if issubclass(value, base):
                _register(group, value, path, version)
                names.append(value.name)
    if not names:
        raise KickError(
            f"{path} defines no compressor and no suite.", "Subclass kick.compressor.Compressor or kick.suite.Suite."
        )
    _files.append(str(path.resolve()))
    return names


def files() -> list[str]:
    """The plugin files that were loaded, for another process to load them too."""
    return list(_files)


def _import_file(path: Path, module_name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise KickError(f"{path} is not a Python file.", "--plugin takes the path of a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise KickError(f"plugin file {path} fails: {error!r}.", "--debug shows where.") from error
    return module


def _register(group: str, loaded: type, path: Path, version: str) -> None:
    name = getattr(loaded, "name", None)
    if not isinstance(name, str) or not name:
        raise KickError(f"{loaded.__name__} in {path} has no name.", "Give the class an attribute: name = 'mine'.")
    _check_whole(group, loaded, path.name)
    taken = available(group).get(name)
    if taken is not None and taken.version != version:
        raise KickError(
            f"{path} defines a {_KIND[group]} '{name}', which {taken.origin} already provides.", "Give it another name."
        )
    _from_files[group][name] = Plugin(name, path.name, version, lambda: loaded)
