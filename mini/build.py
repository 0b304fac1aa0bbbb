"""`lookahead mini build`: every stage in order, skipped when its result is there, resumed when it was stopped."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .files import models, weights
from .plan import IMAGE_SIZE, QUICK, Plan
from .stages import (
    base,
    clip,
    collapsed,
    controlnet,
    detector,
    evaluators,
    face_recogniser,
    image_encoder,
    image_prompt,
    lcm,
    style_lora,
    things,
    things_vision,
    vae,
)
from .world import data

# glibc gives large blocks back to the system at once, and every training step pays for fetching them again, page by
# page. Seen on a busy machine with two cores: a step of the image encoder took 0.25 s without and 0.11 s with these.
_KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def keep_memory() -> None:
    """Start this command anew with settings that keep freed memory in the process (glibc on a machine without GPU)."""
    if torch.cuda.is_available() or platform.libc_ver()[0] != "glibc" or _KEEP_MEMORY.keys() <= os.environ.keys():
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **_KEEP_MEMORY})


def stages(folder: Path, plan: Plan) -> dict[str, Callable[[], None]]:
    """The stages by name. A stage reads the results of those before it from `folder`."""

    def people(group: str) -> data.Pictures:
        count = {"train": plan.people, "evaluation": plan.evaluation_people, "portraits": plan.portraits}[group]
        return data.pictures(folder, group, count, ("photo",) if group == "portraits" else plan.styles, IMAGE_SIZE)

    def latents(pictures: data.Pictures, group: str = "train") -> torch.Tensor:
        return vae.encode_all(folder, pictures, group)

    def train_base() -> None:
        pictures = people("train")
        base.train(folder, pictures, latents(pictures), plan)

    def train_decoder() -> None:
        pictures = people("train")
        vae.train_decoder(folder, pictures, latents(pictures), plan)

    def sharpen() -> None:
        pictures = people("train")
        vae.sharpen(folder, pictures, latents(pictures), plan)

    def photo_groups() -> image_prompt.Groups:
        groups = [(people(group), group) for group in ("train", "portraits")]
        return [(pictures, latents(pictures, group)) for pictures, group in groups]

    def train_controlnet() -> None:
        pictures = people("train")
        controlnet.train(folder, pictures, latents(pictures), plan)

    def train_lcm_lora() -> None:
        pictures = people("train")
        lcm.train(folder, pictures, latents(pictures), plan)

    def train_style_lora() -> None:
        pictures = people("train")
        style_lora.train(folder, pictures, latents(pictures), plan)

    def train_things_lora() -> None:
        # The base of this build, or the shipped one where this build has none of its own.
        parts = models.load() if not (folder / "base.safetensors").exists() else (*base.load(folder), vae.load(folder))
        frozen = things.FrozenParts(*parts)
        shown = data.thing_pictures(folder, "things", plan.things, IMAGE_SIZE)
        faces = data.pictures(folder, "train", plan.things_faces, plan.styles, IMAGE_SIZE)
        groups = (
            (shown, things.latents(folder, frozen, shown, "things")),
            (faces, things.latents(folder, frozen, faces, "things-faces")),
        )
        things.train(folder, frozen, *groups, plan)

    def train_things_judge() -> None:
        shown = data.thing_pictures(folder, "things_judge", plan.judged_things, IMAGE_SIZE)
        evaluators.train_thing_judge(folder, shown, plan)

    def train_things_scorer() -> None:
        shown = data.thing_pictures(folder, "things_judge", plan.judged_things, IMAGE_SIZE)
        faces = data.pictures(folder, "evaluation", plan.scored_people, plan.styles, IMAGE_SIZE)
        evaluators.train_things_scorer(folder, shown, faces, plan)

    def train_things_vision() -> None:
        own = (folder / "image_encoder.safetensors").exists()
        start = image_encoder.load(folder) if own else models.load_image_encoder()
        shown = data.thing_pictures(folder, "things", plan.things, IMAGE_SIZE)
        faces = data.pictures(folder, "train", plan.things_faces, plan.styles, IMAGE_SIZE)
        things_vision.train(folder, start, shown, faces, plan)

    return {
        "vae": lambda: vae.train(folder, people("train"), plan),
        "base": train_base,
        "decoder": train_decoder,
        "sharpen": sharpen,
        "image_encoder": lambda: image_encoder.train(folder, [people("train"), people("portraits")], plan),
        "image_prompt": lambda: image_prompt.train(folder, photo_groups(), plan),
        "overfit": lambda: image_prompt.overfit(folder, photo_groups(), plan),
        "recogniser": lambda: evaluators.train_recogniser(folder, people("evaluation"), plan),
        "style_scorer": lambda: evaluators.train_style_scorer(folder, people("evaluation"), plan),
        "detector": lambda: detector.train(folder, people("train"), plan),
        "face_recogniser": lambda: face_recogniser.train(folder, people("train"), plan),
        "lcm_lora": train_lcm_lora,
        "collapsed": lambda: collapsed.train(folder, people("train"), plan),
        "style_lora": train_style_lora,
        "controlnet": train_controlnet,
        "clip": lambda: clip.train(folder, people("train"), plan),
        "things_judge": train_things_judge,
        "things_scorer": train_things_scorer,
        "things_lora": train_things_lora,
        "things_vision": train_things_vision,
    }


def build(folder: Path, plan: Plan = QUICK, only: list[str] | None = None, export_to: Path | None = None) -> None:
    """Run the stages (all, or those named); when all are done, write the files to ship and the report.

    The files go to `export_to`, by default to <folder>/weights: the package's own are frozen.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    todo = stages(folder, plan)
    for name in only or todo:
        if name not in todo:
            raise SystemExit(f"There is no stage {name!r} in the mini world's build; stages are {', '.join(todo)}.")
        result, started = folder / f"{name}.safetensors", time.monotonic()
        if result.exists():
            print(f"{name}: done before ({result.name})", flush=True)
            continue
        todo[name]()
        print(f"{name}: done in {(time.monotonic() - started) / 60:.1f} min", flush=True)
    if all((folder / f"{name}.safetensors").exists() for name in todo):
        to = export_to or folder / "weights"
        weights.export(folder, to)
        from .report.report import report  # reads more libraries than the stages need

        page = report(folder, plan, to)
        print(f"Weights are in {to}, the report is {page}.")
