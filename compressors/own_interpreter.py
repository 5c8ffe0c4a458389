"""Compressors of other libraries, run in an interpreter of their own: only directories and JSON cross.

Their requirements contradict each other's and kick's, so each needs an environment of its own, named by the parameter
`python`. The model and the calibration tokens are written to a scratch directory; a script in `workers/` compresses
there; what it wrote is read back as any checkpoint that was made elsewhere.
"""

import json
import subprocess
import tempfile
from functools import cached_property
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from safetensors.torch import save_file
from torch import nn

from kick import interpreter
from kick.adapters import attached
from kick.blocks import find_decoder
from kick.calibration import Calibration
from kick.compressor import Compressor, Progress, no_progress
from kick.errors import KickError
from kick.levels import Bits, Level

from .formats import files, quantized
from .formats.build import adopt, build

_OTHER = "Take another version of it, or one of kick's own methods."
_LAST_LINES = 6


class OwnInterpreter(Compressor):
    """A library as a compressor. A subclass names the library's distribution and the script that calls it."""

    library: ClassVar[str]
    needs_calibration = True

    class Params(Compressor.Params):
        python: str = Field(description="the interpreter that has the library")
        group_size: int = Field(default=128, description="columns with one scale; -1: the whole row")
        symmetric: bool = Field(default=True, description="zero is the middle code")
        act_order: bool = Field(default=False, description="round the columns that matter most first")
        damping: float = Field(default=0.01, gt=0, description="added to the Hessian's diagonal, a share of its mean")
        batch: int = Field(default=1, ge=1, description="calibration rows in one forward pass")

    def job(self, level: Level) -> str:
        """The library's name for what `level` asks of it. Raises LevelError if it can't."""
        raise NotImplementedError

    def check_level(self, level: Level) -> None:
        self.job(level)

    @cached_property
    def _version(self) -> str:
        """The library's, in its own interpreter."""
        return interpreter.version_in(self.params.python, [self.library], self.name)

    def inputs(self) -> dict[str, str]:
        return {self.library: self._version}

    def compress(
        self,
        model: Any,
        level: Level | None,
        calibration: Calibration | None,
        *,
        progress: Progress = no_progress,
    ) -> nn.Module:
        assert level is not None
        assert calibration is not None
        if attached(model):
            raise KickError(f"{self.library} cannot be given a model with adapters.", "Quantise it by kick's own.")
        progress(0, 1, f"{self.library} {self._version}")
        with tempfile.TemporaryDirectory(prefix="kick-") as scratch:
            here = Path(scratch)
            model.save_pretrained(here / "dense")
            self.tokenizer.save_pretrained(here / "dense")
            save_file({"tokens": calibration.tokens}, here / "tokens.safetensors")
            job = {
                **self.params.model_dump(),
                "model": str(here / "dense"),
                "tokens": str(here / "tokens.safetensors"),
                "out": str(here / "out"),
                "method": self.job(level),
                "level": str(level),
                "dtype": str(model.dtype).removeprefix("torch."),
            }
            (here / "job.json").write_text(json.dumps(job), encoding="utf-8")
            self.facts = {"library": self.library, **self._run(here)}
            foreign = files.read(here / "out", allow_pickle=False)
            quantized.unpack_all(foreign)
            made = build(foreign, job["dtype"])
        adopt(self, foreign, made)
        if isinstance(level, Bits):
            self._check_bits(level, foreign.code_bits, len(find_decoder(made).linears))
        for note in foreign.notes:
            self.warn(note)
        return made.to(model.device)

    def _run(self, here: Path) -> dict[str, Any]:
        script = package_files("kick_compressors").joinpath(f"workers/run_{self.name}.py")
        environment = interpreter.quiet_environment()
        command = [str(interpreter.absolute(self.params.python)), str(script), str(here / "job.json")]
        with open(here / "log", "w", encoding="utf-8") as log:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=here, check=False)
        if done.returncode or not (here / "out" / "result.json").is_file():
            lines = (here / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise KickError(
                f"{self.library} {self._version} failed (exit {done.returncode}).", "\n".join(lines[-_LAST_LINES:])
            )
        return json.loads((here / "out" / "result.json").read_text(encoding="utf-8"))

    def _check_bits(self, level: Bits, found: dict[str, int], linears: int) -> None:
        """The library must have done what it was asked for: some fall back to leaving layers as they are."""
        if set(found.values()) - {level.width}:
            raise KickError(
                f"{self.library} was asked for {level} bits and gave {sorted(set(found.values()))}.", _OTHER
            )
        if len(found) < linears:
            raise KickError(f"{self.library} quantised {len(found)} of {linears} linears and left the rest.", _OTHER)
