"""The page that shows a generated data set, in one file: pictures, similarity, balance, rejections, speed."""

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
from ..shards import Shards, shard_name, side_name, times_name
from ..store import Store
from ..tars import ShardError, index_name
from .config import GenerateConfig
from .engine import BINS, RANGES, GeneratedPerson, summary

SHEET_PEOPLE, PILOT_PEOPLE = 10, 20  # rows of a sheet
SHARES = (0.99, 0.95, 0.9, 0.8, 0.5)  # of what is kept, for which a pilot says the thresholds
TITLES = {
    "similarity": "mean cosine to the person's other pictures",
    "face_size": "height of the face, as a share of the picture's",
    "sharpness": "mean difference of neighbouring pixels",
    "style": "probability of the asked style",
}
_PAIRS = {
    "within_generated": "two pictures of one person, as generated",
    "within": "two pictures of one person, as kept",
    "across": "pictures of two people, as kept",
}
_SUMS = ("people", "pictures", "rejected", "attributes", "histograms", "cosines")


def write_report(config: GenerateConfig) -> str:
    """Write report.html into the data set's folder; returns where it is.

    Raises ShardError, one sentence, where no shard is finished, or StoreError.
    """
    store = Store(config.out)
    there = store.names()
    names = [name for n in range(config.shards) if index_name(name := shard_name(n)) in there]
    if not names:
        raise ShardError(f"There is no finished shard in {store} to report on: make some first.")
    sides, shards = [json.loads(text) for text in store.read([side_name(name) for name in names])], Shards(store)
    sheets = [_sheet_of_shards(f"The first {SHEET_PEOPLE} people", shards, config, range(SHEET_PEOPLE))]
    if len(shards.keys) > 3 * SHEET_PEOPLE:
        spread = np.linspace(SHEET_PEOPLE, len(shards.keys) - 1, SHEET_PEOPLE).astype(int).tolist()
        sheets.append(_sheet_of_shards("People from all of it", shards, config, spread))
    facts = {
        "shards": f"{len(names)} of {config.shards}",
        "disk": f"{sum(there[name] or 0 for name in names) / 1e6:.1f} MB",
    }
    timed = [times_name(name) for name in names if times_name(name) in there]
    times = [json.loads(text) for text in store.read(timed)]
    return _write(store, "report.html", config, added(sides), sides[0], facts | _speed(times), sheets)


def write_pilot(
    config: GenerateConfig,
    opened: Sequence[GeneratedPerson],
    asked: Sequence[GeneratedPerson],
    about: Mapping[str, Any],
) -> str:
    """Write pilot.html; returns where it is. opened: people with all thresholds open; asked: the same as the
    configuration selects them."""
    sheet = _sheet_of_people("Under each, what the configuration does with it", asked, config)
    total = summary(asked) | {"histograms": summary(opened)["histograms"]}
    facts = {"pilot": f"{len(opened)} people, of whom nothing but this page is written"}
    rows = thresholds(config, opened)
    return _write(Store(config.out), "pilot.html", config, total, about, facts, [sheet], rows)


def thresholds(config: GenerateConfig, people: Sequence[GeneratedPerson]) -> list[dict[str, Any]]:
    """For each measure, the thresholds that keep the SHARES of pictures, and what the configuration's own keeps."""
    rows = []
    for name, title in TITLES.items():
        values = [v for person in people for p in person.pictures if (v := getattr(p.measured, name)) is not None]
        if values:
            rows.append(_threshold(f"checks.{name}", title, values, getattr(config.checks, name)))
    nearest = nearest_earlier(people)
    if nearest:
        title = "cosine to the nearest earlier person; below it a person is kept"
        rows.append(_threshold("checks.duplicate", title, nearest, config.checks.duplicate, below=True))
    return rows


def _threshold(
    name: str, title: str, values: Sequence[float], own: float | None, below: bool = False
) -> dict[str, Any]:
    at = [float(np.quantile(values, share if below else 1 - share)) for share in SHARES]
    keeps = None if own is None else float(np.mean([v < own if below else v >= own for v in values]))
    return {"name": name, "title": title, "at": at, "own": own, "keeps": keeps}


