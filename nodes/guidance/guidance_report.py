"""Guided runs report their losses and previews, live and afterwards. A SAMPLER cannot put out pictures of its run."""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from comfy_api.latest import io, ui
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..schema import schema
from ..sockets import GUIDANCE_REPORT

_KEPT = 8  # runs
SHOWN = 512  # pixels a side of the previews that are shown
_UNGUIDED = "Nothing was guided: the sampler is bypassed, iterations is 0, or start lies outside of this run."
_COLOURS = ("#1b6ca8", "#d1495b", "#2e7d32", "#b8860b", "#6a4c93", "#00838f", "#8d5524", "#444444")


class Iterate(NamedTuple):
    """The losses of one iteration: one number an image, None where it is not valid; step: the sampler's step; final:
    whether this is where the iterations have led."""

    step: int
    sigma: float
    losses: list[float | None]
    final: bool = False


@dataclass
class RunReport:
    """The report of one guided run.

    previews: by name those before and after the first and the last guided step, latents [n, c, h, w] that are decoded
    when somebody looks: a decoder takes as long as several steps; decode: latents to IMAGE; notes: what the user should
    know of the run, a sentence each; start: what the best of several noises gained; began: what moved the noise before
    all iterations; kept: which iterate of a step the run went on from, best or last.
    """

    loss: str
    iterates: list[Iterate] = field(default_factory=list)
    decode: Callable[[Tensor], Tensor] | None = None
    previews: list[tuple[str, Tensor]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    start: str = ""
    began: str = ""
    kept: str = ""

    def add(self, name: str, latent: Tensor) -> None:
        """Keep a preview, latents [n, c, h, w]."""
        self.previews.append((name, latent.float().cpu()))

    def pictures(self) -> list[Tensor]:
        """The previews as IMAGE [n, H, W, 3] in [0, 1], at most SHOWN pixels a side."""
        return [] if self.decode is None else [_smaller(self.decode(latent)) for _, latent in self.previews]

    def text(self) -> str:
        """A line for each guided step: the mean loss before and after, where it was measured. Then what else is to be
        said, a line each."""
        lines = [line for line in (self.start, self.began) if line]
        for step in dict.fromkeys(iterate.step for iterate in self.iterates):
            of_step = [iterate for iterate in self.iterates if iterate.step == step]
            means = [mean(iterate.losses) for iterate in of_step]
            best = min((m for m in means if m is not None), default=None)
            shown = ["none counted" if m is None else f"{m:.4g}" for m in (means[0], means[-1], best)]
            way = f"{shown[0]} -> {shown[1]} (best {shown[2]})"
            if not any(iterate.final for iterate in of_step):  # what its last move led to is measured in the next step
                way = f"{' -> '.join(shown[: len(means)][:2])} before the last move"
            lines.append(
                f"step {step + 1} (sigma {of_step[0].sigma:.3g}): {self.loss} {way} in "
                f"{sum(not i.final for i in of_step)} iterations" + (f", kept: {self.kept}" if self.kept else "")
            )
        return "\n".join([*(lines or [_UNGUIDED]), *self.notes])


@dataclass(frozen=True, eq=False)
class GuidanceReport:
    """LOOKAHEAD_GUIDANCE_REPORT carries the last guided runs, by a mark of their latents; it alone changes."""

    runs: dict[str, RunReport] = field(default_factory=dict)


def _smaller(image: Tensor) -> Tensor:
    share = SHOWN / max(image.shape[1:3])
    if share >= 1:
        return image
    size = [round(side * share) for side in image.shape[1:3]]
    return torch.nn.functional.interpolate(image.movedim(-1, 1), size, mode="area").movedim(1, -1)


def mean(losses: list[float | None]) -> float | None:
    """The mean of the valid losses, None where none is."""
    valid = [loss for loss in losses if loss is not None]
    return sum(valid) / len(valid) if valid else None


def keep(report: GuidanceReport, samples: Tensor, run: RunReport) -> None:
    """Keep a run under the mark of the latents it gave; the oldest makes way."""
    mark = mark_of(samples)
    report.runs.pop(mark, None)
    report.runs[mark] = run
    while len(report.runs) > _KEPT:
        del report.runs[next(iter(report.runs))]


def mark_of(samples: Tensor) -> str:
    """A mark of the latents [n, c, h, w] that a run gave."""
    return hashlib.sha256(samples.float().cpu().contiguous().numpy().tobytes()).hexdigest()


def shown_while_running(pictures: Tensor, text: str, size: int = 768) -> tuple[str, Image.Image, int]:
    """A preview for the host's progress bar: IMAGE [n, H, W, 3] in a row (up to four), with a line of text.

    What counts stands first in the text: a small picture cuts it off.
    """
    row = torch.cat(list(pictures[:4]), dim=1)
    image = Image.fromarray((row * 255).round().byte().numpy())
    image.thumbnail((size, size))
    font = ImageFont.load_default(max(10, min(18, image.width // 24)))
    out = Image.new("RGB", (image.width, image.height + round(1.5 * font.size)), "white")
    out.paste(image, (0, 0))
    ImageDraw.Draw(out).text((3, image.height + 1), text, fill="black", font=font)
    return ("JPEG", out, size)


def curve(run: RunReport, width: int = 768, height: int = 432) -> Tensor:
    """The losses over the iterations as IMAGE [1, H, W, 3]: a line for each picture, a grey one where a step begins.

    The run's text stands above; with each line of it beyond the first the picture is taller.
    """
    caption = [part for line in run.text().splitlines() for part in textwrap.wrap(line, 105)]
    height += 20 * (len(caption) - 1)
    left, right, top, bottom = 70, width - 16, 16 + 20 * len(caption), height - 36
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    draw.font = ImageFont.load_default(15)
    losses = [loss for iterate in run.iterates for loss in iterate.losses if loss is not None]
    low, high = (min(losses), max(losses)) if losses else (0.0, 1.0)
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5
    last = max(len(run.iterates) - 1, 1)

    def at(n: int, loss: float) -> tuple[float, float]:
        return left + (right - left) * n / last, bottom - (bottom - top) * (loss - low) / (high - low)

    for part in range(5 if losses else 0):
        loss = low + (high - low) * part / 4
        y = at(0, loss)[1]
        draw.line((left, y, right, y), fill="#e5e5e5")
        draw.text((6, y - 9), f"{loss:.4g}", fill="black")
    for n, iterate in enumerate(run.iterates):
        if n == 0 or run.iterates[n - 1].step != iterate.step:
            x = at(n, low)[0]
            draw.line((x, top, x, bottom), fill="#999999")
            draw.text((x + 3, bottom + 4), f"step {iterate.step + 1}", fill="black")
    for image_number in range(max((len(iterate.losses) for iterate in run.iterates), default=0)):
        points = [
            (at(n, i.losses[image_number])) for n, i in enumerate(run.iterates) if i.losses[image_number] is not None
        ]
        colour = _COLOURS[image_number % len(_COLOURS)]
        if len(points) > 1:
            draw.line(points, fill=colour, width=2)
        for x, y in points:
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
    for number, part in enumerate(caption):
        draw.text((6, 6 + 20 * number), part, fill="black")
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.reshape(1, height, width, 3).float() / 255


class LookaheadGuidanceReport(io.ComfyNode):
    """GUIDANCE_REPORT, LATENT -> the loss curve, previews, text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LookaheadGuidanceReport",
            display_name="Lookahead Guidance Report",
            category="lookahead/sampling",
            has_intermediate_output=True,
            description="Shows what the guidance did in a run: the loss before and after, its curve over the "
            "iterations, and the previews it began and ended with.",
            search_aliases=["loss curve", "guidance", "preview", "plot"],
            inputs=[
                GUIDANCE_REPORT.Input(
                    "report",
                    optional=True,
                    tooltip="From Lookahead Guidance Sampler. Open, as when that is bypassed: there was no guidance.",
                ),
                io.Latent.Input(
                    "latent", tooltip="What the sampler gave: it says which run is meant, and when to look."
                ),
            ],
            outputs=[
                io.Image.Output("CURVE", display_name="curve", tooltip="The loss over the iterations of each picture."),
                io.Image.Output(
                    "PREVIEWS",
                    display_name="previews",
                    tooltip="The one-step previews before and after the first and the last guided step.",
                ),
                io.String.Output(
                    "TEXT",
                    display_name="text",
                    tooltip="The mean loss before and after, a line a step, and which iteration was kept: the best or "
                    "the last.",
                ),
            ],
        )

    @classmethod
    def execute(cls, latent: dict, report: GuidanceReport | None = None) -> io.NodeOutput:
        run = RunReport("") if report is None else report.runs.get(mark_of(latent["samples"]))
        if run is None:
            raise ValueError(
                "The report knows no guided run that gave this latent: connect output (not denoised_output) of the "
                "SamplerCustomAdvanced with the same Lookahead Guidance Sampler; where that is so, change the seed and "
                "queue again, since only the last runs are known."
            )
        plot, previews = curve(run), run.pictures()
        # Without guidance no error: such a picture is what a guided one is compared with.
        return io.NodeOutput(plot, torch.cat(previews or [plot]), run.text(), ui=ui.PreviewText(run.text()))
