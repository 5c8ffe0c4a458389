"""What the checkpoint keeps of a training run: its history, and the figure of it that the report draws too."""

import shutil
from pathlib import Path

from kick import distributed
from kick.checkpoint import HISTORY

from .history import History


def keep(history: History, folder: Path) -> None:
    """Put history.jsonl, training.svg and training.png into `folder`. The first process does it."""
    if distributed.is_main():
        from matplotlib import pyplot as plt

        from kick.report.figures.style import in_style
        from kick.report.figures.training import draw

        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(history.path, folder / HISTORY)
        with in_style():
            figure = draw(history.rows)
            figure.savefig(folder / "training.svg", metadata={"Date": None, "Creator": "kick"})
            figure.savefig(folder / "training.png", metadata={"Software": "kick"})
            plt.close(figure)
    distributed.wait()
