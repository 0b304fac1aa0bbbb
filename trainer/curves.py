"""The curves of training runs, from their log.jsonl, as one picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..lookahead.files.atomic import atomic, first_line
from .checkpoints import TrainingError
from .log import lines

Points = list[tuple[int, float]]
WINDOW = 20  # a mean is over this share of a run


def read(folder: Path) -> dict[str, Points]:
    """Figures of a run by name, each (step, value) in turn, without those that are no number.

    Raises TrainingError, one sentence, where there is no log, or it holds something else.
    """
    path = folder / "log.jsonl"
    found: dict[str, Points] = {}
    try:
        for figures in lines(path):
            step = figures.pop("step")
            for name, value in (figures | figures.pop("validation", {})).items():
                if isinstance(value, int | float) and math.isfinite(value):
                    found.setdefault(name, []).append((step, value))
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(
            f"{path} cannot be read ({first_line(error)}): name the folder `out` of a run that has begun."
        ) from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise TrainingError(f"{path} is not the log of a run: name the folder `out` of one.") from None
    return found


def smooth(points: Points) -> Points:
    """A running mean; a single step's loss says little, since time steps and pictures differ."""
    width = max(1, len(points) // WINDOW)
    means = []
    for i in range(width - 1, len(points)):
        some = points[i - width + 1 : i + 1]
        means.append((some[-1][0], sum(value for _, value in some) / width))
    return means


def plot(runs: Mapping[str, Mapping[str, Points]], panels: Mapping[str, str], path: Path) -> None:
    """Plot one panel a figure that any run has, one colour a run: values pale, their running mean strong. As PNG."""
    from matplotlib.figure import Figure

    shown = [name for name in panels if any(run.get(name) for run in runs.values())]
    columns = min(4, math.ceil(len(shown) ** 0.5))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.5 * rows + 0.4), layout="constrained", dpi=110)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    for axis, name in zip(axes, shown, strict=False):
        axis.set_title(panels[name], fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        for number, run in enumerate(runs.values()):
            if points := run.get(name):
                few = len(points) < 2 * WINDOW
                axis.plot(
                    *zip(*points, strict=True), color=f"C{number}", lw=1.4 if few else 0.5, alpha=1 if few else 0.25
                )
                if few:
                    axis.plot(*zip(*points, strict=True), ".", color=f"C{number}")
                else:
                    axis.plot(*zip(*smooth(points), strict=True), color=f"C{number}", lw=1.4)
    handles = [axes[0].plot([], [], color=f"C{number}", label=name)[0] for number, name in enumerate(runs)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(runs)), fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as part:
        figure.savefig(part, format="png")


def curves(folders: Sequence[Path], panels: Mapping[str, str], out: Path) -> Path:
    """Plot the runs in these folders into `out`. panels: by figure of a log's line, its title, in the order of the
    picture (a recipe's `PANELS`). Raises TrainingError, one sentence."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = {name: read(folder) for name, folder in zip(names, folders, strict=True)}
    if not any(run.get(name) for run in runs.values() for name in panels):
        raise TrainingError("These logs hold no figures yet: the first come after `log_every` steps.")
    plot(runs, panels, out)
    return out
