"""The report as one self-contained page of HTML, and as Markdown. Reads plain values only: report.json's content."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

INTRODUCTION = (
    "The mini world is a tiny SDXL family, trained from nothing on procedurally drawn faces of 128 pixels and stored "
    "in the real public file formats, so that the stock loaders of ComfyUI read it. It serves to develop and compare "
    "methods where the real SDXL is too large. All figures are of held-out people, prompts and seeds; square brackets "
    "hold 95 % intervals, from drawing people or prompts anew, and Wilson's for shares among samples that each have a "
    "noise of their own."
)
PLACES = ("no place", "in a forest", "on a beach", "in a city", "at night", "in the snow")
_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:66rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}
h1,h2,h3{line-height:1.2}h2{margin-top:2.5rem;border-bottom:1px solid #ccc}
table{border-collapse:collapse;margin:1rem 0;font-size:.9rem}caption{text-align:left;font-weight:600;padding:.3rem 0}
th,td{border-bottom:1px solid #ddd;padding:.25rem .7rem .25rem 0;text-align:left;vertical-align:top}
td.n,th.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}code{font-size:.72rem;word-break:break-all}
figure{margin:1.5rem 0}figcaption{color:#444}img{max-width:100%;height:auto;display:block}
.heads{display:grid;font-size:.75rem;text-align:center;max-width:100%}
.met{color:#05603a}.unmet{color:#a4161a;font-weight:600}.open{color:#555}
.wide{overflow-x:auto}td span{white-space:nowrap}
"""


def page(report: dict[str, Any], pictures: Path) -> str:
    """The page; `pictures` is the folder with those that the measures drew. What is missing is said in a sentence."""
    styles = report["plan"]["styles"]
    across, down = ", ".join(styles), ", ".join(PLACES)
    prompt_rows = "the same prompts in other styles at weight 0, 0.25, 0.5, 0.75, 1"
    sections = [
        _section("What is asked, and what was reached", _claims_table(report)),
        _section("Files", _files_table(report)),
        _section(
            "Training",
            _stages_table(report)
            + _chart(_losses_chart(report), "Loss of every stage by step (means, logarithmic)", "Loss curves"),
        ),
        _section(
            "Pictures",
            _picture(
                pictures / "reconstructions.png",
                "Reconstructions: drawn pictures of held-out people, each above what the autoencoder makes of it.",
                styles,
            )
            + _picture(
                pictures / "samples.png",
                f"Samples of the base on short prompts. Columns: {across}. Rows: {down}.",
                styles,
            )
            + _picture(
                pictures / "captions.png",
                "Long captions: above, drawn photos of held-out people; below, the base's samples on their captions.",
            )
            + _picture(
                pictures / "previews.png",
                "One-step previews: rows are the share of 50 steps that is done, columns the ways to foresee the "
                "finished picture (the last).",
            )
            + _picture(
                pictures / "backbone.png",
                f"The image prompt: references, a photo each at weight 1, and {prompt_rows}.",
            )
            + _picture(
                pictures.parent / "controlnet.png",
                "ControlNet: picture, its edges, a sample without them, one with them, one with them in another style.",
            ),
        ),
        _section(
            "Curves",
            _chart(
                _roc_chart(report),
                "ROC: share of a person's own pairs above a limit, by the share of other people's pairs above it",
                "ROC curves",
            )
            + _chart(
                _weight_chart(report),
                "What the image prompt's weight does in styles other than photo, with 95 % intervals",
                "Curves by the image prompt's weight",
            ),
        ),
        _section("All figures", "".join(_measure(m) for m in report["measures"].values())),
        _section("Made with", _made_with(report)),
    ]
    title, body = "The mini world: report", "".join(sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{title}</h1>\n<p>{escape(INTRODUCTION)}</p>\n{body}</main>\n</body>\n</html>\n"
    )


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
            rows = [(name, *_value(f)) for name, f in m["figures"].items()]
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


