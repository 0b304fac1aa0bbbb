"""Base models that are known by a name, and the files that belong to them.

`model.base: mini` is a name for a folder of model files like any other. It is looked up here, before anything is
loaded; what a run says of itself (checkpoints, encoder files) is the name that was written down.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..lookahead.files import encoder_file, lora_file
from ..lookahead.files.tensors import read_tensors
from ..sdxl.load import found
from ..trainer.config import BaseModels, ConfigError
from ..trainer.data.pairs import DataError, listing
from ..trainer.data.sharded import holds_shards
from ..trainer.data.shards import Shards
from ..trainer.data.store import Store
from ..trainer.lookahead.config import Config, cache_folder
from ..trainer.lookahead.estimate import Shapes
from ..trainer.noise_guide.config import NoiseGuideConfig

AnyModels = TypeVar("AnyModels", bound=BaseModels)
DRAWN = "mini"  # `data.source` of people who are drawn as they are asked for


@dataclass(frozen=True)
class KnownBase:
    """folder: SDXL in diffusers' layout. beside: where its encoders, LoRAs and recognisers lie, which a configuration
    names without their folder. checkpoint: the one file of the same weights that users load; an encoder file names its
    hash. own: by field of `model`, what it is where it is not set, or set to the name of the base. licence: of what
    lies beside. nouns: the dictionary of concepts, where the base knows few words."""

    folder: Path
    beside: Path
    checkpoint: Path
    own: Mapping[str, Path]
    licence: str
    nouns: tuple[str, ...] = ()


def _mini(base: str) -> KnownBase | None:
    """The mini world: `mini`, `mini_things` (which draws things too), or a folder that holds the files of a build."""
    from ..mini import drawn_people
    from ..mini.files import insightface_pack, shipped
    from ..mini.files.weights import CHECKPOINT
    from ..mini.plan import WEIGHTS
    from ..mini.world.things import CLASSES

    weights = WEIGHTS if base == "mini" else Path(base).expanduser()
    if base == "mini_things":
        from ..mini.files.derived import things_base  # it takes the networks of the build

        weights = things_base()
    if base != "mini" and not (weights / CHECKPOINT).is_file():
        return None
    folder = drawn_people.model_folder(weights)
    own = {
        "vae": folder / "vae",
        "image_encoder": folder / "image_encoder",
        "detector": (weights / insightface_pack.DETECTOR).parent,
    }
    return KnownBase(folder, weights, weights / CHECKPOINT, own, shipped.LICENCE, (*CLASSES, "face"))


# Each is asked in turn whether it knows a base by what `model.base` says.
KNOWN: tuple[Callable[[str], KnownBase | None], ...] = (_mini,)


def check(config: Config) -> None:
    """Raises ConfigError for fields that do not go together, before anything is loaded."""
    if config.data.source == DRAWN and (config.validation.recogniser or config.validation.clip):
        raise ConfigError(
            "validation.recogniser and validation.clip are for folders, and data.source is mini, which is scored by "
            "networks of its own: leave them out."
        )


def known_base(base: str) -> KnownBase | None:
    """Finds what is known by this name; None for the path of any other model."""
    return next((known for ask in KNOWN if (known := ask(base)) is not None), None)


def resolve(model: AnyModels, base: KnownBase | None) -> AnyModels:
    """The section `model` with the paths of a known base in the place of names."""
    if base is None:
        return model
    paths: dict[str, str] = {"base": str(base.folder)}
    for field in ("start", "shortcut", "recogniser"):
        name = getattr(model, field, None)
        if name is not None and not Path(name).expanduser().exists() and (base.beside / name).exists():
            paths[field] = str(base.beside / name)
    for field, path in base.own.items():
        if field in type(model).model_fields and getattr(model, field) in (None, model.base):
            paths[field] = str(path)
    return model.model_copy(update=paths)


def shapes(config: Config) -> Shapes:
    """Gives what an estimate has to know of the files: those of a known base; else SDXL's, which need not be there."""
    size, images = _drawn_size(config.data.source), None
    with contextlib.suppress(DataError):  # data that is not on this machine
        if holds_shards(config.data.source):
            images = len(Shards(Store(config.data.source, cache_folder(config.data))))
        else:
            images = len(listing(Path(config.data.source), config.data.metadata)[0])
    base = known_base(config.model.base)
    if base is None:
        return Shapes(size=size, images=images)
    files = resolve(config.model, base)
    vision = _json(base.own["image_encoder"] / "config.json")
    patches = 1 + (vision["image_size"] // vision["patch_size"]) ** 2
    sizes = encoder_file.read(found("start", files.start)).sizes
    rank = _lora_rank(files.shortcut) if config.lookahead.arm == "shortcut" else 0
    return Shapes(_unet(base), sizes, patches, rank, size, images)


def guide_shapes(config: NoiseGuideConfig) -> Shapes:
    """Gives the same for the estimate of a noise guide."""
    size, base = _drawn_size(config.data.source), known_base(config.model.base)
    if base is None:
        return Shapes(size=size)
    return Shapes(_unet(base), lora_rank=_lora_rank(resolve(config.model, base).shortcut), size=size)


def _drawn_size(source: str) -> int | None:
    """Pixels a side of people who are drawn; None where images are read."""
    if source != DRAWN:
        return None
    from ..mini.plan import IMAGE_SIZE

    return IMAGE_SIZE


def _unet(base: KnownBase) -> str:
    values = _json(base.folder / "unet" / "config.json")
    return json.dumps({k: v for k, v in values.items() if not k.startswith("_")})


def _lora_rank(shortcut: str | None) -> int:
    tensors, _ = read_tensors(found("shortcut", shortcut))
    return lora_file.rank(tensors)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
