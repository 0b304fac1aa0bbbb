"""What an evaluation leaves: tables in markdown, CSV and LaTeX, a plot, a grid, one page, and the protocol again."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from ...lookahead.files.atomic import atomic
from ..contact_sheet import Cell, contact_sheet
from ..stats import Interval
from .figures import ArmFigures, Figures, figures
from .measures import HIGHER, LOWER
from .plot import Point, plot
from .run import Arm, EvaluationRun
from .scenes import PictureJob

SHOWN = 3  # people in the grid
SCORES = "scores.csv"
FEWEST = 10  # people, of whom an interval of 95 % covers as often
_TEMPLATE = Path(__file__).with_name("report.html.jinja")
ARROWS = {HIGHER: "\u2191", LOWER: "\u2193"}  # arrows up and down


def write(run: EvaluationRun) -> Path:
    """Reckon and write everything into the run's folder; returns the page."""
    found = figures(run)
    sheet = grid(run, found)
    drawing = chart(run, found)
    texts = {
        "table.md": markdown(run, found),
        "table.csv": as_csv(found),
        "table.tex": latex(found),
        SCORES: scores(run),
        "plot.svg": drawing,
        "figures.json": json.dumps(as_values(found), indent=1, ensure_ascii=False) + "\n",
        "protocol.yaml": protocol_text(run),
        "report.html": page(run, found, drawing, sheet),
    }
    for name, text in texts.items():
        with atomic(run.folder / name) as part:
            part.write_text(text, encoding="utf-8")
    with atomic(run.folder / "grid.jpg") as part:
        sheet.save(part, "JPEG", quality=85)
    return run.folder / "report.html"


def number(interval: Interval | None, gain: bool = False) -> str:
    """Shows a figure with its interval, or a dash for none."""
    if interval is None or np.isnan(interval.value):
        return "–"
    sign = "+" if gain else ""
    if not np.isfinite([interval.low, interval.high]).all():
        return f"{interval.value:{sign}.3f}"
    return f"{interval.value:{sign}.3f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"


def seconds(arm: ArmFigures) -> str:
    """Shows the median time of a picture."""
    return "–" if arm.seconds is None else f"{arm.seconds:.2f}"


def memory(arm: ArmFigures) -> str:
    """Shows the median peak of memory in GB."""
    return "–" if arm.memory is None else f"{arm.memory / 1e9:.2f}"


def heads(found: Figures) -> list[str]:
    """The heads of the main table, with an arrow where more or less is better."""
    return [f"{m.title} {ARROWS.get(m.better, '')}".strip() for m in found.measures.values()]


