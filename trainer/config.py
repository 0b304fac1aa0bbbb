"""What a training run is: one YAML file, with dotted overrides from the command line ("optimiser.kv_rate=1e-5").

A file may begin with `extends: other.yaml`, beside it: then it says only what is different from that.

Every value is checked before anything is loaded. An unknown key is an error that names the key that was meant, also
where it is another trainer's word for it.

Here stands what every run has, whatever it trains: the loop, the checkpoints and the log read these fields alone. A
recipe derives its own configuration from `RunConfig` and adds its sections (`lookahead/config.py`).
"""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from ..evaluation.unique_keys import DuplicateKeyError, load_yaml

CONFIGS = Path(__file__).parent / "configs"

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Place = Annotated[str, AfterValidator(os.path.expanduser)]  # of a file or folder; ~ is the user's own folder

# What other trainers call a field, and its name here. A recipe adds its own.
SYNONYMS = {
    "train_batch_size": "batch",
    "batch_size": "batch",
    "gradient_accumulation_steps": "accumulate",
    "gradient_checkpointing": "checkpointing",
    "mixed_precision": "precision",
    "max_grad_norm": "optimiser.clip",
    "clip_grad_norm": "optimiser.clip",
    "adam_beta1": "optimiser.betas",
    "adam_beta2": "optimiser.betas",
    "adam_weight_decay": "optimiser.weight_decay",
    "use_8bit_adam": "optimiser.eight_bit",
    "lr_scheduler": "optimiser.schedule",
    "lr_warmup_steps": "optimiser.warmup",
    "warmup_steps": "optimiser.warmup",
    "max_train_steps": "steps",
    "max_steps": "steps",
    "num_train_epochs": "steps",
    "max_train_epochs": "steps",
    "use_ema": "ema",
    "ema_decay": "ema",
    "output_dir": "out",
    "output_name": "name",
    "logging_steps": "log_every",
    "report_to": "trackers",
    "log_with": "trackers",
    "checkpointing_steps": "save_every",
    "save_every_n_steps": "save_every",
    "checkpoints_total_limit": "keep",
    "validation_steps": "validate_every",
    "pretrained_model_name_or_path": "model.base",
    "train_data_dir": "data.source",
    "dataloader_num_workers": "workers",
    "num_workers": "workers",
}


class ConfigError(ValueError):
    """A sentence for each thing that is wrong with a configuration."""


class Section(BaseModel):
    """Fields that belong together. FIRST: those that are written first, for files whose order was settled before."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
    FIRST: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _ordered(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = handler(self)
        return {name: values[name] for name in (*self.FIRST, *values)}


class BaseModels(Section):
    """Files of the frozen models. A recipe adds its own."""

    base: Place = Field(description="SDXL as a diffusers folder or one .safetensors, or `mini` for the mini world's")


class BaseData(Section):
    """Names the data that a run trains on. A recipe adds its own."""

    source: Place = Field(description="folder with the data")


class BaseOptimiser(Section):
    """AdamW. A recipe adds the learning rates of what it trains."""

    betas: tuple[Share, Share] = Field((0.9, 0.999), description="decay rates of AdamW's two moments")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="weight decay of AdamW")
    clip: Positive = Field(1.0, description="largest norm of the gradient, of all losses together (max_grad_norm)")
    eight_bit: bool = Field(False, description="8-bit AdamW of bitsandbytes, whose state takes a quarter (CUDA)")
    warmup: Annotated[int, Field(ge=0)] = Field(0, description="steps in which the learning rates rise linearly")
    schedule: Literal["constant", "cosine"] = Field("constant", description="learning rate schedule after the warmup")

    def factor(self, step: int, steps: int) -> float:
        """Computes the factor of the learning rates in a step, counted from 0: a function of the step alone."""
        from math import cos, pi

        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return rise * (0.5 * (1 + cos(pi * step / steps)) if self.schedule == "cosine" else 1.0)


class RunConfig(Section):
    """One training run, as the loop sees it."""

    name: str = Field("encoder", description="name of the file that is exported, without its ending")
    out: Place = Field("training", description="folder for all that the run writes")
    model: BaseModels
    data: BaseData
    steps: Count = Field(5000, description="optimiser steps of the whole run")
    batch: Count = Field(8, description="samples a step, over all processes and accumulated parts")
    accumulate: Count = Field(
        1, description="gradient accumulation: parts of a process's samples, one after another in memory"
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="seed of all random draws")
    precision: Literal["fp32", "bf16", "fp16"] = Field("bf16", description="mixed precision; fp32 is none")
    checkpointing: Literal["none", "blocks", "all"] = Field(
        "blocks", description="gradient checkpointing: of nothing, the transformer blocks, or residual blocks too"
    )
    optimiser: BaseOptimiser = BaseOptimiser()
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="decay of the moving average of the weights, which is exported in their place; 0: none"
    )
    compile: bool = Field(False, description="torch.compile of the transformer blocks")
    validate_every: Annotated[int, Field(ge=0)] = Field(500, description="steps between validations; 0: never")
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        (), description="trackers that get the figures too, beside log.jsonl"
    )
    save_every: Count = Field(500, description="steps between checkpoints")
    keep: Count = Field(2, description="number of last checkpoints that are kept, beside the best")
    log_every: Count = Field(10, description="steps between lines of the log")
    norms_every: Annotated[int, Field(ge=0)] = Field(
        100, description="steps between measurements of each loss's gradient norm, which take copies of it; 0: never"
    )
    workers: Annotated[int, Field(ge=0)] = Field(
        2, description="processes that read samples ahead of the step, of each process that trains; 0: none"
    )
    nonfinite_in_a_row: Count = Field(5, description="skipped steps in a row after which the run stops")

    # Fields that may change in a run that goes on, by dotted name: nothing of them changes what is computed, but for
    # the last bits of the rounding.
    FREE: ClassVar[frozenset[str]] = frozenset(
        "steps save_every keep log_every norms_every nonfinite_in_a_row validate_every trackers checkpointing "
        "accumulate compile out workers data.source".split()  # (`Source.digest` tells other data)
    )
    SCORING: ClassVar[frozenset[str]] = frozenset()  # free too, but then scores of validations are others
    PATHS: ClassVar[Mapping[str, tuple[str, ...]]] = {  # by section, the fields that name files and folders
        "": ("out",),
        "model": ("base",),
        "data": ("source",),
    }
    SYNONYMS: ClassVar[Mapping[str, str]] = SYNONYMS

    @property
    def free(self) -> frozenset[str]:
        """Names the fields that may change in this run, when it goes on."""
        return self.FREE

    @property
    def least_rows(self) -> int:
        """Says how many samples a forward pass needs at least."""
        return 1

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """A configuration from a YAML file. overrides: "section.key=value", the value read as YAML.

        Raises ConfigError, which lists all that is wrong.
        """
        return cls.from_values(read_values(path, overrides))

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """A configuration from nested values; errors as in `load`."""
        return validated(cls, values)

    def shareable(self) -> dict[str, Any]:
        """Gives plain values for a file that others get (`named_only`)."""
        return self.named_only(self.model_dump(mode="json"))

    @classmethod
    def named_only(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Plain values of a configuration with only the last name of each path: folders name people and are moved."""
        named = copy.deepcopy(dict(values))
        for section, names in cls.PATHS.items():
            part = named[section] if section else named
            part |= {name: Path(part[name]).name for name in names if part.get(name) is not None}
        return named


