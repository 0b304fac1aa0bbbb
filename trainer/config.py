"""What a training run is: one YAML file, with dotted overrides from the command line ("optimiser.kv_rate=1e-5").

A file may begin with `extends: other.yaml`, beside it: then it says only what is different from that.

Every value is checked before anything is loaded. An unknown key is an error that names the key that was meant.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

CONFIGS = Path(__file__).parent / "configs"

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


Section = TypeVar("Section", bound=BaseModel)


class ConfigError(ValueError):
    """A sentence for each thing that is wrong with a configuration."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Model(_Section):
    """Files of the frozen models, and where training starts."""

    base: str = Field(description="SDXL as a diffusers folder or one .safetensors, or `mini` for the mini world's")
    start: str = Field(description="encoder to start from: a stock IP-Adapter Plus or an encoder file")
    shortcut: str | None = Field(None, description="few-step LoRA of the previews, in the public layout")
    vae: str | None = Field(None, description="tiny autoencoder that decodes the previews")
    picture_vae: str | None = Field(None, description="autoencoder that reads the pictures; by default the base's own")
    image_encoder: str | None = Field(None, description="CLIP image encoder that the encoder reads (ViT-H/14)")
    recogniser: str | None = Field(None, description="face recogniser of the identity loss")
    detector: str | None = Field(None, description="insightface pack that finds faces in pictures and previews")
    kv: bool = Field(True, description="train a KV encoder; false is the paper's arm without")
    kv_rank: Count = 4
    export_rank: Count = 4


class Data(_Section):
    """What is trained on."""

    source: str = Field(description="a folder with a folder a person, or `mini` for drawn people")
    people: Count = Field(3000, description="of the mini world, how many are drawn")
    kv_prompt: str = Field("a photo of a face", description="the KV encoder's text outside of training")
    metadata: str | None = Field(None, description="JSON lines or CSV: file_name, and where known text and person")
    caption: str = Field("a photo of a face", description="of pictures that have no text")
    size: Annotated[int, Field(ge=64, multiple_of=32)] = Field(1024, description="pixels a side of what is trained on")
    reference_margin: Annotated[float, Field(ge=0)] | None = Field(
        None, description="crop references to the face with this margin (share of its box); by default the whole square"
    )
    keep: bool = Field(True, description="keep what the frozen models see in a picture, 1 MB each, in the cache")
    cache: str | None = Field(None, description="folder for that and for what is known of the pictures (SOURCE.cache)")
    damaged: Share = Field(0.02, description="share of pictures that may be unreadable, and are left out")


class Drop(_Section):
    """How often a sample of training goes without. So the four conditions of the guidance equation are all seen:
    with and without text and image prompt (`both` drops them together), each with and without reference KV."""

    text: Share = 0.05
    image_prompt: Share = 0.05
    both: Share = 0.05
    kv: Share = 0.1

    @model_validator(mode="after")
    def _fits(self) -> Drop:
        if self.text + self.image_prompt + self.both > 1:
            raise ValueError("text, image_prompt and both exclude each other: their sum must be at most 1")
        return self


class Lookahead(_Section):
    """The second loss (equations 3 and 4)."""

    arm: Literal["none", "x0", "shortcut"] = Field(
        "shortcut", description="previews by the shortcut model, by the base's own x0, or no second loss"
    )
    weight: Annotated[float, Field(ge=0)] = Field(0.1, description="of the second loss beside the first")
    importance: Share = Field(0.2, description="alpha of the time steps' distribution")
    full_strength: Share = Field(0.5, description="share of samples with the few-step LoRA at strength 1")
    least_strength: Share = Field(0.1, description="others: uniform from here to 1")
    align: Literal["strength", "sds", "consistency"] = Field(
        "strength", description="what keeps previews the base's: the LoRA's strength as drawn, or a loss of `align`"
    )
    align_weight: Annotated[float, Field(ge=0)] = Field(0.1, description="of that loss")
    weigh_by_strength: bool = Field(False, description="multiply a sample's loss by its strength (the paper's code)")


class Optimiser(_Section):
    adapter_rate: Positive = Field(1e-5, description="of Resampler and projections")
    kv_rate: Positive = Field(5e-6, description="of the KV encoder")
    betas: tuple[Share, Share] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Positive = Field(1.0, description="largest norm of the gradient of both losses")
    eight_bit: bool = Field(False, description="AdamW of bitsandbytes, whose state takes a quarter (CUDA)")
    warmup: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "cosine"] = "constant"

    def factor(self, step: int, steps: int) -> float:
        """What the rates are multiplied by in a step, counted from 0: a function of the step alone."""
        from math import cos, pi

        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return rise * (0.5 * (1 + cos(pi * step / steps)) if self.schedule == "cosine" else 1.0)


class Validation(_Section):
    """What is drawn every `validate_every` steps, always from the same noise."""

    people: Count = Field(8, description="whom training does not see")
    prompts: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "a photo of a face",
        "an oil painting of a face",
        "a comic of a face",
        "a wanted poster of a face",
    )
    steps: Annotated[int, Field(ge=1, le=100)] = Field(10, description="of DDIM")
    guidance: Positive = 5.0
    recogniser: str | None = Field(None, description="measures identity; by default the loss's own, which flatters")
    clip: str | None = Field(None, description="whole CLIP that measures how pictures follow their prompts")


_PATHS = {  # by section, the fields that name files and folders
    "": ("out",),
    "model": ("base", "start", "shortcut", "vae", "picture_vae", "image_encoder", "recogniser", "detector"),
    "data": ("source", "metadata", "cache"),
    "validation": ("recogniser", "clip"),
}


