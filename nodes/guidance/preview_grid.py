"""The node that shows how well previews foretell the picture (figure 2 of the paper), from the user's own model."""

from __future__ import annotations

import itertools
import logging
from typing import Any, NamedTuple

import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy_api.latest import io
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...lookahead.vision.image_metrics import root_mean_square, structural_similarity
from ..losses.lookahead_loss import LookaheadLoss
from ..schema import schema
from ..sockets import LOSS, SHORTCUT
from .interceptor import Interceptor
from .preview import Previewer, as_image
from .sampler_steps import steps_shown
from .shortcut import Shortcut


class Shot(NamedTuple):
    """Previews at one step, [n, H, W, 3] in [0, 1]: of the shortcut, and the sampler's own x0 prediction."""

    fraction: float
    shortcut: Tensor
    x0: Tensor


class LookaheadPreviewGrid(io.ComfyNode):
    """MODEL, SHORTCUT, ... -> IMAGE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LookaheadPreviewGrid",
            display_name="Lookahead Preview Grid",
            category="lookahead/sampling",
            description="Samples a picture and shows what was foretold of it on the way: by the shortcut in one step, "
            "and by the sampled model itself (x0), beside the finished picture and with numbers. Figure 2 of the "
            "paper, from your own model.",
            search_aliases=["preview", "one-step", "lcm", "alignment", "comparison", "taesd"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample."),
                SHORTCUT.Input("shortcut", tooltip="How to look ahead, from Lookahead Shortcut."),
                io.Conditioning.Input("positive", tooltip="What the picture should show."),
                io.Conditioning.Input("negative", tooltip="What it should not show."),
                io.Latent.Input("latent_image", tooltip="The empty latent to begin with; its size is the picture's."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Seed of the noise.",
                ),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Steps of the sampling."),
                io.Float.Input(
                    "cfg",
                    default=5.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance of the sampling, not the preview.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.SAMPLER_NAMES,
                    default="euler",
                    advanced=True,
                    tooltip="The sampler.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.SCHEDULER_NAMES,
                    default="normal",
                    advanced=True,
                    tooltip="The noise schedule.",
                ),
                io.String.Input(
                    "fractions",
                    default="0, 0.1, 0.25, 0.5",
                    tooltip="At which parts of the steps to look ahead, from 0 (pure noise) to below 1.",
                ),
                LOSS.Input(
                    "loss", optional=True, tooltip="Measured on every preview and on the finished picture as well."
                ),
            ],
            outputs=[
                io.Image.Output(
                    "GRID", display_name="grid", tooltip="A picture of all previews, for each of the batch."
                ),
                io.Image.Output("FINISHED", display_name="finished", tooltip="The finished pictures."),
                io.String.Output("TEXT", display_name="text", tooltip="The numbers as a table."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        shortcut: Shortcut,
        positive,
        negative,
        latent_image: dict[str, Any],
        seed: int = 0,
        steps: int = 20,
        cfg: float = 5.0,
        sampler_name: str = "euler",
        scheduler: str = "normal",
        fractions: str = "0, 0.1, 0.25, 0.5",
        loss: LookaheadLoss | None = None,
    ) -> io.NodeOutput:
        chosen = parse_fractions(fractions)
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        sampler = comfy.samplers.sampler_object(sampler_name)
        device = model.load_device
        as_ksampler = comfy.samplers.KSampler(model, steps, device, sampler_name, scheduler, 1.0, model.model_options)
        sigmas = as_ksampler.sigmas
        ratio = latent_image.get("downscale_ratio_spacial")
        samples = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"], ratio)
        noise = comfy.sample.prepare_noise(samples, seed, latent_image.get("batch_index"))
        shots: list[Shot] = []
        finished: list[Tensor] = []

        def watched(model_k, x, sigmas, extra_args=None, callback=None, disable=None, **options):
            previewer = Previewer(shortcut, guider)
            previewer.load(list(loss.patchers) if loss else [], x, factor=1.0)
            interceptor = Interceptor(model_k)
            total = steps_shown(sampler.sampler_function, options, model_k, sigmas)  # dpm_fast has some of its own
            shown = itertools.count()

            def show(info):
                if callback is not None:
                    callback(info)
                step = next(shown)
                for fraction in chosen:
                    if step == min(round(fraction * total), total - 1):
                        call = interceptor.last
                        previewer.prepare(call)
                        image = previewer.decode_preview(call.x, call, previewer.conds(x, None, call))
                        shots.append(Shot(fraction, image, as_image(previewer.decode(info["denoised"]))))

            try:
                out = sampler.sampler_function(
                    interceptor, x, sigmas, extra_args=extra_args, callback=show, disable=disable, **options
                )
                finished.append(as_image(previewer.decode(out)))
            finally:
                previewer.close()
            return out

        wrapped = comfy.samplers.KSAMPLER(watched, sampler.extra_options, sampler.inpaint_options)
        quiet, mask = not comfy.utils.PROGRESS_BAR_ENABLED, latent_image.get("noise_mask")
        guider.sample(noise, samples, wrapped, sigmas, denoise_mask=mask, disable_pbar=quiet, seed=seed)
        (end,) = finished
        rows = [numbers(shot, end, loss) for shot in shots]
        return io.NodeOutput(grid(shots, end, rows), end, text(rows, loss, end) + left_out(chosen, shots, sampler_name))


def parse_fractions(text: str) -> list[float]:
    """Numbers from 0 to below 1, rising. Raises ValueError, one sentence."""
    try:
        fractions = sorted({float(part) for part in text.replace(";", ",").split(",") if part.strip()})
    except ValueError:
        fractions = []
    if not fractions or fractions[0] < 0 or fractions[-1] >= 1:
        raise ValueError(
            f'The fractions are "{text}": give numbers from 0 to below 1 with commas, such as 0, 0.1, 0.5.'
        )
    return fractions


def left_out(fractions: list[float], shots: list[Shot], sampler_name: str) -> str:
    """Says at which fractions a sampler without fixed steps had no step; empty where it had all of them."""
    missing = [fraction for fraction in fractions if fraction not in {shot.fraction for shot in shots}]
    if not missing:
        return ""
    where = ", ".join(f"{100 * fraction:.0f} %" for fraction in missing)
    note = f"{sampler_name} takes as many steps as it likes, and ended before {where}, which the grid leaves out."
    logging.warning("[LCM-Lookahead] %s", note)
    return f"\n\n{note}"


class Numbers(NamedTuple):
    """The figures of one shot: for shortcut and x0 the batch's mean rmse, ssim and loss (None without one)."""

    fraction: float
    shortcut: tuple[float, float, float | None]
    x0: tuple[float, float, float | None]


