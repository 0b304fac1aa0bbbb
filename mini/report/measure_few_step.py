"""What the LoRAs of the mini world do, in figures with 95 % intervals: previews, few steps, collapse, one person.

Prompts are the captions of held-out people; every figure is over pictures that each have a seed of their own, and
methods are compared on the same prompts and seeds. The recogniser and the scorer are those that only measure.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from torch import Tensor

from ...evaluation.stats import Interval, Intervals, share
from ...lookahead.method.sampling import ddim_timesteps, sample_ddim
from ...lookahead.method.schedule import preview_latent
from ...sdxl import lora
from ..files import models
from ..files.weights import LORAS
from ..files.weights import evaluators as shipped_evaluators
from ..plan import FULL, IMAGE_SIZE, LATENT_SIZE, WEIGHTS, Plan
from ..stages import base, evaluators, lcm, stage, style_lora, vae
from ..stages.networks import EvaluationRecogniser, StyleScorer
from ..stages.text import TextEncoders, tokenize, tokenizer
from ..world import data
from ..world.faces import STYLES, Faces, render, sample_identities, sample_nuisance
from .measure import sample

SHARES = (0.0, 0.1, 0.25, 0.5)  # of the sampling steps done when the preview is made
DDIM_STEPS = 50
METHODS = ("x0", "x0 with CFG", "LCM-LoRA")
CHUNK = 32


class World(NamedTuple):
    """The base, the LoRAs that are there (attached at scale 0), and what measures."""

    unet: UNet2DConditionModel
    text: TextEncoders
    autoencoder: AutoencoderTiny
    loras: dict[str, lora.LoRA]
    recogniser: EvaluationRecogniser
    scorer: StyleScorer
    held_out: data.Pictures

    def picture(self, latent: Tensor) -> Tensor:
        """Latents [n, 4, h, w] -> pictures [n, 3, size, size] in [0, 1]."""
        return torch.cat([(self.autoencoder.decoder(z) / 2 + 0.5).clamp(0, 1) for z in latent.split(CHUNK)])

    def who(self, picture: Tensor) -> Tensor:
        return torch.cat([self.recogniser.embed(x) for x in picture.split(CHUNK)])

    def style(self, picture: Tensor) -> Tensor:
        return torch.cat([self.scorer(x)[0] for x in picture.split(CHUNK)]).argmax(1)

    def place(self, picture: Tensor) -> Tensor:
        return torch.cat([self.scorer(x)[1] for x in picture.split(CHUNK)]).argmax(1)


def open_world(folder: Path, plan: Plan) -> World:
    unet, text = base.load(folder)
    loras = {}
    for name in ("lcm_lora", "collapsed", "style_lora"):
        if (folder / f"{name}.safetensors").exists():
            loras[name] = lcm.load(folder, unet, name)
            loras[name].scale = 0.0
    held_out = data.pictures(folder, "held_out", plan.held_out_people, plan.styles, IMAGE_SIZE)
    return World(unet, text, vae.load(folder), loras, *evaluators.load(folder), held_out)


def shipped_world(weights: Path = WEIGHTS) -> World:
    """Opens the world of the shipped files; the held-out people are there by their captions alone, not drawn."""
    made = models.load(weights)
    loras = {}
    for name, file in LORAS.items():
        loras[name] = lora.load(stage.read_tensors(weights / file), made.unet, file).attach(made.unet)
        loras[name].scale = 0.0
    described = data.described("held_out", FULL.held_out_people, FULL.styles)
    return World(made.unet, made.text, made.vae, loras, *shipped_evaluators(weights), described)


def _interval(values: Tensor) -> Interval:
    """Mean of values [n] or [groups, n], interval by drawing the first axis."""
    return share(values.view(len(values), -1))


def _chosen(world: World, n: int, seed: int) -> Tensor:
    """n held-out pictures whose captions are the prompts."""
    return torch.randperm(len(world.held_out), generator=torch.Generator().manual_seed(seed))[:n]


# One-step previews (figure 2 of the paper)


class PreviewedRun(NamedTuple):
    """A finished run of the base and what could be foreseen on the way; a list entry for each of SHARES."""

    finished: Tensor
    steps: list[int]
    foreseen: dict[str, list[Tensor]]


@torch.no_grad()
def run_with_previews(world: World, prompts: list[str], seed: int, personal: bool = False) -> PreviewedRun:
    """DDIM with guidance, 50 steps, and the previews by each of METHODS at SHARES of them.

    `personal`: base and few-step model both with the LoRA of one person.
    """
    at = {round(s * DDIM_STEPS) for s in SHARES}
    positive, negative = (base.condition(*world.text(tokenize(tokenizer(), p))) for p in (prompts, [""]))
    z = torch.randn(len(prompts), 4, LATENT_SIZE, LATENT_SIZE, generator=torch.Generator().manual_seed(seed))
    alpha_bar, predict = base.alpha_bar(), partial(base.predict, world.unet)
    foreseen: dict[str, list[Tensor]] = {m: [] for m in METHODS}
    steps = []

    def foresee(now: dict[str, Any]) -> None:
        if now["i"] not in at:
            return
        x, t = now["x"], now["t"]
        with world.loras["lcm_lora"].at(1.0):
            few = predict(x, t, positive)
        for name, e in zip(METHODS, (predict(x, t, positive), now["e"], few), strict=True):
            foreseen[name].append(preview_latent(x, e, t, alpha_bar[t]))
        steps.append(int(t[0]))

    with world.loras["style_lora"].at(1.0) if personal else world.loras["lcm_lora"].at(0.0):
        guided = base.classifier_free(predict, positive, negative, lcm.GUIDANCE)
        z = sample_ddim(guided, z, ddim_timesteps(DDIM_STEPS), alpha_bar, foresee)
    return PreviewedRun(z, steps, foreseen)


@torch.no_grad()
def previews(world: World, n: int = 128, seed: int = 11, personal: bool = False) -> Intervals:
    """Distance of a preview to the picture that it foresees: mean squared error of the latents, and identity cosine."""
    chosen = _chosen(world, n, seed)
    captions = [world.held_out.short[i] if personal or k % 2 else world.held_out.long[i] for k, i in enumerate(chosen)]
    prompts = [style_lora.named(c) for c in captions] if personal else captions
    error: dict[tuple[str, int], list[Tensor]] = {}
    cosine: dict[tuple[str, int], list[Tensor]] = {}
    for first in range(0, n, CHUNK):
        run = run_with_previews(world, prompts[first : first + CHUNK], seed * 1000 + first, personal)
        finished = world.who(world.picture(run.finished))
        for name, foreseen in run.foreseen.items():
            for t, z in zip(run.steps, foreseen, strict=True):
                error.setdefault((name, t), []).append((z - run.finished).square().mean((1, 2, 3)))
                cosine.setdefault((name, t), []).append((world.who(world.picture(z)) * finished).sum(1))
    errors, cosines = ({k: torch.cat(v) for k, v in d.items()} for d in (error, cosine))
    figures = {}
    for s, t in zip(SHARES, run.steps, strict=True):
        for name in METHODS:
            figures[f"{s:.0%} (t={t}), {name}: latent MSE"] = _interval(errors[name, t])
            figures[f"{s:.0%} (t={t}), {name}: identity cosine"] = _interval(cosines[name, t])
        for other in METHODS[:2]:
            better = cosines["LCM-LoRA", t] - cosines[other, t]
            figures[f"{s:.0%} (t={t}), LCM-LoRA minus {other}: identity cosine"] = _interval(better)
            less = errors["LCM-LoRA", t] - errors[other, t]
            figures[f"{s:.0%} (t={t}), LCM-LoRA minus {other}: latent MSE"] = _interval(less)
    return figures


@torch.no_grad()
def contents(world: World, n: int = 128, seed: int = 15) -> Intervals:
    """Measure how often a preview of a run without a prompt shows the style and the place of the picture that it
    foresees: what guidance by words goes by, where nothing else asks for them. With CFG it is the same, as the guided
    and the unguided prompt are."""
    right: dict[tuple[str, int], list[Tensor]] = {}
    for first in range(0, n, CHUNK):
        run = run_with_previews(world, [""] * min(CHUNK, n - first), seed * 1000 + first)
        finished = world.picture(run.finished)
        for name in ("x0", "LCM-LoRA"):
            for t, z in zip(run.steps, run.foreseen[name], strict=True):
                shown = world.picture(z)
                hits = world.style(shown) == world.style(finished), world.place(shown) == world.place(finished)
                right.setdefault((name, t), []).append(torch.stack(hits, 1).double())
    shares = {key: torch.cat(hits) for key, hits in right.items()}
    figures: Intervals = {}
    for s, t in zip(SHARES, run.steps, strict=True):
        for column, what in enumerate(("style", "place")):
            x0, lcm = (shares[name, t][:, column] for name in ("x0", "LCM-LoRA"))
            for name, values in {"x0": x0, "LCM-LoRA": lcm, "LCM-LoRA minus x0": lcm - x0}.items():
                figures[f"{s:.0%} (t={t}), {name}: {what}"] = _interval(values)
    return figures


def draw_previews(world: World, prompts: list[str], path: Path, seed: int = 5, personal: bool = False) -> None:
    """PNG: rows are time steps, columns the methods and the finished picture, for every prompt side by side."""
    from PIL import Image, ImageDraw

    run = run_with_previews(world, prompts, seed, personal)
    columns = [*METHODS, "finished"]
    side, top, left, gap = IMAGE_SIZE, 34, 52, 14
    width = left + len(prompts) * (len(columns) * side + gap)
    sheet = Image.new("RGB", (width, top + len(run.steps) * side), "white")
    draw = ImageDraw.Draw(sheet)
    finished = world.picture(run.finished)
    for p, prompt in enumerate(prompts):
        x = left + p * (len(columns) * side + gap)
        draw.text((x + 4, 4), prompt, fill="black")
        for c, name in enumerate(columns):
            draw.text((x + c * side + 4, 18), name, fill="black")
    for r, (t, s) in enumerate(zip(run.steps, SHARES, strict=True)):
        draw.text((4, top + r * side + side // 2 - 12), f"{s:.0%}\nt={t}", fill="black")
        drawn = [*(world.picture(run.foreseen[m][r]) for m in METHODS), finished]
        for p in range(len(prompts)):
            for c, pictures in enumerate(drawn):
                pixels = (pictures[p].permute(1, 2, 0) * 255).round().byte().numpy()
                sheet.paste(
                    Image.fromarray(pixels), (left + p * (len(columns) * side + gap) + c * side, top + r * side)
                )
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


# Few steps against many


def drawers(world: World) -> dict[str, Callable[[list[str], torch.Generator], Tensor]]:
    """The ways to draw: prompts and random numbers -> latents."""

    def few(name: str, steps: int) -> Callable[[list[str], torch.Generator], Tensor]:
        def draw(prompts: list[str], numbers: torch.Generator) -> Tensor:
            with world.loras[name].at(1.0):
                return lcm.sample(world.unet, world.text, prompts, numbers, steps)

        return draw

    ways: dict[str, Callable[[list[str], torch.Generator], Tensor]] = {
        "base, 50 steps": lambda prompts, numbers: sample(
            partial(base.predict, world.unet), world.text, prompts, numbers, DDIM_STEPS, lcm.GUIDANCE
        )
    }
    if "lcm_lora" in world.loras:
        ways |= {"LCM-LoRA, 4 steps": few("lcm_lora", 4), "LCM-LoRA, 1 step": few("lcm_lora", 1)}
    if "collapsed" in world.loras:
        ways["collapsed, 1 step"] = few("collapsed", 1)
    return ways


def _draw(
    world: World, way: Callable[[list[str], torch.Generator], Tensor], prompts: list[str], seed: int
) -> tuple[Tensor, Tensor]:
    """Latents and pictures; the same seed gives every way the same first noise."""
    latents = []
    for first in range(0, len(prompts), CHUNK):
        latents.append(way(prompts[first : first + CHUNK], torch.Generator().manual_seed(seed * 1000 + first)))
    return torch.cat(latents), world.picture(torch.cat(latents))


@torch.no_grad()
def few_steps(world: World, n: int = 128, seed: int = 12, finds: Callable[[Tensor], Tensor] | None = None) -> Intervals:
    """Style, place and face (with `finds`: pictures -> bool [n]) of short prompts in 4 steps, 1 step and 50."""
    chosen = _chosen(world, n, seed)
    prompts = [world.held_out.short[i] for i in chosen]
    style, place = (world.held_out.labels[k][chosen] for k in ("style", "place"))
    figures, right = {}, {}
    for name, way in drawers(world).items():
        _, x = _draw(world, way, prompts, seed)
        right[name] = {"style": world.style(x) == style, "place": world.place(x) == place}
        if finds:
            right[name]["face found"] = finds(x)
        for what, hits in right[name].items():
            figures[f"{name}: {what}"] = _interval(hits.double())
        figures[f"{name}: sharpness"] = _interval(sharpness(x))
    for what in right["base, 50 steps"] if "LCM-LoRA, 4 steps" in right else ():
        less = right["LCM-LoRA, 4 steps"][what].double() - right["base, 50 steps"][what].double()
        figures[f"LCM-LoRA, 4 steps, minus base, 50 steps: {what}"] = _interval(less)
    return figures


def sharpness(picture: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, [n]."""
    rows, columns = picture[..., 1:, :] - picture[..., :-1, :], picture[..., 1:] - picture[..., :-1]
    return (rows.abs().mean((1, 2, 3)) + columns.abs().mean((1, 2, 3))) / 2