def _verdict(row: dict[str, Any]) -> str:
    if row["met"] is None:
        return "reported" if row.get("figure") else "not measured"
    if not row["met"]:
        return "not met"
    low, least = (row.get("figure") or {}).get("low"), row.get("least")
    return "met; the interval reaches below" if low is not None and least is not None and low < least else "met"


def _claim_cells(report: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
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


# Parts of the page


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}</section>\n"


def _table(caption: str, heads: tuple[str, ...], rows: Iterable[tuple[str, ...]], numbers: tuple[int, ...] = ()) -> str:
    """A table whose cells are text; those in columns `numbers` are set to the right."""

    def kind(column: int) -> str:
        return ' class="n"' if column in numbers else ""

    def cell(column: int, text: str) -> str:
        shown = f"<code>{escape(text)}</code>" if len(text) == 64 and " " not in text else escape(text)
        verdict = {"met": "met", "not met": "unmet", "not measured": "open", "reported": "open"}.get(text.split(";")[0])
        return f"<td{kind(column)}>" + (f'<span class="{verdict}">{shown}</span>' if verdict else shown) + "</td>"

    head = "".join(f'<th scope="col"{kind(i)}>{escape(h)}</th>' for i, h in enumerate(heads))
    body = "\n".join("<tr>" + "".join(cell(i, c) for i, c in enumerate(r)) + "</tr>" for r in rows)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    inside = f"{title}\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>"
    return f'<div class="wide"><table>{inside}</table></div>\n'


def _claims_table(report: dict[str, Any]) -> str:
    note = (
        "<p>Points are those of the plan for the mini world. Point 7, that the stock loaders of all supported host "
        "versions read the files, is for the host's tests and not measured here.</p>\n"
    )
    return _table("", ("point", "what", "figure", "asked", "outcome"), _claim_cells(report), (3,)) + note


def _files_table(report: dict[str, Any]) -> str:
    heads = ("file", "what", "parameters", "size", "sha256")
    return _table("Files as shipped; 1 MB is a million bytes", heads, _file_cells(report), (2, 3))


def _stages_table(report: dict[str, Any]) -> str:
    if not report["stages"]:
        return "<p>The folder holds no log of a stage.</p>\n"
    note = (
        "<p>Minutes are summed over the logs' lines; where several stages shared the machine, so did their times. "
        "Seconds a step are the mean of the last run.</p>\n"
    )
    return _table("Stages", _STAGE_HEADS, _stage_cells(report), (1, 2, 3, 4, 5)) + note


def _measure(m: dict[str, Any]) -> str:
    title = f"<h3>{escape(m['title'])}</h3>\n"
    if "missing" in m:
        return f"{title}<p>{escape(m['missing'])}</p>\n"
    rows = [(name, *_value(f)) for name, f in m["figures"].items()]
    return title + _table(m["basis"], ("figure", "value", "95 % interval"), rows, (1, 2))


def _made_with(report: dict[str, Any]) -> str:
    def flat(values: dict[str, Any]) -> list[tuple[str, str]]:
        return [(k, str(v)) for k, v in values.items()]

    groups = {k: ", ".join(f"{name} {seed}" for name, seed in v.items()) for k, v in report["seeds"].items()}
    seeds = {"plan": report["plan"]["seed"]} | groups
    seconds = sum(m.get("seconds", 0) for m in report["measures"].values())
    lengths = {k.removeprefix("report_"): v for k, v in report["plan"].items() if k.startswith("report_")}
    return (
        _table("Versions", ("package", "version"), flat(report["versions"]))
        + _table("Machine of the report", ("", ""), flat(report["machine"]))
        + _table("Seeds", ("of", "seed"), flat(seeds))
        + _table("Sizes of the report", ("", "n"), flat(lengths), (1,))
        + f"<p>Measuring took {seconds / 60:.1f} minutes.</p>\n"
    )


