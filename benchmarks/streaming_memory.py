"""How much memory does a streamed compression need, and does it depend on the depth?

    python benchmarks/streaming_memory.py [--layers 12 24] [--setting wanda@0.5] [--samples 4] [--length 256]

Writes random Llama models in float16 (hidden 2048, intermediate 5504, 16 heads; 24 layers are about 1.3 B parameters),
compresses each with `stream` in a process of its own, and prints seconds and peak resident memory. The models and
results go to --work (about 3 GB each) and are removed again.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kick.streaming import INDEX


def write_model(path: Path, layers: int) -> int:
    """A random model, written layer by layer so that this process stays small. Returns its parameters."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=False,
        dtype="float16",
    )
    path.mkdir(parents=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(path)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    files: dict[str, dict[str, torch.Tensor]] = {}
    weight_map = {}
    for name, shape in shapes.items():
        part = name.split(".")[2] if ".layers." in name else "rest"
        weight_map[name] = f"model-{part}.safetensors"
        norm = len(shape) == 1
        tensor = torch.ones(shape) if norm else torch.randn(shape, generator=generator).mul_(0.02)
        files.setdefault(weight_map[name], {})[name] = tensor.half()
        if part != "rest" and len(files[weight_map[name]]) == 9:
            save_file(files.pop(weight_map[name]), path / weight_map[name], {"format": "pt"})
    for file, tensors in files.items():
        save_file(tensors, path / file, {"format": "pt"})
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(32000)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1").save_pretrained(path)
    return sum(shape.numel() for shape in shapes.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24])
    parser.add_argument("--setting", default="wanda@0.5")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--work", type=Path, default=Path("runs/streaming-memory"))
    options = parser.parse_args()
    text = options.work / "text.txt"
    options.work.mkdir(parents=True, exist_ok=True)
    words = torch.randint(2, 32000, (2 * options.samples * options.length,), generator=torch.Generator().manual_seed(1))
    text.write_text(" ".join(f"w{index}" for index in words.tolist()) + "\n")
    peaks = []
    for layers in options.layers:
        source, out = options.work / f"model-{layers}", options.work / f"out-{layers}"
        for path in (source, out):
            shutil.rmtree(path, ignore_errors=True)
        parameters = write_model(source, layers)
        calibration = {"source": text, "samples": options.samples, "sequence_length": options.length}
        given = [part for key, value in calibration.items() for part in ("--param", f"calibration.{key}={value}")]
        command = [
            "compress",
            str(source),
            options.setting,
            "--out",
            str(out),
            "--stream",
            "--dtype",
            "float16",
            "--json",
        ]
        done = subprocess.run(
            [sys.executable, "-m", "kick.cli", *command, *given], stdout=subprocess.PIPE, text=True, check=True
        )
        record = json.loads(done.stdout)
        peaks.append(record["peak_memory_bytes"])
        print(
            f"{layers} layers, {parameters / 1e9:.2f} B parameters: {record['seconds']:.0f} s, "
            f"peak {peaks[-1] / 1e9:.2f} GB resident, sparsity {record['sparsity']:.4f}",
            flush=True,
        )
        for path in (source, out):
            shutil.rmtree(path)
    print(f"peaks differ by {max(peaks) / min(peaks) - 1:.1%}")


if __name__ == "__main__":
    main()
