"""llm-compressor's own SparseGPT, Wanda, GPTQ, AWQ and rounding, in an interpreter that has the library.

    {compressor: llmcompressor, levels: [0.5, "2:4"], params: {python: /opt/llmc/bin/python, method: wanda}}

https://github.com/vllm-project/llm-compressor
"""

from typing import Literal

from kick.compressor import Knob
from kick.errors import LevelError
from kick.levels import Bits, Level

from .own_interpreter import OwnInterpreter

_PRUNERS = ("sparsegpt", "wanda")


class LLMCompressor(OwnInterpreter):
    name = "llmcompressor"
    library = "llmcompressor"
    knob = Knob.SPARSITY | Knob.PATTERN | Knob.BITS

    class Params(OwnInterpreter.Params):
        method: Literal["sparsegpt", "wanda", "gptq", "awq", "rtn"] | None = None

    def job(self, level: Level) -> str:
        asked = self.params.method
        if asked is None:
            return "gptq" if isinstance(level, Bits) else "sparsegpt"
        if (asked in _PRUNERS) == isinstance(level, Bits):
            raise LevelError(f"level '{level}' with method {asked}.", "Pruners take 0.5 or 2:4, quantisers 4 or 8.")
        return asked
