"""Libraries that kick works without: imported when asked for, with a word on how to install what is missing."""

from importlib import import_module
from typing import Any

from kick.errors import ConfigError


def import_extra(module: str, extra: str, user: str) -> Any:
    """The module of the optional dependency `extra`. Raises ConfigError on behalf of `user` if it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{user} needs {module}, which is not installed.", f"pip install 'llm-kick[{extra}]'"
        ) from error
