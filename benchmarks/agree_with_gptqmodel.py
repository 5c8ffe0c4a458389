"""Does GPTQModel read what `kick export --format gptq` writes, and compute the same?

    python benchmarks/agree_with_gptqmodel.py --peer PYTHON [--model MODEL] [--setting rtn@4]...

PYTHON is an interpreter that has gptqmodel. For each setting: kick compresses and exports, GPTQModel loads the export
with its torch kernels in float16, and both give logits for the same tokens (kick in float32).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kick import loading, models
from kick.calibration import CalibrationSpec
from kick.compress import Recipe, compress
from kick.export import find_format
from kick.settings import parse_setting

SETTINGS = ("rtn@4", "rtn@3", "rtn@8", "gptq@4")

PEER = """
import json, sys
import torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import load_file, save_file
path, tokens, out = sys.argv[1:]
model = GPTQModel.load(path, backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16)
with torch.no_grad():
    logits = model.model(load_file(tokens)["tokens"]).logits.float()
save_file({"logits": logits.contiguous()}, out)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="an interpreter with gptqmodel")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--setting", action="append", help="may be repeated")
    parser.add_argument("--group-size", type=int, default=64)
    options = parser.parse_args()
    source = models.find_source(options.model)
    path = models.fetch(source)
    for text in options.setting or SETTINGS:
        with tempfile.TemporaryDirectory() as scratch:
            print(text, json.dumps(compare(text, source, path, options, Path(scratch))), flush=True)


def compare(text: str, source: models.ModelSource, path: Path, options: argparse.Namespace, scratch: Path) -> dict:
    setting = parse_setting(text).model_copy(update={"params": {"group_size": options.group_size}})
    calibration = CalibrationSpec(samples=8, sequence_length=256)
    made = compress(Recipe.of(source, setting, calibration), scratch / "made")
    exported = find_format("gptq")(made, scratch / "exported", "auto")
    tokens = torch.randint(2, 40_000, (4, 64), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": tokens}, scratch / "tokens")
    (scratch / "peer.py").write_text(PEER)
    command = [options.peer, "peer.py", str(exported), str(scratch / "tokens"), str(scratch / "logits")]
    done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"GPTQModel failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    found = load_file(scratch / "logits")["logits"]
    with torch.no_grad():
        expected, half = (
            loading.load_model(made.path, dtype, "cpu")(tokens).logits.float() for dtype in ("float32", "float16")
        )
    return {
        "largest difference of a logit": float((found - expected).abs().max()),
        "of kick's own in float16": float((half - expected).abs().max()),
        "standard deviation of logits": float(expected.std()),
        "same next token": float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
    }


if __name__ == "__main__":
    main()
