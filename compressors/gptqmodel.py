"""GPTQModel's own GPTQ, in an interpreter that has the library.

    {compressor: gptqmodel, levels: [4], params: {python: /opt/gptqmodel/bin/python, group_size: 128}}

https://github.com/ModelCloud/GPTQModel
"""

from kick.compressor import Knob
from kick.errors import LevelError
from kick.levels import Bits, Level

from .own_interpreter import OwnInterpreter

_WIDTHS = (2, 3, 4, 8)


class GPTQModel(OwnInterpreter):
    name = "gptqmodel"
    library = "gptqmodel"
    knob = Knob.BITS

    def job(self, level: Level) -> str:
        if not isinstance(level, Bits) or level.width not in _WIDTHS:
            raise LevelError(f"level '{level}' is not one that GPTQModel packs.", "Expected 2, 3, 4 or 8 bits.")
        return "gptq"
