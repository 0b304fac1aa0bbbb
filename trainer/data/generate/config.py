"""What a generated data set is: one YAML file, with dotted overrides from the command line ("prompts.per_person=6").

The grammar of people and the words of the prompts stand in it as data, for users to edit.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ...config import Count, Place, Positive, Section, Share, read_values, validated

Weight = Annotated[float, Field(ge=0)]
Weights = dict[str, Weight]  # a text, and how often it is drawn relative to the others
_NOT_CONTENT = ("name", "out", "shards", "launch")  # what may change without changing a byte of a shard
_PATHS = {"generator": ("base", "lora", "vae"), "checks": ("detector", "recogniser", "clip"), "": ("names",)}


def _drawable_values(weights: Weights) -> Weights:
    if not weights:
        raise ValueError("it has no value to draw from: write some, each with a weight")
    if sum(weights.values()) <= 0:
        raise ValueError(f"all weights are zero ({', '.join(weights)}): give at least one of them a weight above zero")
    return weights


class Attribute(Section):
    """One property of a person."""

    values: Weights
    draw: tuple[int, int] = Field((1, 1), description="how many of the values a person has: least and most")
    unless: dict[str, tuple[str, ...]] = Field(
        {}, description="left out where another attribute has one of these values: {hair_style: [a bald head]}"
    )

    _check_values = field_validator("values")(_drawable_values)

    @model_validator(mode="after")
    def _drawable(self) -> Attribute:
        least, most = self.draw
        able = sum(weight > 0 for weight in self.values.values())
        if not 0 <= least <= most:
            raise ValueError(f"draw is [{least}, {most}]: write the least and the most, as [1, 2]")
        if most > able:
            raise ValueError(f"draw is [{least}, {most}], and only {able} values have a weight above zero")
        return self


class Grammar(Section):
    """People by description: "`subject` with `phrase` and `phrase`", the names of attributes in braces.

    A phrase is left out where one of its attributes has no value.
    """

    subject: str = "{age} {origin} {gender}"
    phrases: tuple[str, ...] = ()
    attributes: dict[str, Attribute]
    balance: tuple[str, ...] = Field((), description="attributes that are spread evenly instead of drawn by chance")

    @model_validator(mode="after")
    def _known(self) -> Grammar:
        named = [(f"the template {t!r}", name) for t in (self.subject, *self.phrases) for name in fields(t)]
        named += [("balance", name) for name in self.balance]
        named += [(f"unless of {own}", name) for own, a in self.attributes.items() for name in a.unless]
        for where, name in named:
            if name not in self.attributes:
                raise ValueError(f"{where} names {name!r}, which is no attribute: {hint(name, self.attributes)}")
        for own, attribute in self.attributes.items():
            for name, values in attribute.unless.items():
                for value in values:
                    if value not in self.attributes[name].values:
                        known = hint(value, self.attributes[name].values)
                        raise ValueError(f"unless of {own} names {value!r}, which is no value of {name}: {known}")
        for name in self.balance:
            if self.attributes[name].draw != (1, 1) or self.attributes[name].unless:
                raise ValueError(f"balance names {name!r}, which not every person has once: leave it out there")
        if len(self.balance) > len(PRIMES):
            raise ValueError(f"balance names {len(self.balance)} attributes, and at most {len(PRIMES)} can be")
        return self


PRIMES = (2, 3, 5, 7, 11, 13)  # bases of the balanced attributes' sequences (`people.halton`)


class Prompts(Section):
    """Says what is drawn of each person. The training caption is the prompt with `face` for the description."""

    per_person: Count = 5
    template: str = Field("{style} of {person} {accessory} {context}", description="of a prompt; spaces are tidied")
    face: str = Field("a face", description="what stands for the description in the caption")
    plain: str = Field("a photo", description="style of the plain pictures, which serve as references")
    plain_count: Annotated[int, Field(ge=1)] = Field(1, description="of each person's pictures, how many are plain")
    styles: Weights = Field(description="of the other pictures; one person has none twice before all were drawn")
    contexts: Weights = Field({"": 1.0}, description="where the person is; plain pictures have none")
    accessories: Weights = Field({"": 1.0}, description="drawn anew for each picture, and said in the caption too")

    @field_validator("styles", "contexts", "accessories")
    @classmethod
    def _check_weights(cls, weights: Weights) -> Weights:
        return _drawable_values(weights)

    @model_validator(mode="after")
    def _complete(self) -> Prompts:
        known = ("style", "person", "accessory", "context")
        for name in fields(self.template):
            if name not in known:
                raise ValueError(f"template names {name!r}, which is no part of a prompt: {hint(name, known)}")
        if fields(self.template).count("person") != 1:
            raise ValueError(f"template is {self.template!r}: it must hold {{person}} once")
        if self.plain_count > self.per_person:
            raise ValueError(f"plain_count is {self.plain_count}, and per_person only {self.per_person}")
        return self


class SharedAttention(Section):
    """Says how the pictures of a person share attention (kind `consistent`), as ConsiStory does."""

    dropout: Share = Field(0.5, description="probability that a patch of the others' subject is left out in a step")
    injection: Share = Field(
        0.8, description="share of a subject's features that the best match in the others replaces"
    )
    begin: Share = Field(0.1, description="share of the steps after which features are injected")
    end: Share = Field(0.5, description="share of the steps until which they are")


class GeneratorSettings(Section):
    """Which model draws, and how."""

    kind: Literal["sdxl", "consistent", "drawn"] = Field(
        "sdxl", description="a few-step SDXL; any SDXL with shared attention; or the mini world's drawn people"
    )
    base: Place | None = Field(None, description="SDXL as a diffusers folder or one .safetensors, or `mini`")
    lora: Place | None = Field(None, description="few-step LoRA; none for a base that is few-step itself (SDXL-Turbo)")
    lora_scale: Positive = 1.0
    vae: Place | None = Field(None, description="folder of an autoencoder in place of the base's")
    sampler: Literal["lcm", "euler", "euler_ancestral", "tcd", "ddim"] = Field(
        "euler_ancestral",
        description="SDXL-Turbo: euler_ancestral; LCM-LoRA: lcm; Lightning: euler; Hyper-SD: tcd; SDXL itself: ddim",
    )
    steps: Annotated[int, Field(ge=1, le=50)] = 1
    guidance: Annotated[float, Field(ge=0)] = Field(0.0, description="up to 1: none, as few-step models want it")
    size: Annotated[int, Field(ge=64, multiple_of=8)] = Field(512, description="pixels a side")
    batch: Count = Field(8, description="pictures at a time; part of the content, as it changes last bits")
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    licence: str = Field("unknown", description="of the models, written into every sample")
    shared: SharedAttention | None = Field(None, description="of kind `consistent`; by default as its fields say")

    @model_validator(mode="after")
    def _complete(self) -> GeneratorSettings:
        if self.kind != "drawn" and self.base is None:
            raise ValueError(f"kind {self.kind!r} needs base: name SDXL's folder or file, or `mini`")
        if self.shared is not None and self.kind != "consistent":
            raise ValueError(f"shared is for kind 'consistent', and kind is {self.kind!r}: leave it out")
        return self


class Checks(Section):
    """Says what a picture must have to be kept. A threshold of None is not applied; `--pilot` shows what each keeps."""

    detector: Place | None = Field(None, description="folder of an insightface pack, which finds faces; or `mini`")
    recogniser: Place | None = Field(None, description="ArcFace .onnx or IR-SE50 weights")
    clip: Place | None = Field(None, description="whole CLIP, which tells styles")
    one_face: bool = Field(True, description="pictures with several faces are rejected")
    face_size: Share | None = Field(0.15, description="least height of the face, as a share of the picture's")
    sharpness: Annotated[float, Field(ge=0)] | None = Field(None, description="least mean difference of neighbours")
    similarity: Annotated[float, Field(ge=-1, le=1)] | None = Field(
        0.3, description="least mean cosine to the person's other pictures"
    )
    duplicate: Annotated[float, Field(ge=-1, le=1)] | None = Field(
        0.8, description="a person whose mean embedding is this near to an earlier one's of the shard is rejected"
    )
    style: Share | None = Field(None, description="least probability of the asked style")
    pictures: Annotated[int, Field(ge=2)] = Field(2, description="a person with fewer is rejected")

    @model_validator(mode="after")
    def _judged(self) -> Checks:
        if self.recogniser and not self.detector:
            raise ValueError("recogniser needs a detector, which finds the faces that it compares")
        if self.style is not None and not self.clip:
            raise ValueError(f"style is {self.style}, and nothing tells styles: name clip, or leave style out")
        return self


class Files(Section):
    format: Literal["jpg", "png"] = "jpg"
    quality: Annotated[int, Field(ge=50, le=100)] = Field(95, description="of JPEG")


class Launch(Section):
    """Who makes the shards: this process, or tasks of an engine (datatrove's executors)."""

    engine: Literal["none", "local", "slurm", "ray"] = Field(
        "none", description="none: this process and those that are started beside it; processes of this machine; ..."
    )
    tasks: Count = Field(1, description="how many tasks share the shards")
    workers: Annotated[int, Field(ge=0)] = Field(0, description="how many run at a time; 0: all")
    gpus: Annotated[int, Field(ge=0)] = Field(1, description="of a task (slurm, ray)")
    cpus: Count = Field(4, description="of a task (slurm, ray)")
    gigabytes: Count = Field(32, description="of a task's memory (slurm, ray)")
    partition: str | None = Field(None, description="of slurm")
    time: str = Field("04:00:00", description="of slurm: after which it ends a task, whose shards the next one makes")
    qos: str | None = Field(None, description="of slurm")
    environment: str | None = Field(None, description="of slurm: command that activates the Python environment")
    sbatch: dict[str, str] = Field({}, description="further options of sbatch, without their dashes")
    logs: str | None = Field(None, description="folder of the engine's logs; generate_logs/NAME")

    @model_validator(mode="after")
    def _complete(self) -> Launch:
        if self.engine == "slurm" and self.partition is None:
            raise ValueError("engine 'slurm' needs a partition: name that of the cluster")
        return self


class GenerateConfig(Section):
    """One generated data set."""

    name: str = "people"
    out: Place = Field("generated", description="folder of the shards")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    shards: Count = Field(10, description="how many; more can be made later")
    people_per_shard: Count = 100
    people: Grammar | None = Field(None, description="people by description")
    names: Place | None = Field(None, description="text file with a name a line, of people whom the base model knows")
    prompts: Prompts
    generator: GeneratorSettings
    checks: Checks = Checks()
    files: Files = Files()
    launch: Launch = Launch()

    @model_validator(mode="after")
    def _someone(self) -> GenerateConfig:
        if (self.people is None) == (self.names is None):
            raise ValueError("either people (by description) or names (of known people) must be given")
        if self.names is not None and self.generator.kind == "drawn":
            raise ValueError("names are for models that know them, and generator.kind 'drawn' knows nobody")
        batch, per_person = self.generator.batch, self.prompts.per_person
        if self.generator.kind == "consistent" and batch % per_person:
            raise ValueError(
                f"generator.batch is {batch}, and pictures that share attention come together, {per_person} a person: "
                f"set it to a multiple, such as {per_person}"
            )
        return self

    def content(self) -> dict[str, Any]:
        """All that decides what is in a shard, as plain values; of files the last names only."""
        values = self.model_dump(mode="json", exclude=set(_NOT_CONTENT))
        if values["generator"]["shared"] is None:  # which data sets that were begun before do not know
            del values["generator"]["shared"]
        for section, names in _PATHS.items():
            part = values[section] if section else values
            part |= {name: Path(part[name]).name for name in names if part.get(name) is not None}
        return values


def load(path: str | Path, overrides: Sequence[str] = ()) -> GenerateConfig:
    """The configuration of a YAML file. Raises ConfigError, which lists all that is wrong."""
    return validated(GenerateConfig, read_values(path, overrides))


def digest(values: Any) -> str:
    """SHA-256 of plain values, in the order in which they stand: with another order other people are drawn."""
    return hashlib.sha256(json.dumps(values, ensure_ascii=False).encode()).hexdigest()


def fields(template: str) -> list[str]:
    """The names in braces. Raises ValueError for braces that do not match."""
    try:
        return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"the braces of {template!r} do not match ({error}): write names as {{name}}") from None


def hint(name: str, known: Iterable[str]) -> str:
    """Names what may have been meant."""
    known = list(known)
    near = difflib.get_close_matches(name, known, 1, 0.5)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
