"""The privacy loss in nnU-Net's progress.png."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def append_epsilon(path: Path, epsilons: Sequence[float]) -> None:
    """Draw epsilon after every epoch below what nnU-Net has plotted.

    Args:
        path: nnU-Net's ``progress.png``; nothing is done if it does not exist.
        epsilons: of every epoch.
    """
    if not path.is_file() or not epsilons:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    with Image.open(path) as file:
        above = file.convert("RGB")
    figure = Figure(figsize=(above.width / 100, above.width / 200), dpi=100)
    axes = figure.subplots()
    axes.plot(range(len(epsilons)), epsilons, linewidth=4, color="black")
    axes.set_xlabel("epoch", fontsize=28)
    axes.set_ylabel("epsilon", fontsize=28)
    axes.tick_params(labelsize=22)
    axes.set_ylim(bottom=0)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    below = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    both = Image.new("RGB", (above.width, above.height + below.height))
    both.paste(above, (0, 0))
    both.paste(below, (0, above.height))
    both.save(path, compress_level=1)
