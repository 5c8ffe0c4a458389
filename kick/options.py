"""What `--param K=V` and its kin say: whose parameters they are, and their values."""

from argparse import Namespace
from collections.abc import Iterable, Sequence
from typing import Any

from kick import plugins, sweep_file
from kick.calibration import CalibrationSpec
from kick.errors import ConfigError
from kick.judge.spec import JudgeSpec
from kick.spec import validated


def key_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--param {text} has no '='.", "For example --param shots=5.")
    return key, sweep_file.read_yaml(value, f"--param {key}")


def lm_params(given: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """Parameters of the LM (`lm.python=PATH`), and the rest as given."""
    params: dict[str, Any] = {}
    rest = []
    for text in given:
        if text.startswith("lm."):
            key, value = key_value(text)
            _, _, name = key.partition(".")
            owner, dot, inner = name.partition(".")  # lm.models.dense=NAME
            if dot:
                _put(params, (owner, inner), value, f"--param {key}")
            else:
                params[name] = value
        else:
            rest.append(text)
    return params, rest


def compress_params(given: Iterable[str], compressors: list[str]) -> tuple[dict[str, dict[str, Any]], CalibrationSpec]:
    """Parameters of each compressor (`gptq.group_size=64`, or plain where there is one), and of the calibration."""
    own: dict[str, dict[str, Any]] = {name: {} for name in compressors}
    calibration: dict[str, Any] = {}
    for key, value in map(key_value, given):
        owner, _, name = key.partition(".")
        if name and owner == "calibration":
            calibration[name] = value
        elif name and owner in own:
            _put(own[owner], name.split("."), value, f"--param {key}")
        elif len(own) == 1:
            _put(own[compressors[0]], key.split("."), value, f"--param {key}")
        else:
            raise ConfigError(
                f"--param {key}: whose parameter is it?", f"Put a name in front: {', '.join(own)} or calibration."
            )
    return own, validated(CalibrationSpec, calibration, "--param calibration")


def _put(params: dict[str, Any], names: Sequence[str], value: Any, given: str) -> None:
    """Set a parameter that may be a part of others: `pruning`, `steps`."""
    *parents, last = names
    for part in parents:
        params = params.setdefault(part, {})
        if not isinstance(params, dict):
            raise ConfigError(f"{given}: '{part}' was given a value before.", "Give it whole, or in parts.")
    params[last] = value


def split_params(given: Iterable[str], suites: Iterable[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Parameters without a suite's name in front, and those of one suite (`mmlu.shots=5`)."""
    shared: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {}
    for key, value in map(key_value, given):
        suite, dot, name = key.partition(".")
        if dot and suite in suites:
            own.setdefault(suite, {})[name] = value
        elif dot:
            raise ConfigError(f"--param {key}: no suite '{suite}' is asked.", "Asked are: " + ", ".join(suites) + ".")
        else:
            shared[key] = value
    return shared, own


def accepted(suites: list[str], params: dict[str, Any]) -> list[dict[str, Any]]:
    """A parameter goes to every suite that knows it; one that no suite knows goes to the first, which refuses it."""
    known = [plugins.suite_of(name)[0].Params.model_fields for name in suites]
    nobodys = {key for key in params if not any(key in fields for fields in known)}
    return [
        {key: value for key, value in params.items() if key in fields or (index == 0 and key in nobodys)}
        for index, fields in enumerate(known)
    ]


def judge_spec(options: Namespace) -> JudgeSpec:
    """What `kick judge` was told of the judge."""
    given: dict[str, Any] = {"model": options.judge}
    suites: dict[str, dict[str, Any]] = {}
    for text in options.param:
        key, value = key_value(text)
        owner, dot, name = key.rpartition(".")
        if owner == "query":
            value = text.partition("=")[2]  # a date is no date in a URL
        if dot and owner != "query":
            suites.setdefault(owner, {})[name] = value
        elif dot:
            given.setdefault("query", {})[name] = value
        else:
            given[key] = value
    if options.base_url:
        given["base_url"] = options.base_url
    if options.budget is not None:
        given["budget_usd"] = options.budget
    if options.price:
        try:
            given["price_in"], given["price_out"] = map(float, options.price.split(","))
        except ValueError as error:
            raise ConfigError(f"--price {options.price} is not two numbers.", "For example --price 2.5,10.") from error
    return validated(JudgeSpec, {**given, "suites": suites}, "the judge's options")
