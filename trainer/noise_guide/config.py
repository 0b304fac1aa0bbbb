"""The configuration of a noise guide's training: models, the sampler's first steps, the loss, the rate.

The sources of people's pictures, their judges and their doctor read a run of `trainer.lookahead`;
`NoiseGuideConfig.reading` gives one with the same data.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from ...lookahead.method.noise_guide import GROUPS
from ...lookahead.method.schedule import TIMESTEPS
from ..config import BaseModels, BaseOptimiser, Count, Place, Positive, RunConfig, Section, Share
from ..lookahead.config import Config, Data, Validation

Early = Annotated[float, Field(gt=0, le=0.9)]  # a place in the sampling with a step before and one after it


class NoiseGuideModels(BaseModels):
    """Files of the frozen models, and the sizes of the noise guide."""

    shortcut: Place = Field(description="few-step LoRA of the previews (LCM-LoRA), in the public layout")
    vae: Place = Field(description="tiny autoencoder (TAESD) that decodes the previews")
    picture_vae: Place | None = Field(
        None, description="autoencoder that encodes the images; by default the base's own"
    )
    image_encoder: Place | None = Field(None, description="CLIP image encoder, with which people's images are read")
    recogniser: Place = Field(description="face recognition network of loss and guide (ArcFace)")
    detector: Place | None = Field(
        None, description="insightface pack whose detector finds faces in images and previews"
    )
    width: Annotated[int, Field(ge=GROUPS, multiple_of=GROUPS)] = Field(
        64, description="channels of the guide at the latent's full size"
    )
    hidden: Count = Field(256, description="width of what the guide's blocks read of person and noise level")


class Opening(Section):
    """The sampler's first steps, which lead from pure noise to where the guide acts: DDIM with the base itself."""

    start: Early = Field(0.4, description="earliest place in the sampling where the guide acts; 0 is pure noise")
    end: Early = Field(0.45, description="latest place; a sampler's step lies somewhere between the two")
    steps: Count = Field(3, description="steps from pure noise to there; each costs two predictions without gradient")
    guidance: Positive = Field(5.0, description="scale of their classifier-free guidance; 1 is none, at half the cost")

    @model_validator(mode="after")
    def _in_order(self) -> Opening:
        if self.end < self.start:
            raise ValueError(f"start is {self.start} and end {self.end}: the earlier place comes first")
        return self

    def timestep(self, place: float) -> int:
        """The timestep at a place in the sampling, as the host counts it."""
        return round((1 - place) * (TIMESTEPS - 1))


class GuideLoss(Section):
    """The guide is trained by the lookahead loss on the preview of the moved latent, and by how far it moves."""

    shift_weight: Annotated[float, Field(ge=0)] = Field(
        1.0,
        description="weight of the squared shift, in parts of the noise (HyperNoise's prior); the identity loss has 1",
    )
    full_strength: Share = Field(0.5, description="probability that a sample's LoRA scale is the full one, 1")
    least_strength: Share = Field(0.1, description="smallest LoRA scale of the other samples, uniform from here to 1")


class NoiseGuideOptimiser(BaseOptimiser):
    """AdamW."""

    rate: Positive = Field(3e-4, description="learning rate of the noise guide")


class NoiseGuideConfig(RunConfig):
    """One training run of a noise guide."""

    name: str = Field("noise_guide", description="name of the file that is exported, without its ending")
    model: NoiseGuideModels
    data: Data
    optimiser: NoiseGuideOptimiser = NoiseGuideOptimiser()
    opening: Opening = Opening()
    loss: GuideLoss = GuideLoss()
    validation: Validation = Validation()

    FREE = RunConfig.FREE | {f"data.{n}" for n in "metadata cache keep damaged read_batch".split()}
    SCORING = Config.SCORING
    PATHS = Config.PATHS | {"model": tuple(name for name in Config.PATHS["model"] if name != "start")}
    SYNONYMS = {
        **RunConfig.SYNONYMS,
        "learning_rate": "optimiser.rate",
        "lr": "optimiser.rate",
        "resolution": "data.size",
        "start": "opening.start",
        "guidance_scale": "opening.guidance and validation.guidance",
    }

    def reading(self) -> Config:
        """The run of `trainer.lookahead` that reads the same data with the same models, and draws the same samples."""
        shared = ("base", "shortcut", "vae", "picture_vae", "image_encoder", "recogniser", "detector")
        model = {name: getattr(self.model, name) for name in shared} | {"start": "none", "kv": False}
        same = ("name", "out", "steps", "batch", "accumulate", "seed", "precision", "validate_every", "workers")
        values = {name: getattr(self, name) for name in same}
        return Config.model_validate({**values, "model": model, "data": self.data, "validation": self.validation})
