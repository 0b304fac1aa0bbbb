"""The report as one self-contained page of HTML, and as Markdown. Reads plain values only: report.json's content."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from ...evaluation.pages import templates
from . import charts

PLACES = ("no place", "in a forest", "on a beach", "in a city", "at night", "in the snow")
PICTURES = ("reconstructions", "samples", "captions", "previews", "backbone", "controlnet")


def page(report: dict[str, Any], pictures: Path) -> str:
    """The page; `pictures` is the folder with those that the measures drew. What is missing is said in a sentence."""
    pages = templates(Path(__file__).parent, autoescape=True)
    pages.filters["texts"] = lambda values: [(name, str(value)) for name, value in values.items()]
    plan = report["plan"]
    paths = {name: pictures / f"{name}.png" for name in PICTURES} | {"controlnet": pictures.parent / "controlnet.png"}
    svg = {"losses": charts.losses(report), "roc": charts.roc(report), "weight": charts.weight(report)}
    seeds = {what: ", ".join(f"{name} {seed}" for name, seed in of.items()) for what, of in report["seeds"].items()}
    return pages.get_template("page.html.jinja").render(
        report=report,
        claims=_claim_cells(report),
        files=_file_cells(report),
        stage_heads=_STAGE_HEADS,
        stages=_stage_cells(report),
        figures=_figure_cells,
        pictures={name: _jpeg(path) if path.exists() else None for name, path in paths.items()},
        charts={name: _data("svg+xml", drawn.encode()) if drawn else None for name, drawn in svg.items()},
        styles=plan["styles"],
        places=PLACES,
        seeds={"plan": plan["seed"]} | seeds,
        lengths={name.removeprefix("report_"): n for name, n in plan.items() if name.startswith("report_")},
    )


def _data(kind: str, content: bytes) -> str:
    """A picture's content as an address that a page can hold."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _jpeg(path: Path) -> dict[str, Any]:
    """A picture for the page: its width in pixels and its content."""
    with Image.open(path) as image:
        packed = io.BytesIO()
        image.convert("RGB").save(packed, "JPEG", quality=88)
        return {"width": image.width, "source": _data("jpeg", packed.getvalue())}


def markdown(report: dict[str, Any]) -> str:
    """The tables alone, for docs/: what is asked, files, stages, and all figures."""
    parts = [
        "## What is asked, and what was reached\n",
        _md_table(("point", "what", "figure", "asked", "outcome"), _claim_cells(report)),
        "## Files\n",
        _md_table(("file", "what", "parameters", "size", "sha256"), _file_cells(report)),
        "## Training\n",
        _md_table(_STAGE_HEADS, _stage_cells(report)),
        "## All figures\n",
    ]
    for m in report["measures"].values():
        parts.append(f"### {m['title']}\n")
        if "missing" in m:
            parts.append(m["missing"] + "\n")
        else:
            rows = _figure_cells(m)
            parts += [f"{m['basis']}.\n", _md_table(("figure", "value", "95 % interval"), rows)]
    return "\n".join(parts)


# Cells: the same for the page and for Markdown


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.3f}" if abs(x) < 10 else f"{x:.2f}"


def _value(figure: dict[str, float | None] | float | None) -> tuple[str, str]:
    """Value and interval; a plain number is no estimate and has none."""
    if not isinstance(figure, dict):
        return _number(figure), ""
    return _number(figure["value"]), f"[{_number(figure['low'])}, {_number(figure['high'])}]"


def _figure_cells(measure: dict[str, Any]) -> list[tuple[str, ...]]:
    return [(name, *_value(figure)) for name, figure in measure["figures"].items()]


def _verdict(row: dict[str, Any]) -> str:
    if row["met"] is None:
        return "reported" if row.get("figure") else "not measured"
    if not row["met"]:
        return "not met"
    low, least = (row.get("figure") or {}).get("low"), row.get("least")
    return "met; the interval reaches below" if low is not None and least is not None and low < least else "met"


def _claim_cells(report: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for row in report["claims"]:
        value = " ".join(_value(row["figure"])) if row.get("figure") else ""
        least = row.get("least")
        asked = "" if least is None else f"above {least:g}" if row.get("strictly") else f"at least {least:g}"
        rows.append((str(row["point"]), row["claim"], f"{row['name']}: {value}".rstrip(": "), asked, _verdict(row)))
    return rows


def _file_cells(report: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for f in report["files"]:
        if "sha256" in f:
            note = f["sha256"] if f["same"] else "the file is missing or has another hash than the manifest's"
            rows.append((f["file"], f["title"], f"{f['parameters'] / 1e6:.2f} M", f"{f['bytes'] / 1e6:.2f} MB", note))
        else:
            rows.append((f["file"], f["title"], "-", "-", "not there yet"))
    total = (sum(f.get(k, 0) for f in report["files"]) / 1e6 for k in ("parameters", "bytes"))
    return [*rows, ("sum", "", *(f"{x:.2f} {unit}" for x, unit in zip(total, ("M", "MB"), strict=True)), "")]


_STAGE_HEADS = ("stage", "steps", "seconds a step", "minutes", "first loss", "last loss")


def _stage_cells(report: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for name, s in report["stages"].items():
        times = (f"{s['seconds_per_step']:.3f}", f"{s['minutes']:.1f}")
        rows.append((name, f"{s['steps']:,}", *times, _loss(s["first_loss"]), _loss(s["last_loss"])))
    total = sum(s["minutes"] for s in report["stages"].values())
    return [*rows, ("sum", "", "", f"{total:.1f}", "", "")]


def _loss(x: float | None) -> str:
    return "-" if x is None else f"{x:.4f}"


def _md_table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

    return "\n".join([line(heads), "|" + "---|" * len(heads), *(line(r) for r in rows)]) + "\n"
