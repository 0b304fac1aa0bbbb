"""The sections of a protocol that name files, people and how is drawn."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ...trainer.config import Count, Section

Seed = Annotated[int, Field(ge=0, lt=2**31)]


class ModelNames(Section):
    """Files of the models that pictures are drawn with."""

    base: str = Field(description="SDXL as one .safetensors (both back ends) or a diffusers folder, or `mini`")
    image_encoder: str | None = Field(None, description="CLIP ViT-H/14, which encoder files read a reference with")
    few_step: str | None = Field(None, description="few-step LoRA, for guidance by lookahead")
    pack: str | None = Field(None, description="folder of an insightface pack: finds faces, and guides")


class People(Section):
    """Who is drawn. source: a folder of pictures, one a person; a folder of shards; or `drawn`."""

    source: str
    count: Count | None = Field(None, description="how many of them; by default all")
    first: Annotated[int, Field(ge=0)] = Field(0, description="number of the first")
    targets: str | None = Field(
        None, description="folder with PERSON/PROMPT.png, where it is known how a person looks under a prompt"
    )


class DrawingOptions(Section):
    """Settings with which every method draws, so that nothing but the method differs."""

    size: Annotated[int, Field(ge=64, multiple_of=8)] = 1024
    steps: Count = 30
    sampler: str = "dpmpp_2m"
    scheduler: str = "karras"
    guidance: Annotated[float, Field(ge=1)] = Field(5.0, description="scale of the plain guidance")
    negative: str = ""


class Plot(Section):
    """Which measures the plot shows, by their names in `measures`."""

    x: str = "prompt"
    y: str = "identity"


class HostOptions(Section):
    """The ComfyUI that draws. url: of one that runs already, with its own models and nodes; else one is started."""

    url: str | None = None


class Prompt(Section):
    """One prompt. number: its place in the list, by which targets are named."""

    number: int
    kind: str
    text: str