def numbers(shot: Shot, end: Tensor, loss: LookaheadLoss | None) -> Numbers:
    """Measures how alike previews and finished pictures [n, H, W, 3] are."""

    def of(images: Tensor) -> tuple[float, float, float | None]:
        a, b = images.movedim(-1, 1), end.movedim(-1, 1)
        distances = float(root_mean_square(a, b).mean()), float(structural_similarity(a, b).mean())
        return *distances, loss_of(images, loss)

    return Numbers(shot.fraction, of(shot.shortcut), of(shot.x0))


def loss_of(images: Tensor, loss: LookaheadLoss | None) -> float | None:
    """The mean loss of IMAGEs over those that are valid; None where none is."""
    if loss is None:
        return None
    if loss.patchers:
        with torch.inference_mode(False):
            comfy.model_management.load_models_gpu(list(loss.patchers))
        images = images.to(loss.patchers[0].load_device)
    values, valid = loss.loss(images.movedim(-1, 1) * 2 - 1, None)
    return float(values[valid].mean()) if bool(valid.any()) else None


def text(rows: list[Numbers], loss: LookaheadLoss | None, end: Tensor) -> str:
    """The numbers as a Markdown table."""
    name = f" {loss.name} |" if loss else ""
    lines = [f"| steps done | preview | rmse | ssim |{name}", "|---|---|---|---|" + ("---|" if loss else "")]
    for row in rows:
        for which in ("shortcut", "x0"):
            rmse, ssim, value = getattr(row, which)
            last = "" if loss is None else f" {'-' if value is None else f'{value:.4f}'} |"
            lines.append(f"| {100 * row.fraction:.0f} % | {which} | {rmse:.4f} | {ssim:.4f} |{last}")
    value = loss_of(end, loss)
    if value is not None:
        lines.append(f"| 100 % | finished | 0 | 1 | {value:.4f} |")
    return "\n".join(lines)


def grid(shots: list[Shot], end: Tensor, rows: list[Numbers]) -> Tensor:
    """For each picture of the batch the shortcut's previews above, x0's below, the finished one at the right, labelled.

    The numbers in the labels are means over the batch.
    """
    height, width = end.shape[1:3]
    font = ImageFont.load_default(max(10, width // 16))  # so that a line is as wide as a picture, whatever its size
    line_height = round(1.4 * font.size)
    head = 2 * line_height + 6
    out = []
    for n in range(len(end)):
        sheet = Image.new("RGB", ((len(shots) + 1) * width, 2 * (height + head)), "white")
        draw = ImageDraw.Draw(sheet)

        def put(
            column: int, row: int, picture: Tensor, *labels: str, draw=draw, sheet=sheet, size=(width, height)
        ) -> None:
            x, y = column * size[0], row * (size[1] + head)
            for line, label in enumerate(labels):
                draw.text((x + 3, y + 3 + line_height * line), label, fill="black", font=font)
            sheet.paste(Image.fromarray((picture * 255).round().byte().numpy()), (x, y + head))

        for column, (shot, row) in enumerate(zip(shots, rows, strict=True)):
            for line, which in enumerate(("shortcut", "x0")):
                rmse, ssim, _ = getattr(row, which)
                label = f"{100 * shot.fraction:.0f} % {which}"
                put(column, line, getattr(shot, which)[n], label, f"rmse {rmse:.3f}  ssim {ssim:.2f}")
        put(len(shots), 0, end[n], "finished")
        data = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8)
        out.append(data.reshape(sheet.height, sheet.width, 3).float() / 255)
    return torch.stack(out)