class Config(_Section):
    """One training run."""

    name: str = Field("encoder", description="of the encoder file")
    out: str = Field("training", description="folder for all that the run writes")
    model: Model
    data: Data
    steps: Count = 5000
    batch: Count = Field(8, description="samples a step, over all processes")
    accumulate: Count = Field(1, description="parts of a process's share of them, one after another in memory")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    checkpointing: Literal["none", "blocks", "all"] = "blocks"
    importance: Share = Field(0.5, description="alpha of the time steps' distribution of the diffusion loss")
    drop: Drop = Drop()
    lookahead: Lookahead = Lookahead()
    optimiser: Optimiser = Optimiser()
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="of the average that is exported; 0: none")
    compile: bool = Field(False, description="torch.compile of the transformer blocks")
    validation: Validation = Validation()
    validate_every: Annotated[int, Field(ge=0)] = Field(500, description="0: never")
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = Field((), description="told the figures, beside log.jsonl")
    save_every: Count = 500
    keep: Count = Field(2, description="checkpoints that are kept")
    log_every: Count = 10
    norms_every: Annotated[int, Field(ge=0)] = Field(
        100, description="how often the gradient's norm of each loss is measured, which takes copies of it; 0: never"
    )
    nonfinite_in_a_row: Count = Field(5, description="skipped steps in a row after which the run stops")

    @model_validator(mode="after")
    def _complete(self) -> Config:
        needed = {"none": (), "x0": ("vae", "recogniser"), "shortcut": ("vae", "recogniser", "shortcut")}
        arm = self.lookahead.arm
        missing = [f"model.{k}" for k in needed[arm] if getattr(self.model, k) is None]
        if missing:
            raise ValueError(f"lookahead.arm {arm!r} needs {' and '.join(missing)}: name the files, or choose 'none'")
        if self.lookahead.align != "strength" and arm != "shortcut":
            raise ValueError(f"lookahead.align {self.lookahead.align!r} is for lookahead.arm 'shortcut', not {arm!r}")
        if self.data.source == "mini" and (self.validation.recogniser or self.validation.clip):
            raise ValueError(
                "validation.recogniser and validation.clip are for folders: the mini world has its own judges"
            )
        return self

    def shareable(self) -> dict[str, Any]:
        """As plain values for a file that others get (`named_only`)."""
        return named_only(self.model_dump(mode="json"))


def named_only(values: dict[str, Any]) -> dict[str, Any]:
    """Plain values of a configuration with, of every path, only the last name: folders name people, and are moved."""
    values = copy.deepcopy(values)
    for section, names in _PATHS.items():
        part = values[section] if section else values
        part |= {name: Path(part[name]).name for name in names if part.get(name) is not None}
    return values


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """A configuration from a YAML file. overrides: "section.key=value", the value read as YAML.

    Raises ConfigError, which lists all that is wrong.
    """
    return from_values(read_values(path, overrides))


def read_values(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The nested values of a YAML file and of those that it extends, with the overrides; errors as in `load`."""
    values = _read(Path(path))
    for override in overrides:
        _set(values, override)
    return values


def data_alone(source: str | Path, overrides: Sequence[str] = ()) -> Data:
    """The section `data` for a folder, with overrides such as "size=768"; errors as in `load`."""
    section = {"source": str(source)}
    for override in overrides:
        _set(section, override)
    model = {"base": "none", "start": "none"}
    return from_values({"model": model, "data": section, "lookahead": {"arm": "none"}}).data


def from_values(values: dict[str, Any]) -> Config:
    """A configuration from nested values; errors as in `load`."""
    return validated(Config, values)


def validated(model: type[Section], values: dict[str, Any]) -> Section:
    """Nested values as a model of pydantic. Raises ConfigError, with a sentence for each value that is wrong."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_sentence(e, model) for e in error.errors())) from None


def _read(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a file and of those that it extends."""
    if path in below:
        raise ConfigError(f"{path} extends itself, by way of {below[-1]}: let one of them extend nothing.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = f"{path}, which {below[-1]} extends" if below else str(path)
        raise ConfigError(f"There is no file {what}: name a YAML file such as {CONFIGS / 'mini.yaml'}.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): name a YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no keys with values: begin with that of trainer/configs/mini.yaml.")
    other = values.pop("extends", None)
    return values if other is None else _merged(_read(path.parent / str(other), (*below, path)), values)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Sections are merged key by key; every other value of `above` takes the place of that below it."""
    out = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merged(out[key], value) if both else value
    return out


def _set(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"The override {override!r} is not understood: write section.key=value.")
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"The override {override!r} goes into {section}, which is a value and no section.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"The value of the override {override!r} is no YAML: {error}") from None
    if isinstance(value, str):  # YAML takes 1e-5 for text, as it has no point
        try:
            value = float(value)
        except ValueError:
            pass
    values[last] = value


def _sentence(error: Any, model: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "the configuration"
    if error["type"] == "extra_forbidden":
        section = _section(model, error["loc"][:-1])
        known = list(section.model_fields) if section else []
        near = difflib.get_close_matches(str(error["loc"][-1]), known, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}."
        return f"{where} is no key of a configuration: {hint}"
    if error["type"] == "missing":
        return f"{where} is missing: it must be given."
    reason = error["msg"].removeprefix("Value error, ").rstrip(".")
    if isinstance(error["input"], dict):  # a section, too long to be repeated
        return f"{where}: {reason}" + ("" if reason.endswith("?") else ".")
    return f"{where} is {error['input']!r}: {reason}."


def _section(model: Any, location: Sequence[Any]) -> type[BaseModel] | None:
    """The section at a location; a key of a mapping (an attribute's name, say) leads to what its values are."""
    for part in location:
        if part in model.model_fields:
            annotation = model.model_fields[part].annotation
            kinds = (annotation, *get_args(annotation))
            model = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), model)
    return model