def nearest_earlier(people: Sequence[GeneratedPerson]) -> list[float]:
    """Gives, for each person but the first, the cosine of the mean embedding to that of the nearest earlier one."""
    means = [mean for person in people if (mean := person.mean()) is not None]
    return [max(float(mean @ other) for other in means[:n]) for n, mean in enumerate(means) if n]


def table_of_thresholds(rows: Sequence[Mapping[str, Any]]) -> str:
    """`thresholds` as text."""
    lines = [f"{'keeps':<20}" + "".join(f"{share:>9.0%}" for share in SHARES) + "   now"]
    for row in rows:
        now = "not applied" if row["own"] is None else f"{row['own']:g} keeps {row['keeps']:.0%}"
        lines.append(f"{row['name']:<20}" + "".join(f"{value:>9.3f}" for value in row["at"]) + f"   {now}")
    return "\n".join(lines)


def added(sides: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The summaries of several shards as that of one."""

    def add(one: Any, other: Any) -> Any:
        if isinstance(one, Mapping):
            both = {key: add(one[key], other[key]) for key in one if key in other}
            return {**one, **other, **both}
        return [a + b for a, b in zip(one, other, strict=True)] if isinstance(one, list) else one + other

    total = {name: sides[0][name] for name in _SUMS}
    for side in sides[1:]:
        total = {name: add(total[name], side[name]) for name in _SUMS}
    return total


def mean_and_deviation(counts: Sequence[int], low: float, high: float) -> tuple[float, float]:
    """Mean and standard deviation of a histogram's values, to half the width of a bin; NaN where there are none."""
    middles = low + (np.arange(len(counts)) + 0.5) * (high - low) / len(counts)
    if not sum(counts):
        return float("nan"), float("nan")
    mean = np.average(middles, weights=counts)
    return float(mean), float(np.sqrt(np.average((middles - mean) ** 2, weights=counts)))


def auc(own: Sequence[int], other: Sequence[int]) -> float:
    """Area under the ROC curve of two histograms over the same bins; two values of one bin count half."""
    ours, theirs = np.asarray(own, float), np.asarray(other, float)
    below = np.cumsum(theirs) - theirs / 2
    return float((ours * below).sum() / max(ours.sum() * theirs.sum(), 1))


def _write(
    store: Store,
    name: str,
    config: GenerateConfig,
    total: Mapping[str, Any],
    about: Mapping[str, Any],
    facts: Mapping[str, str],
    sheets: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]] = (),
) -> str:
    cosines = total["cosines"]
    pairs = [
        (title, sum(cosines[key]), *mean_and_deviation(cosines[key], *RANGES["similarity"]))
        for key, title in _PAIRS.items()
        if key in cosines
    ]
    loader = PackageLoader(__package__, "")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = environment.get_template("report.html.jinja").render(
        title=config.name,
        total=total,
        about=about,
        facts=facts,
        sheets=sheets,
        pairs=pairs,
        auc=auc(cosines["within"], cosines["across"]) if cosines else None,
        charts=_charts(total),
        balance=_balance(config, total),
        shares=SHARES,
        thresholds=rows,
    )
    with store.writing(name) as path:
        path.write_text(page, encoding="utf-8")
    return store.at(name)


def _balance(config: GenerateConfig, total: Mapping[str, Any]) -> list[dict[str, Any]]:
    """By attribute, the share of people asked, generated and kept of each value; balanced attributes come first."""
    if config.people is None:
        return []
    out, counts, people = [], total["attributes"], total["people"]
    for name in dict.fromkeys([*config.people.balance, *config.people.attributes]):
        attribute = config.people.attributes[name]
        weights, rows = attribute.values, []
        for value, weight in weights.items():
            asked = weight / sum(weights.values()) if attribute.draw == (1, 1) and not attribute.unless else None
            had = (counts[of].get(name, {}).get(value, 0) / max(1, people[of]) for of in ("generated", "kept"))
            rows.append((value or "(none)", asked, *had))
        out.append({"name": name, "balanced": name in config.people.balance, "rows": rows})
    return out


