"""Does lookahead guidance steer a picture, and better than guidance by x0? Measured in the real host.

Each loss (identity, CLIP, LPIPS) steers pictures without guidance, guided by the
shortcut's preview (lookahead) and by plain x0. Who judges took no part in the loss: another recogniser, a style
scorer, LPIPS with another network. Writes docs/guidance.md, .json and a picture for each loss, and with the stronger
optimiser of a preset alone docs/guidance_strong.md; `presets` compares the presets of the guidance by the identity loss
into docs/guidance_presets.md likewise, and where those of other papers are among them into docs/guidance_papers.md.
"""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ...evaluation.stats import Interval
from ...evaluation.stats import share as share_of_rows
from ...host.graph import Graph, Link
from ...lookahead.method.guidance_presets import (
    BALANCED,
    DPS,
    DSG,
    FREEDOM,
    GENTLE,
    INSTANT,
    ITERATION,
    MPGD,
    OFF,
    PRESETS,
    QUICK,
    RENO,
    STRONG,
    TFG,
    GuidanceSettings,
    best_of_as_many,
)
from ...lookahead.vision.perceptual import lpips_network
from ...tools.common import Problem
from ..files.host_models import NOISE_GUIDE
from ..files.weights import evaluators
from ..world.faces import PLACES as ALL_PLACES
from ..world.faces import STYLES as ALL_STYLES
from ..world.references import reference_faces
from .drawing import draw_kept, null_text
from .study import CFG, PEOPLE, SIZE, STYLES, Table, prompt_of, render, sheet, write_page

SAMPLER, SCHEDULER, STEPS = "ddim", "ddim_uniform", 50  # the paper's
BATCH = 8  # pictures drawn at once, each towards a reference of its own
NONE, X0, LOOKAHEAD = "unguided", "plain x0", "lookahead"
IDENTITY, CLIP, LPIPS = "identity", "CLIP", "LPIPS"
LOSSES = (IDENTITY, CLIP, LPIPS)
PLACES = ("in a forest", "on a beach", "in a city", "at night", "in the snow")


@dataclass(frozen=True)
class GuidanceArm:
    """It says how pictures are guided.

    kind: of preview; settings: inputs of the guidance sampler that are not its defaults; zeros: whether the null text
    is zeros, else the encoding of an empty prompt; views: of the face, for the identity loss; denoise: below 1 it draws
    from the reference, image to image; noise_guide: whether the shipped one acts.
    """

    kind: str = NONE
    settings: Mapping[str, float | str] = field(default_factory=dict)
    zeros: bool = False
    views: int = 0
    denoise: float = 1.0
    noise_guide: bool = False


EARLY = {"start": 0.04}  # two of 50 steps are done, instead of six
STRONGER = {X0: f"{X0}, {STRONG}", LOOKAHEAD: f"{LOOKAHEAD}, {STRONG}"}  # by the preset, whose optimiser is ours
ARMS = {NONE: GuidanceArm(), X0: GuidanceArm(X0), LOOKAHEAD: GuidanceArm(LOOKAHEAD)} | {
    name: GuidanceArm(kind, {"preset": STRONG}) for kind, name in STRONGER.items()
}
IDENTITY_ARMS = ARMS | {
    f"{X0}, earlier": GuidanceArm(X0, EARLY),
    f"{LOOKAHEAD}, earlier": GuidanceArm(LOOKAHEAD, EARLY),
}
BASELINES = {LOOKAHEAD: X0, STRONGER[LOOKAHEAD]: STRONGER[X0], f"{LOOKAHEAD}, earlier": f"{X0}, earlier"}
PRESETS_SHOWN = (INSTANT, GENTLE, BALANCED, STRONG, QUICK)
BY_X0 = (DPS, MPGD, FREEDOM, DSG)  # the methods of their papers; the other presets look ahead
OF_PAPERS = (*BY_X0, RENO, TFG)
CUSTOM = "the node's own numbers"
AS_MANY, OVER_INSTANT = "the best of as many", f"gain over {INSTANT}"
VIEWS = 4  # of the face, in place of its one crop
VIEWED = f"{BALANCED}, {VIEWS} views"
REDRAWN = 0.7  # denoise of the baseline that draws from the reference itself
IMAGE_TO_IMAGE = f"image to image, denoise {REDRAWN:g}"
#: The noise guide alone, and with a preset's iterations on top -> that preset
BY_NOISE_GUIDE = {"noise guide": OFF} | {f"noise guide, then {name}": name for name in (GENTLE, BALANCED)}


