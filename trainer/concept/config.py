"""The configuration of a concept encoder's training (after arXiv 2307.06925). Every default is this project's own: the
paper's text was not to be had.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ...lookahead.method.concept import NEAR
from ...lookahead.method.concept_input import PLACEHOLDER, TEMPLATES, ConceptError, with_stand_in
from ...lookahead.method.concept_tuning import MOST_STEPS
from ..config import BaseData, BaseModels, BaseOptimiser, Count, Place, Positive, RunConfig, Section, Share

NotNegative = Annotated[float, Field(ge=0)]


class ConceptModels(BaseModels):
    """Files of the frozen models, and the sizes of the concept encoder."""

    image_encoder: Place | None = Field(None, description="CLIP image encoder that looks at the pictures (ViT-H/14)")
    picture_vae: Place | None = Field(
        None, description="autoencoder that encodes the pictures; by default the base's own"
    )
    features: Literal["clip", "clip+unet"] = Field(
        "clip", description="what the encoder reads of a picture: CLIP alone, or the UNet's view of the noised one too"
    )
    offsets: bool = Field(
        True, description="predict attention offsets; without, a concept is its word alone (an ablation)"
    )
    rank: Count = Field(4, description="rank of the predicted attention offsets")
    basis: Count = Field(16, description="matrices that are mixed into each offset, a basis of its own for each")
    hidden: Count = Field(1280, description="width of the encoder's trunk")


class ConceptData(BaseData):
    """Names the pictures that a run trains on. They need no labels and no captions."""

    source: Place = Field(description="folder of pictures (of anything), with folders in it or not, or `mini`")
    size: Annotated[int, Field(ge=64, multiple_of=32)] = Field(1024, description="resolution: pixels a side")
    things: Count = Field(4000, description="number of pictures of things that are drawn, of the mini world")
    people: Count = Field(100, description="number of people that are drawn beside them, of the mini world")
    templates: tuple[str, ...] = Field(
        TEMPLATES, description=f"prompts with {PLACEHOLDER} that the pictures stand under"
    )
    cache: Place | None = Field(None, description="folder of what the frozen models see in a picture (SOURCE.cache)")

    @field_validator("templates")
    @classmethod
    def _with_placeholder(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            try:
                with_stand_in(template)
            except ConceptError as error:
                raise ValueError(str(error)) from None
        if not templates:
            raise ValueError("give at least one prompt")
        return templates


class Token(Section):
    """The regulariser of the soft word."""

    regulariser: Literal["contrast", "l2", "none"] = Field(
        "contrast", description="pull to the nearest real words, to the dictionary's centre, or none (the ablations)"
    )
    dictionary: Place | None = Field(
        None, description="file of nouns, one a line, one token each; by default all whole words of CLIP's vocabulary"
    )
    weight: NotNegative = Field(0.05, description="weight of the regulariser, once it has risen")
    temperature: Positive = Field(0.5, description="temperature of the contrast")
    negatives: bool = Field(True, description="push concepts of a batch with other nearest words apart")
    neighbours: Count = Field(50, description="nearest words that pull at first; they fall to 1")
    words_first: Share = Field(
        0.0,
        description="share of the steps in which a word learns alone, without offsets, which real word the base "
        "would take for the picture",
    )
    warmup: Share = Field(0.2, description="share of the steps before the regulariser acts: it locks in what is near")
    ramp: Share = Field(0.2, description="share of the steps in which it rises")
    norm_weight: NotNegative = Field(0.05, description="weight of the pull of the norm to that of real words")


class Tuned(Section):
    """A concept is tuned so by default: the exported file says it, and commands and pipeline follow it."""

    steps: Annotated[int, Field(ge=0, le=MOST_STEPS)] = Field(12, description="tuning steps of a concept")
    batch: Count = Field(8, description="noise levels a tuning step")
    offset_rate: Positive = Field(1e-3, description="learning rate of a concept's offsets")
    word_rate: Positive = Field(0.01, description="learning rate of its words, as a share of a component's usual size")
    words: Annotated[int, Field(ge=1, le=NEAR)] = Field(
        1, description="nearest real words that are tried before the first step: the best becomes the concept's"
    )
    blend: Share = Field(
        0.25, description="blend of the two attention paths in tuning and drawing; 1: the concept alone"
    )


class ConceptOptimiser(BaseOptimiser):
    """AdamW, with a rate for the bases and their coefficients and one for the rest."""

    basis_rate: Positive = Field(1e-4, description="learning rate of the bases and of the layers that mix them")
    rate: Positive = Field(1e-4, description="learning rate of the trunk and of the words' layers")


class ConceptConfig(RunConfig):
    """One training run of a concept encoder."""

    name: str = Field("concept_encoder", description="name of the file that is exported, without its ending")
    model: ConceptModels
    data: ConceptData
    optimiser: ConceptOptimiser = ConceptOptimiser()
    token: Token = Token()
    offset_weight: NotNegative = Field(1e-4, description="weight of the penalty on the offsets' squared norm")
    blend: Share = Field(1.0, description="blend of the two attention paths in pretraining; 1: the concept alone")
    min_snr: NotNegative = Field(0.0, description="gamma of min-SNR loss weights (arXiv 2303.09556); 0: none, as SDXL")
    tuning: Tuned = Tuned()

    # The regulariser's rise is a share of the steps, so their number belongs to what is computed.
    FREE = (RunConfig.FREE - {"steps"}) | {f"tuning.{name}" for name in Tuned.model_fields} | {"data.cache"}
    PATHS = {
        "": ("out",),
        "model": ("base", "image_encoder", "picture_vae"),
        "data": ("source", "cache"),
        "token": ("dictionary",),
    }
    SYNONYMS = {
        **RunConfig.SYNONYMS,
        "learning_rate": "optimiser.rate and optimiser.basis_rate",
        "lr": "optimiser.rate",
    }

    @model_validator(mode="after")
    def _one_that_can_be_pushed(self) -> ConceptConfig:
        pushes = self.token.regulariser == "contrast" and self.token.negatives and self.token.weight > 0
        if pushes and self.batch // self.accumulate < 2:
            raise ValueError(
                "a batch of one has no other concepts to push apart: give batch=2 or token.negatives=false"
            )
        return self


def picture_cache(data: ConceptData) -> Path:
    """Names the folder of what is kept of the pictures: `data.cache`, else one beside the data."""
    source = Path(data.source).resolve()
    return Path(data.cache) if data.cache else source.with_name(source.name + ".cache")