def _speed(times: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """How fast it went, by the shards' times."""
    if not times:
        return {}
    seconds: Counter[str] = Counter()
    for each in times:
        seconds.update(each["seconds"])
    pictures = sum(each["pictures"] for each in times)
    parts = ", ".join(f"{name} {seconds[name]:.1f} s" for name in ("generate", "check", "write"))
    return {
        "speed of one worker": f"{pictures / seconds['all']:.2f} pictures/s: {pictures} in {seconds['all']:.1f} s "
        f"({parts}; pictures are checked while others are generated)"
    }


def _sheet_of_shards(title: str, shards: Shards, config: GenerateConfig, samples: Sequence[int]) -> dict[str, Any]:
    """A person a row, as they stand in the shards; the place of a rejected picture is empty."""
    rows, people = [], []
    for sample in samples[: len(shards.keys)]:
        about, first = shards.about(sample), int(shards.first[sample])
        row = [Cell(Image.new("RGB", (8, 8), (235, 235, 235)), "rejected")] * config.prompts.per_person
        for number, picture in enumerate(about["pictures"], first):
            image = Image.open(io.BytesIO(shards.picture(number)))
            row[int(Path(picture["file"]).stem)] = _cell(image, picture["caption"], picture.get("similarity"))
        rows.append(row)
        people.append(f"person {about['person']}: {about['description']}")
    return _sheet(title, rows, people)


def _sheet_of_people(title: str, people: Sequence[GeneratedPerson], config: GenerateConfig) -> dict[str, Any]:
    """The same of people who are in memory alone."""
    some = people[:PILOT_PEOPLE]
    rows = [
        [
            _cell(Image.open(io.BytesIO(p.file)), p.rejected or person.rejected or "kept", p.measured.similarity)
            for p in person.pictures
        ]
        for person in some
    ]
    return _sheet(title, rows, [f"person {p.person.number}: {p.person.description}" for p in some])


def _cell(image: Image.Image, text: str, similarity: float | None) -> Cell:
    return Cell(image, text if similarity is None else f"{text} ({similarity:.2f})")


def _sheet(title: str, rows: Sequence[Sequence[Cell]], people: Sequence[str]) -> dict[str, Any]:
    out = io.BytesIO()
    if rows:
        contact_sheet([""] * len(rows[0]), rows, cell_size=128).save(out, "JPEG", quality=85)
    return {"title": title, "people": people, "data": _base64(out)}


def _charts(total: Mapping[str, Any]) -> list[dict[str, str]]:
    """Histograms as SVG: the cosines of pairs, and each measure."""
    from matplotlib.figure import Figure

    charts = []
    if total["cosines"]:
        figure = Figure(figsize=(7, 2.8), layout="constrained")
        axes = figure.add_subplot()
        low, edges = 1.0, np.linspace(*RANGES["similarity"], BINS // 2 + 1)
        for key, title in _PAIRS.items():
            counts = np.asarray(total["cosines"][key], float).reshape(-1, 2).sum(1)  # coarser, to be read as curves
            first = key == "within_generated"  # seen below that of the kept
            axes.stairs(
                counts / max(counts.sum(), 1),
                edges,
                label=title,
                linewidth=3 if first else 1,
                alpha=0.4 if first else 1,
            )
            low = min([low, *edges[:-1][counts > 0]])
        axes.set(xlabel="cosine of two embeddings", ylabel="share of pairs", xlim=(low - 0.02, 1))
        axes.legend(frameon=False, fontsize=8, loc="upper left")
        charts.append({"title": "similarity within and across people", "data": _svg(figure)})
    for name, counts in total["histograms"].items():
        if sum(counts):
            figure = Figure(figsize=(3.4, 2.2), layout="constrained")
            axes, edges = figure.add_subplot(), np.linspace(*RANGES[name], len(counts) + 1)
            axes.stairs(counts, edges, fill=True)
            filled = np.nonzero(counts)[0]
            axes.set(ylabel="pictures", xlim=(edges[filled[0]], edges[filled[-1] + 1]))
            axes.set_xlabel(TITLES[name], fontsize=8)
            charts.append({"title": TITLES[name], "data": _svg(figure)})
    return charts


def _svg(figure: Any) -> str:
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return _base64(out)


def _base64(out: io.BytesIO) -> str:
    return base64.b64encode(out.getvalue()).decode("ascii")
