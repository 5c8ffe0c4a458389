"""From a sweep file, YAML, to a SweepConfig. A mistake is said with its key, what was given, and what is allowed."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from kick.config import SweepConfig, grid_of, suite_of
from kick.errors import ConfigError, did_you_mean, on_one_line
from kick.spec import Spec


class _Loader(yaml.SafeLoader):
    """YAML's safe loader without base-60 numbers (`2:4` is a pattern, not 124) that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' stands twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_OURS = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag not in _OURS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))  # 010 is ten, not eight


def read_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise ConfigError(f"{where} is nested too deeply.", "A sweep file needs a handful of levels.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where} is not YAML: {on_one_line(error)}", "Correct that line.") from error


def load(path: Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """The sweep file at `path` with `KEY=VALUE` overrides (dotted keys; values are YAML). Raises ConfigError."""
    if not path.is_file():
        raise ConfigError(f"no sweep file {path}.", "Expected a YAML file; configs/ holds some to start from.")
    try:
        content = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text.", "Save it as UTF-8.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a mapping.", "Expected keys such as model, settings and suites.")
    if odd := [key for key in content if not isinstance(key, str)]:
        raise ConfigError(
            f"{path}: the key {odd[0]!r} is no word.", "Expected keys such as model, settings and suites."
        )
    for override in overrides:
        _override(content, override)
    return parse(content, str(path))


def parse(content: dict[str, Any], where: str) -> SweepConfig:
    try:
        return SweepConfig(**content)
    except ValidationError as error:
        raise ConfigError(*_explain(error, content, where)) from error


def schema() -> dict[str, Any]:
    """The JSON schema of a sweep file, for editors: what `load` takes, short forms included."""
    found = SweepConfig.model_json_schema()
    short = {"type": "string"}
    for key, what in (("settings", "compressor@level, or a chain with >"), ("suites", "a suite's name")):
        items = found["properties"][key]["items"]
        found["properties"][key]["items"] = {"anyOf": [{**short, "description": what}, items]}
    grid = found["$defs"]["Grid"]["properties"]
    grid["then"]["items"] = {"anyOf": [short, grid["then"]["items"]]}
    level: dict[str, Any] = {"anyOf": [short, {"type": "number"}]}
    levels = grid["levels"]
    levels.pop("type", None)
    levels.pop("items", None)
    levels["anyOf"] = [short, {"type": "array", "items": level}]
    found["$defs"]["LayerRule"]["properties"]["level"] = {**level, "default": None}
    found["$defs"]["Stage"]["properties"]["level"] = {**level, "default": ""}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A sweep file of kick", **found}


def _explain(error: ValidationError, content: dict[str, Any], where: str) -> tuple[str, str]:
    """The first fault of a sweep file: which key, what was given, what is allowed there."""
    faults: dict[tuple[Any, ...], list[Any]] = {}
    for fault in error.errors():  # a key that may be several things has one for each
        faults.setdefault(_place(fault["loc"], content), []).append(fault)
    place, found = next(iter(faults.items()))
    if found[0]["type"] == "missing":  # rather the key that may be it, misspelt
        beside = ((p, f) for p, f in faults.items() if p[:-1] == place[:-1] and f[0]["type"] == "extra_forbidden")
        place, found = next(beside, (place, found))
    first = found[0]
    path = ".".join(map(str, place))
    more = f" ({len(faults) - 1} more)" if len(faults) > 1 else ""
    known = _model_at(place[:-1]).model_fields
    allowed = f"Allowed there: {', '.join(known)}."
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key '{path}'{more}.{did_you_mean(str(place[-1]), known)}", allowed
    if first["type"] == "missing":
        return f"{where}: the key '{path}' is missing{more}.", allowed
    messages = dict.fromkeys(_plainly(fault["msg"]) for fault in found)
    if not place:  # keys that do not go together
        return (
            f"{where}: {', or: '.join(messages)}{more}.",
            "docs/first-sweep.md and configs/template.yaml explain keys.",
        )
    return f"{where}: {path} is {first['input']!r}{more}.", f"{', or: '.join(messages)}."


def _plainly(message: str) -> str:
    """pydantic's words in those of YAML."""
    message = message.replace("a valid tuple", "a list, [...]").removeprefix("Value error, ")
    return re.sub(r"a valid dictionary( or instance of \w+)?", "a mapping, {...}", message)


def _place(location: tuple[Any, ...], content: Any) -> tuple[Any, ...]:
    """The keys of a fault's location: between them pydantic names the kinds that it tried."""
    place: list[Any] = []
    for number, part in enumerate(location):
        if isinstance(content, dict) and (part in content or number == len(location) - 1):
            content = content.get(part)
        elif isinstance(content, list | tuple) and isinstance(part, int) and part < len(content):
            content = content[part]
        else:
            continue
        place.append(part)
    return tuple(place)


def _model_at(place: tuple[Any, ...]) -> type[Spec]:
    """What a part of a sweep file is a description of."""
    model: type[Spec] = SweepConfig
    for part in place:
        if part in model.model_fields:
            model = next(_specs_in(model.model_fields[part].annotation), model)
    return model


def _specs_in(annotation: Any) -> Iterator[type[Spec]]:
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        yield annotation
    for part in get_args(annotation):
        yield from _specs_in(part)


_LONG_FORMS: dict[str, Callable[[str], dict[str, Any]]] = {"settings": grid_of, "suites": suite_of}


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override} has no '='.", "For example --set lm.batch_size=8.")
    *parents, last = key.split(".")
    place: Any = content
    try:
        for depth, part in enumerate(parents):
            if isinstance(place, list):
                index = int(part)
                if isinstance(place[index], str) and depth == 1:  # the short form of a setting or a suite
                    place[index] = _LONG_FORMS[parents[0]](place[index])
                place = place[index]
            else:  # a section that says nothing is one to be filled
                place[part] = {} if place.get(part) is None else place[part]
                place = place[part]
        if isinstance(place, list):
            index = int(last)
            if not 0 <= index <= len(place):  # one more may be added
                raise IndexError(index)
            place[index : index + 1] = [read_yaml(value, f"--set {key}")]
        elif isinstance(place, dict):
            place[last] = read_yaml(value, f"--set {key}")
        else:
            raise TypeError
    except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--set {key}: there is no such place in the file.", "For example --set suites.0.limit=20."
        ) from error