# How little a generator varies


@torch.no_grad()
def spread(world: World, prompts: int = 24, seeds: int = 6, seed: int = 13) -> Intervals:
    """Measures how pictures of one long caption differ between seeds: mean over pairs, interval by drawing prompts.

    Identity cosine (higher is less spread) and root mean square distance of pixels and latents (lower is less). The
    cosine between prompts tells whether a generator still heeds them; sharpness, that its sameness is no blur.
    """
    chosen = _chosen(world, prompts, seed)
    texts = [world.held_out.long[i] for i in chosen for _ in range(seeds)]
    style = world.held_out.labels["style"][chosen].repeat_interleave(seeds)
    pair = torch.triu(torch.ones(seeds, seeds, dtype=torch.bool), 1)
    figures = {}
    for name, way in drawers(world).items():
        z, x = _draw(world, way, texts, seed)
        who = world.who(x).view(prompts, seeds, -1)
        figures[f"{name}: identity cosine between seeds"] = _interval((who @ who.mT)[:, pair])
        for what, values in (("pixel", x), ("latent", z)):
            v = values.view(prompts, seeds, -1)
            apart = torch.cdist(v, v)[:, pair] / v.shape[-1] ** 0.5
            figures[f"{name}: {what} distance between seeds"] = _interval(apart)
        one = who[:, 0] @ who[:, 0].T
        others = one[~torch.eye(prompts, dtype=torch.bool)].view(prompts, -1)
        figures[f"{name}: identity cosine between prompts"] = _interval(others)
        figures[f"{name}: sharpness"] = _interval(sharpness(x).view(prompts, seeds))
        figures[f"{name}: style"] = _interval((world.style(x) == style).double().view(prompts, seeds))
    return figures


