"""The page that shows a generated data set, in one file: pictures, similarity, balance, what was left out, speed."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from ....evaluation.contact_sheet import Cell, contact_sheet
from ..shards import ShardError, Shards, read_index, shard_path, side_path
from .config import GenerateConfig
from .engine import BINS, DrawnPerson, describe

SHEET_PEOPLE = 10
TITLES = {
    "similarity": "mean cosine to the person's other pictures",
    "face_size": "height of the face, share of the picture",
    "sharpness": "mean difference of neighbouring values",
    "style": "probability of the asked style",
}


def read_sides(config: GenerateConfig) -> list[dict[str, Any]]:
    """The side files of the finished shards, in their order."""
    shards = (shard_path(Path(config.out), number) for number in range(config.shards))
    return [json.loads(side_path(s).read_text()) for s in shards if s.with_suffix(".index.json").is_file()]


def summed(sides: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts and histograms of several shards as of one."""

    def add(one: Any, other: Any) -> Any:
        if isinstance(one, Mapping):
            return {key: add(one[key], other[key]) if key in one and key in other else one.get(key, other.get(key))
                    for key in dict.fromkeys([*one, *other])}  # fmt: skip
        return [a + b for a, b in zip(one, other, strict=True)] if isinstance(one, list) else one + other

    names = ("people", "drawn", "kept", "left_out", "attributes", "histograms", "cosines")
    total: dict[str, Any] = {name: sides[0][name] for name in names}
    for side in sides[1:]:
        total = {name: add(total[name], side[name]) for name in names}
    return total


def write_report(config: GenerateConfig) -> Path:
    """Write report.html into the data set's folder. Raises ShardError where no shard is finished."""
    sides, folder = read_sides(config), Path(config.out)
    if not sides:
        raise ShardError(f"There is no finished shard in {folder} to report on: make some first.")
    shards = Shards(folder)
    pictures = [_sheet(f"Kept pictures of the first {SHEET_PEOPLE} people", shards, config, range(SHEET_PEOPLE))]
    if len(shards.keys) > 3 * SHEET_PEOPLE:
        some = np.linspace(SHEET_PEOPLE, len(shards.keys) - 1, SHEET_PEOPLE).astype(int).tolist()
        pictures.append(_sheet("Kept pictures of people from all of it", shards, config, some))
    facts = {
        "shards": f"{len(sides)} of {config.shards}",
        "disk": f"{sum(read_index(path)['bytes'] for path in shards.paths) / 1e6:.1f} MB",
        **_speed(folder, config),
    }
    return _write(folder / "report.html", config, summed(sides), sides[0], facts, pictures, [])


def write_pilot(
    config: GenerateConfig, people: Sequence[DrawnPerson], asked: Sequence[DrawnPerson], about: Mapping[str, Any]
) -> Path:
    """Write pilot.html. people: with no threshold applied; asked: the same with those of the configuration."""
    pictures = [_drawn_sheet("Pictures of the pilot; under each why the configuration leaves it out", asked, config)]
    total = describe(asked) | {"histograms": describe(people)["histograms"]}
    facts = {"pilot": f"{len(people)} people, of whom nothing is written"}
    return _write(Path(config.out) / "pilot.html", config, total, about, facts, pictures, thresholds(config, people))


def thresholds(config: GenerateConfig, people: Sequence[DrawnPerson]) -> list[dict[str, Any]]:
    """For each measure, the thresholds that keep 99 to 50 % of the pictures, and what the configuration's own keeps."""
    rows = []
    for name, title in TITLES.items():
        values = [v for person in people for p in person.pictures if (v := getattr(p.looked, name)) is not None]
        if not values:
            continue
        own = getattr(config.checks, name)
        keeps = None if own is None else float(np.mean([v >= own for v in values]))
        at = {share: float(np.quantile(values, 1 - share)) for share in (0.99, 0.95, 0.9, 0.8, 0.5)}
        rows.append({"name": f"checks.{name}", "title": title, "at": at, "own": own, "keeps": keeps})
    nearest = nearest_other(people)
    if nearest:
        own = config.checks.duplicate
        keeps = None if own is None else float(np.mean([v < own for v in nearest]))
        at = {share: float(np.quantile(nearest, share)) for share in (0.99, 0.95, 0.9, 0.8, 0.5)}
        title = "cosine of a person's mean to the nearest earlier one's (kept below it)"
        rows.append({"name": "checks.duplicate", "title": title, "at": at, "own": own, "keeps": keeps})
    return rows


