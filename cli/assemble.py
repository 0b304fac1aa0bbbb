"""From a configuration to what the training loop takes: the recipe with all its models, and the source of its data.

One path for every model. What a base that is known by name stands for is looked up first (`bases.py`).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..lookahead.files import encoder_file
from ..lookahead.files.tensors import EncoderFileError, read_tensors, sha256
from ..lookahead.method.attention import softmax_attention
from ..lookahead.vision import arcface
from ..lookahead.vision.arcface import Recogniser
from ..lookahead.vision.face_models import SIZES, FaceModels
from ..sdxl import load, lora  # before diffusers: it cures what diffusers' own imports need
from ..sdxl.cpu_attention import cpu_attention
from ..sdxl.encoder import Encoder
from ..sdxl.load import Frozen, ModelError, Preview, found
from ..sdxl.lora import LoRA
from ..trainer.concept.config import ConceptModels
from ..trainer.data.folder import FolderPictures
from ..trainer.data.pictures import PeoplePictures
from ..trainer.data.sharded import ShardPictures, holds_shards
from ..trainer.data.source import PictureSource
from ..trainer.lookahead.config import Config, Model
from ..trainer.lookahead.recipe import LookaheadRecipe
from ..trainer.lookahead.step import Step
from ..trainer.precision import DTYPES
from .bases import DRAWN, KnownBase, check, known_base, resolve

if TYPE_CHECKING:
    from ..lookahead.vision.faces import Detector, Face
    from ..mini.drawn_people import DrawnPeople


def assemble(config: Config) -> tuple[LookaheadRecipe, PictureSource | DrawnPeople]:
    """The recipe, with all its models, and the source of its data.

    Raises one of `main.USER_ERRORS` for a file that is missing or is none of its kind.
    """
    check(config)
    base = known_base(config.model.base)
    files = resolve(config.model, base)
    frozen, preview = read_frozen(config, files)
    step = make_step(config, files, frozen, preview)
    recogniser, detector, licence = read_faces(config, files, base)
    source = open_source(config, frozen, recogniser, detector)
    about = {
        "base_model_hash": base_hash(base.checkpoint if base else Path(files.base)),
        "image_encoder": Path(config.model.image_encoder or config.model.base).name,
        "size": str(8 * source.latent_shape[-1]),
        "data_hash": source.digest(),
        "recogniser_licence": licence,
    }
    return LookaheadRecipe(config, step, about), source


def open_models_and_source(config: Config) -> PictureSource | DrawnPeople:
    """The source of a run's data with the models that read it, and nothing that is trained. Raises as `assemble`."""
    check(config)
    base = known_base(config.model.base)
    files = resolve(config.model, base)
    frozen, _ = read_frozen(config, files)
    recogniser, detector, _ = read_faces(config, files, base)
    return open_source(config, frozen, recogniser, detector)


def open_source(
    config: Config, frozen: Frozen, recogniser: Recogniser | None, detector: Detector | None
) -> PictureSource | DrawnPeople:
    """A folder of people's images, one of shards, or people who are drawn. Raises DataError or ConfigError."""
    if config.data.source != DRAWN:
        pictures: PeoplePictures
        if holds_shards(config.data.source):
            pictures = ShardPictures(config, recogniser is not None)
        else:
            pictures = FolderPictures(config, detector)
        return PictureSource(config, pictures, frozen, recogniser, detector)
    from ..mini.drawn_people import DrawnPeople

    return DrawnPeople(config.data.people, frozen, recogniser, detector)