# One person


@torch.no_grad()
def person(world: World, n: int = 96, seed: int = 14) -> Intervals:
    """Is it the person? Identity cosine to new photos of them, in all styles and in photos, with the LoRA and without,
    with the few-step LoRA beside it, and with prompts that do not name them."""
    numbers = torch.Generator().manual_seed(style_lora.PERSON)
    identity = {k: v.expand(16) for k, v in sample_identities(1, numbers).items()}
    photo = torch.zeros(16, dtype=torch.long)
    new = Faces(identity, sample_nuisance(16, torch.Generator().manual_seed(seed), style=photo))
    known = torch.nn.functional.normalize(world.who(render(new, IMAGE_SIZE, seed=seed)).mean(0), dim=0)
    chosen = _chosen(world, n, seed)
    short = [world.held_out.short[i] for i in chosen]
    named = [style_lora.named(p) for p in short]
    style = world.held_out.labels["style"][chosen]
    ways = drawers(world)
    made = world.loras["style_lora"]
    cases = {
        "base, named": ("base, 50 steps", named, 0.0),
        "LoRA, named": ("base, 50 steps", named, 1.0),
        "LoRA, not named": ("base, 50 steps", short, 1.0),
    }
    if "lcm_lora" in world.loras:
        cases["LoRA and LCM-LoRA, 4 steps, named"] = ("LCM-LoRA, 4 steps", named, 1.0)
    figures = {}
    for name, (way, prompts, scale) in cases.items():
        with made.at(scale):
            _, x = _draw(world, ways[way], prompts, seed)
        cosine = world.who(x) @ known
        figures[f"{name}: identity cosine"] = _interval(cosine)
        photos = style == STYLES.index("photo")
        figures[f"{name}: identity cosine, photos"] = _interval(cosine[photos])
        figures[f"{name}: style"] = _interval((world.style(x) == style).double())
    return figures