def nearest_other(people: Sequence[DrawnPerson]) -> list[float]:
    """Of each person but the first, the cosine of the mean embedding to that of the nearest earlier one."""
    from .checks import mean_person

    means = [m for person in people if (m := mean_person([p.looked for p in person.pictures])) is not None]
    return [max(float(mean @ other) for other in means[:n]) for n, mean in enumerate(means) if n]


def table_of_thresholds(rows: Sequence[Mapping[str, Any]]) -> str:
    """`thresholds` as text."""
    lines = [f"{'keeps':<20}" + "".join(f"{share:>9.0%}" for share in (0.99, 0.95, 0.9, 0.8, 0.5)) + "   now"]
    for row in rows:
        now = "-" if row["own"] is None else f"{row['own']:g} keeps {row['keeps']:.0%}"
        lines.append(f"{row['name']:<20}" + "".join(f"{value:>9.3f}" for value in row["at"].values()) + f"   {now}")
    return "\n".join(lines)


def mean_and_spread(counts: Sequence[int], low: float, high: float) -> tuple[float, float]:
    """Mean and standard deviation of a histogram, to the width of its bins."""
    middles, counts = _middles(len(counts), low, high), np.asarray(counts, float)
    if not counts.sum():
        return float("nan"), float("nan")
    mean = float((middles * counts).sum() / counts.sum())
    return mean, float(np.sqrt((counts * (middles - mean) ** 2).sum() / counts.sum()))


def auc(own: Sequence[int], other: Sequence[int]) -> float:
    """Area under the ROC curve of two histograms over the same bins; what falls into one bin counts half."""
    own, other = np.asarray(own, float), np.asarray(other, float)
    below = np.cumsum(other) - other / 2
    return float((own * below).sum() / max(own.sum() * other.sum(), 1))


