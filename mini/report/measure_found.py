"""What insightface finds in generated pictures, samples and previews, and how far the two recognisers agree."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...evaluation.stats import Interval, identity_auc, own_and_other, proportion, share
from ...lookahead.vision.faces import misfit
from ..plan import Plan
from ..stages import evaluators, stage
from ..world.faces import PLACES, STYLES
from . import measure_few_step
from .measure import CHUNK, SAMPLES, Measurement, held_out, roc, short_prompt
from .measure_faces import landmark_error, look, rank_correlation

if TYPE_CHECKING:
    from insightface.app import FaceAnalysis

PREVIEWS_SEED = 24


def in_samples(folder: Path, plan: Plan, app: FaceAnalysis) -> Measurement:
    """Faces in the base's samples by style; in photos also whether the five landmarks lie as a face's do in the
    recogniser's crop, with drawn photos for comparison."""
    kept = stage.read_tensors(folder / "report" / SAMPLES)
    found, pictures = look(app, kept["pictures"].float() / 255), held_out(folder, plan)
    figures: dict[str, Interval | float] = {}
    for s in plan.styles:
        figures[f"face found, {s}"] = proportion(found.there[kept["style"] == STYLES.index(s)])
    photo = kept["style"] == STYLES.index("photo")
    figures["more than one face, photo"] = proportion(found.faces[photo] > 1)
    drawn = look(app, pictures.images(torch.arange(0, len(pictures), pictures.per_person)))
    usual, ours = misfit(drawn.points[drawn.there]), misfit(found.points[photo & found.there])
    if len(usual) > 1 and len(ours) > 1:
        limit = usual.quantile(0.99)
        figures["landmarks' distance from the crop's template in pixels, photo"] = share(ours[:, None])
        figures["landmarks' distance from the crop's template in pixels, drawn photos"] = share(usual[:, None])
        figures["limit in pixels: 99 of 100 drawn photos are nearer"] = limit.item()
        figures["landmarks within the limit, photo"] = proportion(ours <= limit)
    return Measurement(figures, f"{len(kept['style'])} samples of the base, {int(photo.sum())} of them photos")


@torch.no_grad()
def in_previews(folder: Path, plan: Plan, app: FaceAnalysis) -> Measurement:
    """Faces in one-step previews of photos, and how far their landmarks are from those of the finished picture."""
    world, n = measure_few_step.open_world(folder, plan), min(CHUNK, plan.report_prompts)
    prompts = [short_prompt(STYLES.index("photo"), i % len(PLACES)) for i in range(n)]
    run = measure_few_step.run_with_previews(world, prompts, PREVIEWS_SEED)
    finished = look(app, world.picture(run.finished))
    figures: dict[str, Interval | float] = {"face found, finished picture": proportion(finished.there)}
    for number, (part, t) in enumerate(zip(measure_few_step.SHARES, run.steps, strict=True)):
        for method, foreseen in run.foreseen.items():
            found = look(app, world.picture(foreseen[number]))
            name = f"{part:.0%} (t={t}), {method}"
            figures[f"{name}: face found"] = proportion(found.there)
            both = found.there & finished.there
            if both.sum() > 1:
                apart = landmark_error(found.points[both], finished.points[both])
                figures[f"{name}: landmarks' distance in eye distances"] = share(apart[:, None])
    return Measurement(figures, f"{n} photos on short prompts, {measure_few_step.DDIM_STEPS} DDIM steps")


@torch.no_grad()
def two_recognisers(folder: Path, plan: Plan, app: FaceAnalysis) -> Measurement:
    """Do the loss's recogniser, through insightface, and the evaluation recogniser order hard pairs alike?"""
    pictures = held_out(folder, plan)
    judge, _ = evaluators.load(folder)
    shape = (plan.held_out_people, pictures.per_person, -1)
    everyone = pictures.images(torch.arange(len(pictures)))
    ours = look(app, everyone).embedding.view(shape)
    theirs = torch.cat([judge.embed(x) for x in everyone.split(CHUNK)]).view(shape)
    figures: dict[str, Interval | float] = dict(
        rank_correlation(ours, theirs, pictures.labels["identity"].view(shape)[:, 0])
    )
    alike = torch.stack([ours[:, i] @ ours[:, 0].T for i in range(2, pictures.per_person)], 1)
    figures["face recogniser AUC, photo to styled"] = identity_auc(alike, rounds=100)
    curve = roc(*own_and_other(alike, torch.arange(plan.held_out_people)))
    basis = f"{len(pictures)} drawn pictures of {plan.held_out_people} held-out people"
    return Measurement(figures, basis, {"face recogniser through insightface, photo to styled": curve})