AnySection = TypeVar("AnySection", bound=Section)


def read_values(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The nested values of a YAML file and of those that it extends, with the overrides. Raises ConfigError."""
    values = _read(Path(path))
    for override in overrides:
        set_value(values, override)
    return values


def validated(kind: type[AnySection], values: Mapping[str, Any]) -> AnySection:
    """Nested values as sections of fields. Raises ConfigError, with a sentence for each value that is wrong."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_sentence(kind, e) for e in error.errors())) from None


def _shipped(path: Path) -> Path:
    """The file, or that of the name that comes along (`mini.yaml`, `trainer/configs/mini.yaml`) where there is none."""
    if path.exists() or path.is_absolute():
        return path
    return next((known for folder in (CONFIGS, CONFIGS.parents[1]) if (known := folder / path).is_file()), path)


def _read(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a file and of those that it extends."""
    path = _shipped(path)
    if path in below:
        raise ConfigError(f"{path} extends itself, by way of {below[-1]}: let one of them extend nothing.")
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = f"{path}, which {below[-1]} extends" if below else str(path)
        raise ConfigError(f"There is no file {what}: name a YAML file such as {CONFIGS / 'mini.yaml'}.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): name a YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no YAML: {error}") from None
    except DuplicateKeyError as error:
        raise ConfigError(f"{path}: {error}: leave one out.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no keys with values: begin with that of trainer/configs/mini.yaml.")
    other = values.pop("extends", None)
    if other is None:
        return values
    beside = path.parent / str(other)
    return _merged(_read(beside if beside.exists() else _shipped(Path(str(other))), (*below, path)), values)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Sections are merged key by key; every other value of `above` takes the place of that below it."""
    out = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merged(out[key], value) if both else value
    return out


def set_value(values: dict[str, Any], override: str) -> None:
    """Write an override "section.key=value" into nested values. Raises ConfigError for what is none."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"The override {override!r} is not understood: write section.key=value.")
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"The override {override!r} goes into {section}, which is a value and no section.")
    if any("\ud800" <= letter <= "\udfff" for letter in text):  # bytes that are no UTF-8, as Python passes them on
        name = os.fsencode(text).decode("utf-8", "backslashreplace")
        raise ConfigError(f"The value of {key}, {name}, is not in UTF-8: rename the file or folder.")
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


def _sentence(kind: type[Section], error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "the configuration"
    if error["type"] == "extra_forbidden":
        return f"{where} is no key of a configuration: {_hint(kind, error['loc'])}"
    if error["type"] == "missing":
        return f"{where} is missing: it must be given."
    reason = error["msg"].removeprefix("Value error, ").rstrip(".")
    end = "" if reason.endswith("?") else "."
    if isinstance(error["input"], dict):  # a section, too long to be repeated
        return f"{where}: {reason}{end}"
    return f"{where} is {error['input']!r}: {reason}{end}"


def _hint(kind: type[Section], location: Sequence[Any]) -> str:
    """The key that was meant: another trainer's word for it, or a slip of the pen."""
    key = str(location[-1])
    if meant := getattr(kind, "SYNONYMS", {}).get(key.lower().lstrip("-").replace("-", "_")):
        return f"did you mean {meant}?"
    section = _section(kind, location[:-1])
    names = list(section.model_fields) if section else []
    near = difflib.get_close_matches(key, names, 1, 0.5)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(names)}."


def _section(model: Any, location: Sequence[Any]) -> type[BaseModel] | None:
    """The section at a location; a key of a mapping (an attribute's name, say) leads to what its values are."""
    for part in location:
        if part in model.model_fields:
            annotation = model.model_fields[part].annotation
            kinds = (annotation, *get_args(annotation))
            model = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), model)
    return model