def tables(run: EvaluationRun, found: Figures) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, heads and rows of each table, as text."""
    out = []
    names = list(found.measures)
    rows = [[arm.title, *(number(arm.means[m]) for m in names), seconds(arm), memory(arm)] for arm in found.arms]
    out.append(("Means over people", ["method", *heads(found), "seconds a picture", "peak memory, GB"], rows))
    gains = [[arm.title, *(number(arm.gains[m], True) for m in names)] for arm in found.arms if arm.gains]
    if gains:
        out.append((f"Gains over {found.baseline}, person by person", ["method", *heads(found)], gains))
    equal = [[a.title, number(a.equal), number(a.equal_gain, True)] for a in found.arms if a.equal]
    if equal:
        plotted = found.measures[run.protocol.plot.y].title
        out.append((f"At the prompt score of {found.baseline}", ["method's curve", plotted, "gain over it"], equal))
    over = [[a.title, number(a.over_curve, True)] for a in found.arms if a.over_curve]
    if over:
        plotted = found.measures[run.protocol.plot.y].title
        name = run.protocol.baseline or next(iter(run.methods))
        curve = run.methods[name].title or name
        out.append((f"Over the curve of {curve}, at each one's own prompt score", ["method", plotted], over))
    if found.apart:
        one, other = run.protocol.backends[:2]
        apart = [[title, *(number(by[m], True) for m in names)] for title, by in found.apart.items()]
        out.append((f"{one} less {other}, person by person", ["method", *heads(found)], apart))
    plotted_names = [n for n in (run.protocol.plot.y, run.protocol.plot.x) if n in found.measures]
    kinds = list(next(iter(found.arms)).kinds.get(plotted_names[0], ())) if plotted_names and found.arms else []
    if kinds:
        by_kind = [[a.title, *(number(a.kinds[m][k]) for m in plotted_names for k in kinds)] for a in found.arms]
        columns = [f"{found.measures[m].title}: {k}" for m in plotted_names for k in kinds]
        out.append(("By kind of prompt", ["method", *columns], by_kind))
    return out


def notes(run: EvaluationRun) -> list[str]:
    """Lists what a reader has to know of the figures."""
    of_both = set(run.protocol.backends)
    left = [n for n, m in run.methods.items() if of_both - {b for b in of_both if (n, m.weights[0]) in run.arms(b)}]
    backends = Counter(line["backend"] for line in run.lines())
    lines = [
        f"People: {len(run.people)}, prompts: {len(run.prompts)}, seeds: {len(run.protocol.seeds)}, pictures an arm: "
        f"{len(run.jobs())}. Every person has noise of their own, the same for all methods.",
        "Intervals are of 95 %, by drawing people (bootstrap); gains are of the same person, prompt and noise.",
        "A picture without a face counts 0 for identity; faces found stands beside it.",
        f"Drawn by {', '.join(f'{name} ({count} pictures)' for name, count in backends.items())}. Times are medians on "
        "the machine that drew, with models loaded.",
        "Peak memory is that of the process that drew, with all that it had loaded by then; of diffusers on a GPU that "
        "of the GPU.",
    ]
    lines += [f"{name}: {count} pictures." for name, count in run.counts().items()]
    if left and len(of_both) > 1:
        lines.append(f"Drawn by one back end alone, since the other cannot: {', '.join(left)}.")
    return [*warnings(run), *lines]


def warnings(run: EvaluationRun) -> list[str]:
    """Lists what is wrong with an evaluation, a sentence each."""
    few = [f"{len(run.people)} people are too few for intervals to be trusted: draw at least {FEWEST}."]
    return [*run.warnings, *(few if len(run.people) < FEWEST else [])]


def markdown(run: EvaluationRun, found: Figures) -> str:
    """The tables as markdown."""
    parts = [f"# {run.protocol.title}", "", *(f"- {line}" for line in notes(run)), ""]
    for title, columns, rows in tables(run, found):
        parts += [f"## {title}", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        parts += [f"| {' | '.join(row)} |" for row in rows] + [""]
    return "\n".join(parts)


def as_csv(found: Figures) -> str:
    """A line an arm and measure: mean, interval, gain and its interval."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    fields = ("value", "low", "high")
    gains = [f"gain_{field}" for field in fields]
    rows.writerow(["method", "weight", "backend", "measure", "judge", *fields, *gains, "seconds", "memory"])
    for a in found.arms:
        about = [a.arm.method, a.arm.weight, a.arm.backend]
        for name, measure in found.measures.items():
            gain = a.gains.get(name, ("", "", ""))
            rows.writerow([*about, name, measure.title, *a.means[name], *gain, a.seconds, a.memory])
    return out.getvalue()


