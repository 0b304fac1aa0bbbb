"""The sections of a configuration that belong to LCM-Lookahead (arXiv 2404.03620): models, data, losses, rates."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..config import BaseData, BaseModels, BaseOptimiser, Count, Place, Positive, RunConfig, Section, Share, set_value


class Model(BaseModels):
    """Files of the frozen models, and where training starts."""

    start: Place = Field(description="encoder to start from: a stock IP-Adapter Plus or an encoder file")
    shortcut: Place | None = Field(None, description="few-step LoRA of the previews (LCM-LoRA), in the public layout")
    vae: Place | None = Field(None, description="tiny autoencoder (TAESD) that decodes the previews")
    picture_vae: Place | None = Field(
        None, description="autoencoder that encodes the images; by default the base's own"
    )
    image_encoder: Place | None = Field(None, description="CLIP image encoder of the image prompt (ViT-H/14)")
    recogniser: Place | None = Field(None, description="face recognition network of the identity loss (ArcFace)")
    detector: Place | None = Field(
        None, description="insightface pack whose detector finds faces in images and previews"
    )
    kv: bool = Field(True, description="train a KV encoder; false is the paper's ablation without")
    kv_rank: Count = Field(4, description="LoRA rank of the KV encoder")
    export_rank: Count = Field(4, description="LoRA rank of the keys and values that the KV encoder exports")


class Data(BaseData):
    """Names the data that a run trains on."""

    source: Place = Field(
        description="folder with a folder a person, or with shards; address of shards (s3://...); `mini`: drawn people"
    )
    people: Count = Field(3000, description="number of people that are drawn, of the mini world")
    kv_prompt: str = Field("a photo of a face", description="the KV encoder's text outside of training")
    metadata: Place | None = Field(None, description="JSON lines or CSV: file_name, and where known text and person")
    caption: str = Field("a photo of a face", description="caption of images that have no text")
    size: Annotated[int, Field(ge=64, multiple_of=32)] = Field(1024, description="resolution: pixels a side")
    reference_margin: Annotated[float, Field(ge=0)] | None = Field(
        None, description="margin around the face (share of its box) of a reference's crop; by default the whole square"
    )
    keep: bool = Field(True, description="keep what the frozen models see in an image on the disk, 1 MB each")
    cache: Place | None = Field(None, description="folder of that cache and of the index of the images (SOURCE.cache)")
    read_batch: Count = Field(8, description="images that the frozen models read at a time (`lookahead prepare`)")
    damaged: Share = Field(0.02, description="share of images that may be unreadable, and are left out")


def cache_folder(data: Data) -> Path:
    """The folder of what is kept of the images: `data.cache`, else one beside the data, or here where those are not on
    this machine."""
    name = Path(data.source).name if "://" in data.source else data.source
    source = Path(os.path.abspath(name))  # with a name, also of "." and ".."
    return Path(data.cache) if data.cache else source.with_name(source.name + ".cache")


class Drop(Section):
    """Probabilities of conditioning dropout, a sample. So the four conditions of the guidance equation are all seen:
    with and without text and image prompt (`both` drops them together), each with and without reference KV."""

    text: Share = Field(0.05, description="probability that a sample has no text")
    image_prompt: Share = Field(0.05, description="probability that a sample has no image prompt")
    both: Share = Field(0.05, description="probability that a sample has neither")
    kv: Share = Field(0.1, description="probability that a sample has no reference KV, whatever else it has")

    @model_validator(mode="after")
    def _fits(self) -> Drop:
        if self.text + self.image_prompt + self.both > 1:
            raise ValueError("text, image_prompt and both exclude each other: their sum must be at most 1")
        return self


class Lookahead(Section):
    """The second loss (equations 3 and 4)."""

    arm: Literal["none", "x0", "shortcut"] = Field(
        "shortcut",
        description="kind of preview: one step of the shortcut model, the base's own x0, or none (no second loss)",
    )
    weight: Annotated[float, Field(ge=0)] = Field(
        0.1, description="weight of the lookahead loss; the diffusion loss has 1"
    )
    importance: Share = Field(0.2, description="alpha of the importance sampling of its time steps; 0 is uniform")
    full_strength: Share = Field(0.5, description="probability that a sample's LoRA scale is the full one, 1")
    least_strength: Share = Field(0.1, description="smallest LoRA scale of the other samples, uniform from here to 1")
    align: Literal["strength", "sds", "consistency"] = Field(
        "strength",
        description="what keeps previews close to the base: LoRA scales drawn at random, score distillation, or a "
        "consistency loss",
    )
    align_weight: Annotated[float, Field(ge=0)] = Field(0.1, description="weight of that loss (sds, consistency)")
    semantic_alignment: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of PuLID's semantic alignment, which keeps the person from changing the rest; 0: none"
    )
    layout_alignment: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of PuLID's layout alignment; PuLID has 0.6 for the one and 0.1 for this"
    )
    contrast: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="weight of InfoNCE, by which a preview is more like its own person than like the others that are "
        "computed with it (WithAnyone has as much of it as of the identity loss); 0: none",
    )
    weigh_by_strength: bool = Field(
        False, description="multiply a sample's loss by its LoRA scale (as the paper's code does)"
    )

    @property
    def aligns_person(self) -> bool:
        """Says whether previews are compared with those without the person."""
        return self.semantic_alignment > 0 or self.layout_alignment > 0


class Optimiser(BaseOptimiser):
    """AdamW, with a learning rate for each part of the encoder."""

    FIRST = ("adapter_rate", "kv_rate")
    adapter_rate: Positive = Field(1e-5, description="learning rate of Resampler and image prompt projections")
    kv_rate: Annotated[float, Field(ge=0)] = Field(
        5e-6,
        description="learning rate of the KV encoder; 0 leaves it as it begins, which is the base itself unless "
        "model.start has one",
    )


class Validation(Section):
    """Says what is drawn every `validate_every` steps, always from the same noise."""

    people: Count = Field(8, description="number of people, whom training does not see")
    prompts: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        (
            "a photo of a face",
            "an oil painting of a face",
            "a comic of a face",
            "a wanted poster of a face",
        ),
        description="prompts, each drawn for every person",
    )
    steps: Annotated[int, Field(ge=1, le=100)] = Field(10, description="sampling steps of DDIM")
    guidance: Positive = Field(5.0, description="scale of classifier-free guidance")
    recogniser: Place | None = Field(
        None, description="face recognition network that measures identity; by default the loss's own, which flatters"
    )
    clip: Place | None = Field(None, description="whole CLIP that measures prompt adherence (CLIP-T)")


class Config(RunConfig):
    """One training run of LCM-Lookahead."""

    FIRST = (
        *("name", "out", "model", "data", "steps", "batch", "accumulate", "seed", "precision", "checkpointing"),
        *("importance", "drop", "lookahead", "optimiser", "ema", "compile", "validation"),
    )
    FREE = RunConfig.FREE | {"model.start"} | {f"data.{n}" for n in "metadata cache keep damaged read_batch".split()}
    SCORING = frozenset(f"validation.{name}" for name in ("steps", "guidance", "prompts", "recogniser", "clip"))
    PATHS = {
        "": ("out",),
        "model": ("base", "start", "shortcut", "vae", "picture_vae", "image_encoder", "recogniser", "detector"),
        "data": ("source", "metadata", "cache"),
        "validation": ("recogniser", "clip"),
    }
    SYNONYMS = {
        **RunConfig.SYNONYMS,
        "learning_rate": "optimiser.adapter_rate and optimiser.kv_rate",
        "lr": "optimiser.adapter_rate and optimiser.kv_rate",
        "resolution": "data.size",
        "caption_column": "data.metadata",
        "image_column": "data.metadata",
        "rank": "model.kv_rank",
        "network_dim": "model.kv_rank",
        "validation_prompt": "validation.prompts",
        "validation_prompts": "validation.prompts",
        "guidance_scale": "validation.guidance",
        "num_inference_steps": "validation.steps",
        "caption_dropout_rate": "drop.text",
        "proportion_empty_prompts": "drop.text",
    }

    model: Model
    data: Data
    importance: Share = Field(0.5, description="alpha of the importance sampling of the diffusion loss's time steps")
    drop: Drop = Drop()
    lookahead: Lookahead = Lookahead()
    optimiser: Optimiser = Optimiser()
    validation: Validation = Validation()

    @property
    def free(self) -> frozenset[str]:
        # With contrast the others of a preview are those that are computed with it.
        return self.FREE - {"accumulate"} if self.lookahead.contrast else self.FREE

    @property
    def least_rows(self) -> int:
        return 2 if self.lookahead.contrast else 1

    @model_validator(mode="after")
    def _complete(self) -> Config:
        needed = {"none": (), "x0": ("vae", "recogniser"), "shortcut": ("vae", "recogniser", "shortcut")}
        arm = self.lookahead.arm
        missing = [f"model.{k}" for k in needed[arm] if getattr(self.model, k) is None]
        if missing:
            raise ValueError(f"lookahead.arm {arm!r} needs {' and '.join(missing)}: name the files, or choose 'none'")
        if self.lookahead.align != "strength" and arm != "shortcut":
            raise ValueError(f"lookahead.align {self.lookahead.align!r} is for lookahead.arm 'shortcut', not {arm!r}")
        if self.lookahead.contrast and arm == "none":
            raise ValueError(
                "lookahead.contrast compares previews, and lookahead.arm is 'none': choose 'x0' or 'shortcut'"
            )
        if self.batch < self.least_rows * self.accumulate:
            raise ValueError(
                f"lookahead.contrast compares a preview with others, and batch {self.batch} with accumulate "
                f"{self.accumulate} computes one at a time: raise batch, or lower accumulate"
            )
        if self.lookahead.aligns_person and arm == "none":
            raise ValueError(
                "lookahead.semantic_alignment and layout_alignment compare previews, and lookahead.arm is 'none': "
                "choose 'x0' or 'shortcut'"
            )
        return self


load, from_values = Config.load, Config.from_values


def data_alone(source: str | Path, overrides: Sequence[str] = ()) -> Data:
    """The section `data` for a folder, with overrides such as "size=768"; errors as in `load`."""
    section = {"source": str(source)}
    for override in overrides:
        set_value(section, override)
    model = {"base": "none", "start": "none"}
    return from_values({"model": model, "data": section, "lookahead": {"arm": "none"}}).data