def _write(
    path: Path,
    config: GenerateConfig,
    total: Mapping[str, Any],
    about: Mapping[str, Any],
    facts: Mapping[str, str],
    pictures: Sequence[Mapping[str, str]],
    rows: Sequence[Mapping[str, Any]],
) -> Path:
    low, high = BINS["similarity"]
    cosines = [
        {"name": title, "pairs": sum(total["cosines"][key]), "mean": mean, "spread": spread}
        for key, title in _PAIRS.items()
        if key in total["cosines"]
        for mean, spread in [mean_and_spread(total["cosines"][key], low, high)]
    ]
    alike = auc(total["cosines"]["within"], total["cosines"]["across"]) if total["cosines"] else None
    page = _environment().get_template("report.html.jinja").render(
        title=config.name,
        total=total,
        about=about,
        facts=facts,
        pictures=pictures,
        cosines=cosines,
        auc=alike,
        charts=_charts(total),
        balance=_balance(config, total),
        thresholds=rows,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(page, encoding="utf-8")
    part.replace(path)
    return path


_PAIRS = {
    "within_drawn": "two pictures of one person, as drawn",
    "within": "two pictures of one person, as kept",
    "across": "pictures of two people, as kept",
}


def _balance(config: GenerateConfig, total: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each attribute's values the share asked, drawn and kept; first those that are balanced by design."""
    if config.people is None:
        return []
    counts, rows = total["attributes"], []
    names = [*config.people.balance, *(n for n in config.people.attributes if n not in config.people.balance)]
    for name in names:
        weights = config.people.attributes[name].values
        balanced = name in config.people.balance
        for number, (value, weight) in enumerate(weights.items()):
            shares = [counts[of].get(name, {}).get(value, 0) / max(1, total["people"][of]) for of in ("drawn", "kept")]
            asked = weight / sum(weights.values()) if config.people.attributes[name].draw == (1, 1) else None
            first = len(weights) if number == 0 else 0
            rows.append({"name": name, "first": first, "balanced": balanced, "value": value or "(none)", "asked": asked,
                         "drawn": shares[0], "kept": shares[1]})  # fmt: skip
    return rows


def _speed(folder: Path, config: GenerateConfig) -> dict[str, str]:
    """How fast it went, as the shards' times say (they are no part of the data set)."""
    paths = [shard_path(folder, number).with_suffix(".times.json") for number in range(config.shards)]
    times = [json.loads(path.read_text()) for path in paths if path.is_file()]
    if not times:
        return {}
    seconds: Counter[str] = Counter()
    for each in times:
        seconds.update(each["seconds"])
    pictures = sum(each["pictures"] for each in times)
    parts = ", ".join(f"{name} {seconds[name]:.1f} s" for name in ("draw", "look", "write"))
    return {
        "speed of one worker": f"{pictures / seconds['all']:.2f} pictures/s, {len(times)} shards in "
        f"{seconds['all']:.1f} s ({parts}; drawing and looking overlap)"
    }


def _sheet(title: str, shards: Shards, config: GenerateConfig, samples: Sequence[int]) -> dict[str, str]:
    """Rows of people as they stand in the shards; a picture that was left out is an empty place."""
    rows, people = [], []
    for sample in samples:
        if sample >= len(shards.keys):
            break
        about, first = shards.about(sample), int(shards.first[sample])
        row = [Cell(Image.new("RGB", (8, 8), (235, 235, 235)), "left out")] * config.prompts.per_person
        for number, picture in enumerate(about["pictures"]):
            image = Image.open(io.BytesIO(shards.picture(first + number)))
            alike = f" ({picture['similarity']:.2f})" if "similarity" in picture else ""
            row[int(Path(picture["file"]).stem)] = Cell(image, picture["caption"] + alike)
        rows.append(row)
        people.append(f"{about['person']}: {about['description']}")
    return _figure(title, rows, people)


def _drawn_sheet(title: str, people: Sequence[DrawnPerson], config: GenerateConfig) -> dict[str, str]:
    rows, names = [], []
    for person in people[: 2 * SHEET_PEOPLE]:
        cells = []
        for p in person.pictures:
            image = Image.fromarray(p.drawing.picture.permute(1, 2, 0).contiguous().numpy())
            alike = "" if p.looked.similarity is None else f" ({p.looked.similarity:.2f})"
            cells.append(Cell(image, (p.fault or person.fault or "kept") + alike))
        rows.append(cells)
        names.append(f"{person.person.number}: {person.person.description}")
    return _figure(title, rows, names)


def _figure(title: str, rows: Sequence[Sequence[Cell]], people: Sequence[str]) -> dict[str, str]:
    sheet, out = contact_sheet([""] * len(rows[0]), rows, cell_size=128), io.BytesIO()
    sheet.save(out, "JPEG", quality=85)
    return {"title": title, "people": people, "data": base64.b64encode(out.getvalue()).decode("ascii")}


def _charts(total: Mapping[str, Any]) -> list[dict[str, str]]:
    """Histograms as SVG: the cosines of pairs above each other, and each measure of the checks."""
    from matplotlib.figure import Figure

    charts = []
    if total["cosines"]:
        figure = Figure(figsize=(7, 2.8), layout="constrained")
        axes = figure.add_subplot()
        for key, title in _PAIRS.items():
            counts = np.asarray(total["cosines"][key], float)
            axes.stairs(counts / max(counts.sum(), 1), np.linspace(*BINS["similarity"], len(counts) + 1), label=title)
        axes.set(xlabel="cosine of the embeddings", ylabel="share of pairs", xlim=(-0.5, 1))
        axes.legend(frameon=False, fontsize=8)
        charts.append({"title": "Similarity within and across people", "data": _svg(figure)})
    for name, counts in total["histograms"].items():
        if not sum(counts):
            continue
        figure = Figure(figsize=(3.4, 2.2), layout="constrained")
        axes, edges = figure.add_subplot(), np.linspace(*BINS[name], len(counts) + 1)
        axes.stairs(counts, edges, fill=True)
        there = np.nonzero(counts)[0]
        axes.set(xlabel=TITLES[name], ylabel="pictures", xlim=(edges[there[0]], edges[there[-1] + 1]))
        axes.xaxis.label.set_size(8)
        charts.append({"title": name, "data": _svg(figure)})
    return charts


def _svg(figure: Any) -> str:
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return base64.b64encode(out.getvalue()).decode("ascii")


def _middles(count: int, low: float, high: float) -> np.ndarray:
    return low + (np.arange(count) + 0.5) * (high - low) / count


def _environment() -> Environment:
    loader = PackageLoader(__package__, "")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