def scores(run: EvaluationRun) -> str:
    """A line a picture: what it is of, its file, and what every measure says of it."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    about = ["method", "weight", "backend", "person", "kind", "prompt", "seed", "picture", "reference", "seconds"]
    rows.writerow([*about, *(f"{name}: {measure.title}" for name, measure in run.measures.items())])
    for arm in run.all_arms():
        values = {name: run.values(arm, measure) for name, measure in run.measures.items()}
        for number, person in enumerate(run.people):
            for place, job in enumerate(run.jobs([person])):
                path, judged = _picture(run, arm, job), [values[name][number][place] for name in values]
                of = [
                    arm.method,
                    f"{arm.weight:g}",
                    arm.backend,
                    person.name,
                    job.prompt.kind,
                    job.prompt.text,
                    job.seed,
                ]
                files = [p.relative_to(run.folder).as_posix() for p in (path, person.reference)]
                rows.writerow([*of, *files, run.store.drawn[path.stem]["seconds"], *judged])
    return out.getvalue()


def latex(found: Figures) -> str:
    """The means as a LaTeX tabular (booktabs)."""

    def safe(text: str) -> str:
        for plain, escaped in (("\\", r"\textbackslash{}"), ("&", r"\&"), ("%", r"\%"), ("_", r"\_"), ("#", r"\#")):
            text = text.replace(plain, escaped)
        return text.replace(ARROWS[HIGHER], r"$\uparrow$").replace(ARROWS[LOWER], r"$\downarrow$")

    def cell(interval: Interval) -> str:
        if np.isnan(interval.value):
            return "--"
        half = (interval.high - interval.low) / 2
        return f"{interval.value:.3f}" + (f" $\\pm$ {half:.3f}" if np.isfinite(half) else "")

    lines = [r"\begin{tabular}{l" + "c" * (len(found.measures) + 2) + "}", r"\toprule"]
    lines += [" & ".join(map(safe, ["method", *heads(found), "seconds", "GB"])) + r" \\", r"\midrule"]
    for a in found.arms:
        cells = [safe(a.title), *(cell(a.means[m]) for m in found.measures), seconds(a), memory(a)]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def as_values(found: Figures) -> dict[str, Any]:
    """All figures as plain values; an interval is a list: value, low, high."""

    def plain(by: Mapping[str, Interval]) -> dict[str, list[float | None]]:
        return {k: [round(x, 6) if np.isfinite(x) else None for x in v] for k, v in by.items()}

    arms = [
        {
            "title": a.title,
            "method": a.arm.method,
            "weight": a.arm.weight,
            "backend": a.arm.backend,
            "means": plain(a.means),
            "gains": plain(a.gains),
            "kinds": {m: plain(by) for m, by in a.kinds.items()},
            "seconds": a.seconds,
            "memory": a.memory,
            "at equal prompt": plain({k: v for k, v in (("value", a.equal), ("gain", a.equal_gain)) if v}),
            "over the baseline's curve": plain({"gain": a.over_curve} if a.over_curve else {}),
        }
        for a in found.arms
    ]
    return {
        "baseline": found.baseline,
        "measures": {name: m.title for name, m in found.measures.items()},
        "arms": arms,
        "back ends apart": {title: plain(by) for title, by in found.apart.items()},
    }


def chart(run: EvaluationRun, found: Figures) -> str:
    """The plot of identity against prompt; an empty string where one of the two is not measured."""
    x, y = run.protocol.plot.x, run.protocol.plot.y
    if x not in found.measures or y not in found.measures:
        return ""
    curves: dict[tuple[str, str], tuple[str, list[Point]]] = {}  # of a method and back end; titles may be alike
    for a in sorted(found.arms, key=lambda a: (a.arm.backend, a.arm.weight)):
        method = run.methods[a.arm.method]
        name = method.title or a.arm.method
        name += f" ({a.arm.backend})" if len(run.protocol.backends) > 1 else ""
        label = f"{a.arm.weight:g}" if len(method.weights) > 1 else ""
        _, points = curves.setdefault((a.arm.method, a.arm.backend), (name, []))
        points.append(Point(a.means[x], a.means[y], label))
    return plot(list(curves.values()), found.measures[x].title, found.measures[y].title)


def grid(run: EvaluationRun, found: Figures, most: int = 6) -> Image.Image:
    """A row an arm and person, the reference and what was drawn of it; at most so many prompts."""
    prompts, seed = run.prompts[:most], run.protocol.seeds[0]
    rows = []
    for person in run.people[:SHOWN]:
        for a in found.arms:
            cells = [Cell(_open(person.reference), a.title)]
            for prompt in prompts:
                cells.append(Cell(_open(_picture(run, a.arm, PictureJob(person, prompt, seed)))))
            rows.append(cells)
    return contact_sheet(["reference", *(p.text for p in prompts)], rows, run.protocol.title, 144)


def _picture(run: EvaluationRun, arm: Arm, job: PictureJob) -> Path:
    return run.store.picture(run.key(arm.method, job, arm.weight, arm.backend))


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def page(run: EvaluationRun, found: Figures, drawing: str, sheet: Image.Image) -> str:
    """One page that needs no other file."""
    file = io.BytesIO()
    sheet.save(file, "JPEG", quality=80)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=run.protocol.title,
        notes=notes(run),
        warnings=len(warnings(run)),
        tables=tables(run, found),
        plot=Markup(drawing),
        grid="data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode(),
        protocol=protocol_text(run, shared=True),
    )


def protocol_text(run: EvaluationRun, shared: bool = False) -> str:
    """The protocol as YAML, with all that was left to defaults, so that anyone can run it again.

    shared: for others, without the folder that it was written into.
    """
    values = run.protocol.model_dump(mode="json", exclude_none=True, exclude={"out"} if shared else None)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)
    return f"# lookahead evaluate protocol.yaml\n{text}"