def base_hash(path: Path) -> str:
    """Hash of the file with the UNet's weights; of several (a model in shards), of their hashes.

    path: of a checkpoint or of a diffusers folder.
    """
    path = path.expanduser()
    if path.is_file():
        return sha256(path)
    files = sorted((path / "unet").glob("*.safetensors")) or sorted((path / "unet").glob("*.bin"))
    hashes = [sha256(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def device() -> torch.device:
    """Finds what this process of a run computes on, as accelerate chooses it."""
    # Here, since it imports transformers, which needs what importing `sdxl` cures.
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device


def read_frozen(config: Config, files: Model) -> tuple[Frozen, Preview | None]:
    """The frozen models, and the decoder of previews where there is a second loss or a validation.

    On a CPU, what reads images and captions stays in 32 bit, with attention written out, and convolutions of the
    autoencoders have their channels last: this is faster there. A tiny autoencoder reads in the run's precision, which
    it is no worse in; SDXL's stays in 32 bit, since it overflows in 16 and an image is encoded once.
    """
    frozen = read_models(files, config.precision)
    drawn = config.lookahead.arm != "none" or config.validate_every > 0
    preview = load.load_preview(found("vae", files.vae)) if drawn else None
    if preview is not None and device().type == "cpu":
        preview.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types lack it
    return frozen, preview


def read_models(files: Model | ConceptModels, precision: str) -> Frozen:
    """The frozen models of a base, as `read_frozen` has them. precision: a key of `DTYPES`."""
    from diffusers import AutoencoderTiny

    dtype, on_cpu = DTYPES[precision], device().type == "cpu"
    readers = torch.float32 if on_cpu else dtype
    picture_vae = found("picture_vae", files.picture_vae) if files.picture_vae else None
    unet, text, vae = load.load_base(found("base", files.base), readers, picture_vae)
    vision = load.load_image_encoder(found("image_encoder", files.image_encoder), readers)
    if on_cpu:
        for model in (text.first, text.second, vision):
            model.set_attn_implementation("eager")
        vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types lack it
    for module in (unet, vae) if isinstance(vae, AutoencoderTiny) else (unet,):
        nn.Module.to(module, dtype)  # (diffusers' own warns of what does not matter here)
    return Frozen(unet, text, vae, vision)


def make_step(config: Config, files: Model, frozen: Frozen, preview: Preview | None) -> Step:
    """The step, with an encoder that begins where `model.start` is."""
    start = encoder_file.read(found("start", files.start))
    torch.manual_seed(config.seed)  # of the KV encoder's first weights
    ranks = (files.kv_rank, files.export_rank) if files.kv else (0, 0)
    encoder = Encoder.start_from(start, frozen.unet, *ranks)
    shortcut = read_shortcut(files, frozen) if config.lookahead.arm == "shortcut" else None
    attention = cpu_attention if device().type == "cpu" else softmax_attention
    null = frozen.null_features()
    if null.shape[-1] != start.sizes.image_width:
        raise ModelError(
            f"The image encoder has width {null.shape[-1]}, and {start.name} reads {start.sizes.image_width}: use the "
            "image encoder that it was trained with (ViT-H/14 for the public *_vit-h files)."
        )
    return Step(config, frozen.unet, encoder, null, shortcut, preview, attention)


def read_shortcut(files: Model, frozen: Frozen) -> LoRA:
    """The few-step LoRA of the previews, in the UNet's precision. Raises FileNotFoundError or ModelError."""
    path = found("shortcut", files.shortcut)
    try:
        return lora.load(read_tensors(path)[0], frozen.unet, str(path)).to(frozen.unet.dtype)
    except EncoderFileError as error:
        raise ModelError(str(error)) from error


def read_faces(
    config: Config, files: Model, base: KnownBase | None = None
) -> tuple[Recogniser | None, Detector | None, str]:
    """Recogniser and detector of the identity loss, and the recogniser's licence as far as it is known.

    Both are there without a second loss too, where they are named: for validation, and to know where to crop.
    """
    named = config.model.detector is not None
    threads = 1 if device().type == "cpu" else None  # torch has the other cores
    if config.lookahead.arm == "none" and not (named and config.model.recogniser is not None):
        return None, open_detector(files.detector, threads) if named else None, "none"
    detector = open_detector(files.detector, threads)
    pack, path = detector.pack, found("recogniser", files.recogniser)
    inside = path.resolve() == (pack.recogniser and pack.recogniser.resolve())
    recogniser = read_recogniser(path, pack.preprocessing if inside else None)
    if inside:
        return recogniser, detector, pack.licence
    if base is not None and path.resolve().is_relative_to(base.beside.resolve()):
        return recogniser, detector, base.licence
    return recogniser, detector, "unknown: ask where the recogniser comes from"


def read_recogniser(path: Path, scale: tuple[float, float] | None) -> Recogniser:
    """A recogniser of a public layout (`arcface.read`), or of that of the mini world's files."""
    from ..mini.files.weights import read_face_recogniser

    network = read_face_recogniser(path)
    return arcface.read(path, scale) if network is None else Recogniser(network, path.name)


class PackDetector:
    """A pack's detector (`faces.Detector`) at the sizes that it can look at."""

    def __init__(self, pack: FaceModels):
        self.pack, self.sizes = pack, (pack.only_size,) if pack.only_size else SIZES

    def __call__(self, pictures: Tensor) -> list[list[Face]]:
        return self.pack.find(pictures, self.sizes)


def open_detector(folder: str | None, threads: int | None = None) -> PackDetector:
    """The detector of an insightface pack, by default on all cores. Raises FileNotFoundError, FaceModelError or
    ImportError."""
    return PackDetector(FaceModels(found("detector", folder), threads=threads))
