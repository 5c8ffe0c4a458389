"""Python interpreters other than this one, for libraries whose pinned versions cannot live beside kick's own."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from kick.errors import ConfigError


def absolute(python: str) -> Path:
    """Absolute, since it may be called from another directory; not resolved, since a venv's is a link."""
    return Path(python).expanduser().absolute()


def version_in(python: str, distributions: Sequence[str], user: str) -> str:
    """The version of the first of `distributions` that is installed, without importing it. Raises ConfigError.

    user: on whose behalf, for the error.
    """
    hint = f"Make an environment with {distributions[0]} and give its interpreter as the parameter python."
    if not absolute(python).is_file():
        raise ConfigError(f"{user}: no interpreter {python}.", hint)
    try:
        command = [str(absolute(python)), "-c", _VERSION_OF, *distributions]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigError(f"{user}: {python} cannot be run: {error.strerror}.", hint) from error
    if done.returncode:
        raise ConfigError(f"{user}: {python} has no {distributions[0]}.", hint)
    return done.stdout.strip()


_VERSION_OF = """
import importlib.metadata, sys
for name in sys.argv[1:]:
    try:
        print(importlib.metadata.version(name))
        break
    except importlib.metadata.PackageNotFoundError:
        pass
else:
    sys.exit(1)
"""


def quiet_environment() -> dict[str, str]:
    """This process's environment without what would reach into another interpreter, and offline."""
    environment = {**os.environ, "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    environment.pop("PYTHONPATH", None)
    return environment