def _picture(path: Path, caption: str, columns: Sequence[str] = ()) -> str:
    """A picture as JPEG inside the page, or a sentence that it is not there."""
    if not path.exists():
        return f"<p>Not drawn yet: {escape(caption)}</p>\n"
    from PIL import Image

    with Image.open(path) as image:
        width, packed = image.width, io.BytesIO()
        image.convert("RGB").save(packed, "JPEG", quality=88)
    names = "".join(f"<span>{escape(c)}</span>" for c in columns)
    grid = f'style="grid-template-columns:repeat({len(columns)},1fr);width:{width}px"'
    heads = f'<div class="heads" aria-hidden="true" {grid}>{names}</div>\n' if names else ""
    source = f"data:image/jpeg;base64,{base64.b64encode(packed.getvalue()).decode()}"
    return (
        f'<figure>\n<figcaption>{escape(caption)}</figcaption>\n{heads}<img src="{source}" alt="{escape(caption)}">\n'
        "</figure>\n"
    )


def _chart(svg: str | None, caption: str, name: str) -> str:
    if svg is None:
        return f"<p>{escape(name)}: nothing to draw yet.</p>\n"
    source = f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
    return (
        f"<figure>\n<figcaption>{escape(caption)}</figcaption>\n"
        f'<img src="{source}" alt="{escape(name)}; the figures are in the tables">\n</figure>\n'
    )


# Charts


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for a in axes:
        a.spines[["top", "right"]].set_visible(False)
        a.tick_params(labelsize=8)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "report", "svg.fonttype": "path"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _losses_chart(report: dict[str, Any]) -> str | None:
    curves = {name: s["losses"] for name, s in report["stages"].items()}
    if not curves:
        return None
    from matplotlib.ticker import LogLocator

    columns = min(4, len(curves))
    rows = -(-len(curves) // columns)
    figure, axes = _figure(rows, columns, 11, 2.1 * rows)
    for a, (name, points) in zip(axes, curves.items(), strict=False):
        drawn = [(step, loss) for step, loss in points if loss is not None and loss > 0]
        a.plot(*zip(*drawn, strict=True), linewidth=1, color="#1f5fa8") if drawn else None
        a.set_yscale("log")
        a.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        a.yaxis.set_major_formatter("{x:.3g}")
        a.yaxis.set_minor_formatter("")
        a.set_title(name, fontsize=9)
    for a in axes[len(curves) :]:
        a.set_visible(False)
    return _svg(figure)


def _roc_chart(report: dict[str, Any]) -> str | None:
    curves = {}
    for name, prefix in (("judges", ""), ("two_recognisers", ""), ("backbone", "image prompt: ")):
        for title, points in report["measures"][name].get("curves", {}).items():
            if points and len(points[0]) == 2:
                curves[prefix + title] = points
    if not curves:
        return None
    figure, (a,) = _figure(1, 1, 8, 4)
    for title, points in curves.items():
        a.plot(*zip(*points, strict=True), linewidth=1.3, label=title)
    a.set_xscale("log")
    a.set(xlim=(1e-3, 1), ylim=(0, 1.01))
    a.set_xlabel("false positive rate", fontsize=9)
    a.set_ylabel("true positive rate", fontsize=9)
    a.legend(fontsize=8, loc="lower right")
    return _svg(figure)


def _weight_chart(report: dict[str, Any]) -> str | None:
    curves = {
        title: points
        for title, points in report["measures"]["backbone"].get("curves", {}).items()
        if points and len(points[0]) == 4
    }
    if not curves:
        return None
    figure, (a,) = _figure(1, 1, 8, 3.6)
    for title, points in curves.items():
        weight, value, low, high = zip(*points, strict=True)
        (line,) = a.plot(weight, value, marker="o", markersize=3, linewidth=1.3, label=title.split(" by ")[0])
        a.fill_between(weight, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    a.set_xlabel("weight", fontsize=9)
    a.set_ylim(-0.05, 1.05)
    a.legend(fontsize=8)
    return _svg(figure)