def style_of(batch: int) -> str:
    """The style of a batch's prompt."""
    return STYLES[batch % len(STYLES)]


def words_of(batch: int) -> str:
    """Says what the CLIP loss asks for: a style and a place."""
    return f"{prompt_of(style_of(batch))} {PLACES[batch % len(PLACES)]}"


def graph(loss: str, references: Sequence[str], batch: int, seed: int, arms: dict[str, GuidanceArm]) -> Graph:
    """Every arm with one batch of references, all from the same noise (API format); SaveImage nodes are the arms."""
    nodes = Graph()
    add = nodes.add
    base = add("base", "CheckpointLoaderSimple", ckpt_name="sd_xl_base_1.0.safetensors")
    clip: Link = ["base", 1]
    vae: Link = ["base", 2]
    lcm = add(
        "LCM",
        "LoraLoaderModelOnly",
        model=base,
        lora_name="lcm-lora-sdxl.safetensors",
        strength_model=1.0,
    )
    pictures = nodes.pictures(references)
    losses = {views: _loss(nodes, loss, pictures, batch, views) for views in {arm.views for arm in arms.values()}}
    latent = add("latent", "EmptyLatentImage", width=SIZE, height=SIZE, batch_size=len(references))
    prompt = "" if loss == CLIP else prompt_of(style_of(batch))  # CLIP is to say it all
    positive = add("positive", "CLIPTextEncode", clip=clip, text=prompt)
    guiders = {
        zeros: add(f"guider {zeros}", "CFGGuider", model=base, positive=positive, negative=negative, cfg=CFG)
        for zeros, negative in null_text(nodes, clip).items()
    }
    plain = add("sampler", "KSamplerSelect", sampler_name=SAMPLER)
    noise = add("noise", "RandomNoise", noise_seed=seed)
    scheduler = {"model": base, "scheduler": SCHEDULER, "steps": STEPS}
    sigmas = add("sigmas", "BasicScheduler", **scheduler, denoise=1.0)
    for name, arm in arms.items():
        sampler = plain
        if arm.kind != NONE:
            kind = {X0: "plain x0", LOOKAHEAD: "one-step"}[arm.kind]
            more: dict[str, Link] = {}
            if arm.noise_guide:
                more["noise_guide"] = add(f"{name} noise guide", "LookaheadLoadNoiseGuide", guide_name=NOISE_GUIDE)
            shortcut = add(
                f"{name} shortcut", "LookaheadShortcut", model=base if arm.kind == X0 else lcm, vae=vae, kind=kind
            )
            sampler = add(
                f"{name} guidance",
                "LookaheadGuidanceSampler",
                sampler=plain,
                shortcut=shortcut,
                loss=losses[arm.views],
                **arm.settings,
                **more,
            )
        part = {"sigmas": sigmas, "latent_image": latent}
        if arm.denoise < 1:
            small = {"upscale_method": "area", "width": SIZE, "height": SIZE, "crop": "disabled"}
            scaled = add(f"{name} scaled", "ImageScale", image=pictures, **small)
            part = {
                "sigmas": add(f"{name} sigmas", "BasicScheduler", **scheduler, denoise=arm.denoise),
                "latent_image": add(f"{name} encoded", "VAEEncode", pixels=scaled, vae=vae),
            }
        guider = guiders[arm.zeros]
        drawn = add(f"{name} samples", "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, **part)
        pixels = add(f"{name} decode", "VAEDecode", samples=drawn, vae=vae)
        add(name, "SaveImage", images=pixels, filename_prefix="evaluate/guided")
    return nodes


def _loss(nodes: Graph, loss: str, pictures: Link, batch: int, views: int) -> Link:
    add = nodes.add
    if loss == IDENTITY:
        faces = add("faces", "LookaheadLoadFaceAnalysis", pack_name="buffalo_l", device="cpu")
        read = {"face_analysis": faces, "image": pictures, "several": "one per picture"}
        return add(f"loss {views}", "LookaheadIdentityLoss", **read, views=views)
    if loss == CLIP:
        return add("loss", "LookaheadCLIPLoss", clip_name="clip-vit-large-patch14.safetensors", text=words_of(batch))
    return add("loss", "LookaheadLPIPSLoss", image=pictures, size=SIZE, weights="random")


class DrawnArms(NamedTuple):
    """References [count, 3, 128, 128], by arm what the host drew towards them, of the same shape, and the host's
    processor time for a picture in seconds, the median of its batches."""

    references: Tensor
    pictures: dict[str, Tensor]
    seconds: dict[str, float]


def draw(loss: str, arms: dict[str, GuidanceArm], count: int, first: int = 0) -> DrawnArms:
    """Draws `count` people from the number `first` on in every arm."""
    references = reference_faces(count, first=first)
    files = [f"face-{number}.png" for number in range(first, first + count)]
    batches = list(enumerate(files[begin : begin + BATCH] for begin in range(0, count, BATCH)))
    # A graph an arm, so that another arm draws none of these again.
    asked = [(name, batch, names) for batch, names in batches for name in arms]
    seeds = [1000 * batch + first for _, batch, _ in asked]
    work = [
        (graph(loss, names, batch, seed, {name: arms[name]}), (name,))
        for seed, (name, batch, names) in zip(seeds, asked, strict=True)
    ]
    kept = draw_kept(loss, work, dict(zip(files, references, strict=True)))
    of_arm = {name: [one for (of, _, _), one in zip(asked, kept, strict=True) if of == name] for name in arms}
    pictures = {name: torch.cat([one.pictures[name] for one in ones]) for name, ones in of_arm.items()}
    seconds = {name: statistics.median(one.seconds for one in ones) / BATCH for name, ones in of_arm.items()}
    return DrawnArms(references, pictures, seconds)


def measure(loss: str, references: Tensor, drawn: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Measures a value a picture [n], by arm and measure: what the loss is about, and what guidance may damage."""
    recogniser, scorer = evaluators()
    batches = [number // BATCH for number in range(len(references))]
    style = torch.tensor([ALL_STYLES.index(style_of(b)) for b in batches])
    place = torch.tensor([ALL_PLACES.index(PLACES[b % len(PLACES)]) for b in batches])
    lpips = lpips_network("alex", None) if loss == LPIPS else None
    values = {}
    clipped = {arm: _clipped(pictures) for arm, pictures in drawn.items()}
    with torch.no_grad():
        targets = recogniser.embed(references)
        for arm, pictures in drawn.items():
            styles, places = (part.argmax(1) for part in scorer(pictures))
            if lpips is not None:
                figures = {"LPIPS distance (alex)": lpips(pictures * 2 - 1, references * 2 - 1).flatten()}
                figures["PSNR at 16 pixels (dB)"] = _psnr(pictures, references)
                figures["style of the prompt"] = (styles == style).float()
            elif loss == CLIP:
                figures = {"style asked for": (styles == style).float(), "place asked for": (places == place).float()}
            else:
                figures = {"similarity to the reference": (recogniser.embed(pictures) * targets).sum(1)}
                figures["style of the prompt"] = (styles == style).float()
            figures["fine detail"] = _detail(pictures)
            figures["burnt"] = (clipped[arm] > clipped[NONE].max()).float()
            values[arm] = figures
    return values


def _clipped(pictures: Tensor) -> Tensor:
    """The share of a picture's places where a colour is at its end: much of it is what is called burnt."""
    return ((pictures <= 1 / 255) | (pictures >= 254 / 255)).any(1).float().mean((1, 2))


def _detail(pictures: Tensor) -> Tensor:
    """Mean size of the Laplacian: noise and artefacts raise it, blur lowers it."""
    grey = pictures.mean(1, keepdim=True)
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).view(1, 1, 3, 3)
    return functional.conv2d(grey, kernel).abs().mean((1, 2, 3))


def _psnr(pictures: Tensor, references: Tensor) -> Tensor:
    """PSNR [n] in dB of the pictures shrunken to 16 pixels."""
    small, target = (functional.adaptive_avg_pool2d(x, 16) for x in (pictures, references))
    error = (small - target).square().mean((1, 2, 3))
    return -10 * error.log10()


def intervals(
    values: dict[str, dict[str, Tensor]],
    together: int = 1,
    baselines: Mapping[str, str] = BASELINES,
    over: str = "x0",
) -> Table:
    """Gives the mean with its interval, by arm and measure; for all arms but the first also what they gain over it.

    together: how many neighbours are no independent pictures, and are drawn as one; baselines: what else an arm is
    compared with, which the figure calls `over`.
    """

    def share(column: Tensor) -> Interval:
        return share_of_rows(column[: len(column) // together * together].reshape(-1, together))

    first, *others = values
    figures = {arm: {name: share(v[:, None]) for name, v in of_arm.items()} for arm, of_arm in values.items()}
    for arm in others:
        for name, v in values[arm].items():
            figures[arm][f"{name}, gain"] = share((v - values[first][name])[:, None])
    for arm, baseline in baselines.items():
        for name, v in values.get(arm, {}).items():
            figures[arm][f"{name}, gain over {over}"] = share((v - values[baseline][name])[:, None])
    return figures


def page(figures: dict[str, Table], count: int, first: int = 0) -> str:
    """docs/guidance.md, or docs/guidance_strong.md where no arm has the node's numbers. first: number of the first of
    the people."""
    losses = {}
    for loss, arms in figures.items():
        names = list(arms[NONE])
        gains = [f"{name}, {what}" for name in names[:2] for what in ("gain", "gain over x0")]
        rows = [*names, *(name for name in gains if any(name in f for f in arms.values()))]
        losses[loss] = {"arms": arms, "rows": rows}
    setup = {"steps": STEPS, "sampler": SAMPLER, "scheduler": SCHEDULER, "cfg": CFG, "batch": BATCH}
    drawn = {arm for arms in figures.values() for arm in arms}
    numbers = bool(drawn - {NONE, *STRONGER.values()})
    about = {
        "stronger": STRONG if drawn & set(STRONGER.values()) else "",
        "numbers": numbers,
        "losses_named": "" if numbers else " ".join(figures),
        "first": first,
        "burnt": any("burnt" in of_arm for arms in figures.values() for of_arm in arms.values()),
    }
    return render("guidance.md.jinja", losses=losses, count=count, **about, **setup)


def evaluate(count: int, out: Path, first: int = 0, losses: Sequence[str] = ()) -> None:
    """Draw, measure and write: guidance.md, .json and a picture for each loss, into `out`.

    losses: some of LOSSES, of which the arms with the stronger optimiser alone are drawn, into guidance_strong.md.
    Raises Problem for a name that is no loss.
    """
    if unknown := [name for name in losses if name not in LOSSES]:
        raise Problem(f"there is no loss {unknown[0]!r}: give some of {', '.join(LOSSES)}, or none.")
    figures, name = {}, "guidance_strong" if losses else "guidance"
    out.mkdir(parents=True, exist_ok=True)
    strong = {arm: ARMS[arm] for arm in (NONE, *STRONGER.values())}
    for loss in losses or LOSSES:
        arms = strong if losses else IDENTITY_ARMS if loss == IDENTITY else ARMS
        references, drawn, _ = draw(loss, arms, count, first)
        together = BATCH if loss == CLIP else 1  # the pictures of a batch share the words that steer them
        figures[loss] = intervals(measure(loss, references, drawn), together)
        shown = drawn if loss == CLIP else {"reference": references, **drawn}  # words have no picture
        sheet(shown, out / f"{name}_{loss.lower()}.jpg")
    write_page(out, name, figures, page(figures, count, first))


# -- the presets, side by side


def preset_arms(names: Sequence[str] = ()) -> tuple[dict[str, GuidanceArm], dict[str, str], dict[str, float]]:
    """The arms of a comparison of presets; by preset the arm of the best of as many noises as its evaluations can look
    at, drawn in full without iterations; and what each takes, in evaluations of the UNet beside the run.

    names: of presets, or of BY_NOISE_GUIDE; without, PRESETS_SHOWN and those, the node's own numbers, and one with
    views of the face. Raises Problem for a name that is no preset.
    """
    known = (*PRESETS, *BY_NOISE_GUIDE)
    if unknown := [name for name in names if name not in known]:
        raise Problem(f"there is no preset {unknown[0]!r}: give some of {', '.join(known)}, or none.")
    arms, baselines = {NONE: GuidanceArm(), IMAGE_TO_IMAGE: GuidanceArm(denoise=REDRAWN)}, {}
    costs = dict.fromkeys(arms, 0.0)
    for name in names or (CUSTOM, *PRESETS_SHOWN, *BY_NOISE_GUIDE):
        kind, preset = X0 if name in BY_X0 else LOOKAHEAD, BY_NOISE_GUIDE.get(name, name)
        settings = PRESETS.get(preset, GuidanceSettings())
        if name in BY_NOISE_GUIDE:  # it takes the place of the lean, at the same cost
            settings = replace(settings, lean=1.0)
        iteration = ITERATION["x0" if kind == X0 else "lookahead"]
        settings = settings.without_chance() if kind == X0 else settings
        baseline = best_of_as_many(settings, iteration, STEPS)
        arms[name] = GuidanceArm(kind, {} if name == CUSTOM else {"preset": preset}, noise_guide=name in BY_NOISE_GUIDE)
        costs[name] = settings.evaluations(iteration, STEPS)
        baselines[name] = NONE if baseline.best_of == 1 else f"best of {baseline.best_of}"
        if baselines[name] != NONE:
            looks = {"start": baseline.start, "iterations": 0, "best_of": baseline.best_of}
            arms[baselines[name]], costs[baselines[name]] = GuidanceArm(LOOKAHEAD, looks), float(baseline.best_of)
    if not names:
        arms[VIEWED], costs[VIEWED] = replace(arms[BALANCED], views=VIEWS), costs[BALANCED]
    return arms, baselines, costs


def presets_name(arms: Collection[str]) -> str:
    """The file of a comparison of presets, without its ending: those of other papers have one of their own."""
    return "guidance_papers" if set(OF_PAPERS) & set(arms) else "guidance_presets"


def presets_page(figures: Table, costs: Mapping[str, float], seconds: Mapping[str, float], people: range) -> str:
    """docs/guidance_presets.md or guidance_papers.md. people: the numbers of those who were drawn."""
    measures = list(figures[NONE])
    named = [] if CUSTOM in figures else [name for name in figures if name in PRESETS or name in BY_NOISE_GUIDE]
    first = ["--references", str(len(people))] if len(people) != PEOPLE["presets"] else []
    first += ["--first", str(people.start)] if people.start else []
    gains = (f"{name}, {what}" for name in measures[:2] for what in ("gain", f"gain over {AS_MANY}"))
    columns = [*measures, *gains, f"{measures[0]}, {OVER_INSTANT}"]
    columns = [column for column in columns if any(column in of_arm for of_arm in figures.values())]
    setup = {"steps": STEPS, "sampler": SAMPLER, "scheduler": SCHEDULER, "cfg": CFG, "batch": BATCH}
    return render(
        "guidance_presets.md.jinja",
        command=shlex.join(["lookahead", "evaluate", "--presets", *named, *first]),
        arms=figures,
        columns=columns,
        costs=costs,
        seconds=seconds,
        name=presets_name(figures),
        by_x0=[name for name in BY_X0 if name in figures],
        sources={name: PRESETS[name].source for name in OF_PAPERS if name in figures},
        people=people,
        **setup,
    )


def evaluate_presets(count: int, out: Path, names: Sequence[str] = (), first: int = 0) -> None:
    """Draw, measure and write presets (PRESETS_SHOWN where none is named) beside the best of as many noises:
    guidance_presets.md, or guidance_papers.md where one of OF_PAPERS is named, .json and a picture, into `out`."""
    arms, baselines, costs = preset_arms(names)
    out.mkdir(parents=True, exist_ok=True)
    references, drawn, seconds = draw(IDENTITY, arms, count, first)
    values = measure(IDENTITY, references, drawn)
    figures = intervals(values, baselines=baselines, over=AS_MANY)
    if INSTANT in values:
        likeness = next(iter(values[INSTANT]))
        for name in (*PRESETS_SHOWN[1:], *BY_NOISE_GUIDE):
            if name in values:
                more = values[name][likeness] - values[INSTANT][likeness]
                figures[name][f"{likeness}, {OVER_INSTANT}"] = share_of_rows(more[:, None])
    sheet({"reference": references, **drawn}, out / f"{presets_name(arms)}.jpg")
    page = presets_page(figures, costs, seconds, range(first, first + count))
    write_page(out, presets_name(arms), figures, page)