def finder(folder: Path) -> Callable[[Tensor], Tensor]:
    """Does the mini world's detector see a face? Pictures -> bool [n], at insightface's threshold."""
    from ..stages import detector

    net = detector.load(folder)

    @torch.no_grad()
    def finds(picture: Tensor) -> Tensor:
        maps = net.maps((picture * 255 - 127.5) / 128)
        return torch.stack([score.sigmoid().amax((1, 2)) for score, _, _ in maps]).amax(0) > 0.5

    return finds


def measure(folder: Path, plan: Plan, n: int = 128) -> dict[str, Intervals]:
    """All of it over n pictures each, and the preview pictures in `folder`; faces are looked for when the detector is
    trained."""
    world = open_world(folder, plan)
    finds = finder(folder) if (folder / "detector.safetensors").exists() else None
    prompts = ["a photo of a face in a forest", "a pencil drawing of a face", "a comic of a face at night"]
    draw_previews(world, prompts, folder / "previews.png")
    out = {
        "previews": previews(world, n),
        "few steps": few_steps(world, n, finds=finds),
        "spread": spread(world, prompts=max(2, n // 5)),
    }
    if "style_lora" in world.loras:
        named = [style_lora.named(p) for p in prompts]
        draw_previews(world, named, folder / "previews_of_one_person.png", personal=True)
        out |= {"person": person(world, n), "previews of one person": previews(world, n, personal=True)}
    return out
