"""From a configuration to what the training loop takes: the step with all its models, and the source of its data.

One path for SDXL and for the mini world, whose files stand in the repository in the same formats.
"""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import accelerate
import torch
from accelerate.utils import parse_flag_from_env
from torch import Tensor

from ..lookahead.files import encoder_file
from ..lookahead.files.tensors import EncoderFileError, read_tensors, sha256
from ..lookahead.vision import arcface
from ..lookahead.vision.arcface import RecogniserError
from ..lookahead.vision.face_models import SIZES, FaceModelError, FaceModels
from ..sdxl import load, lora
from ..sdxl.encoder import Encoder
from ..sdxl.images import PictureError
from ..sdxl.load import Frozen, ModelError, Preview, found
from ..trainer.config import ConfigError
from ..trainer.data.folder import FolderSource
from ..trainer.data.pairs import DataError
from ..trainer.data.sharded import ShardSource, holds_shards
from ..trainer.lookahead.config import Config
from ..trainer.lookahead.recipe import LookaheadRecipe
from ..trainer.lookahead.step import Step
from ..trainer.recipe import Source

if TYPE_CHECKING:
    from ..lookahead.vision.arcface import Recogniser
    from ..lookahead.vision.faces import Detector, Face

# What may be wrong with a configuration and its files, each in one sentence for the user.
ERRORS = (
    ConfigError,
    DataError,
    EncoderFileError,
    FaceModelError,
    ImportError,
    ModelError,
    OSError,
    PictureError,
    RecogniserError,
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def assemble(config: Config) -> tuple[LookaheadRecipe, Source]:
    """The recipe, with all its models, and the source of its data.

    Raises one of ERRORS for a file that is missing or is none of its kind.
    """
    frozen, preview = read_frozen(config)
    step = make_step(config, frozen, preview)
    recogniser, detector, licence = read_faces(config)
    if config.data.source == "mini":
        from ..mini.drawn_people import DrawnPeople

        source: Source = DrawnPeople(config.data.people, frozen, recogniser, detector)
    elif holds_shards(Path(config.data.source)):
        source = ShardSource(config, frozen, recogniser, detector)
    else:
        source = FolderSource(config, frozen, recogniser, detector)
    about = {
        "base_model_hash": base_hash(config),
        "image_encoder": Path(config.model.image_encoder or "mini").name,
        "size": str(8 * source.latent_shape[-1]),
        "data_hash": source.digest(),
        "recogniser_licence": licence,
    }
    return LookaheadRecipe(config, step, about), source


def base_hash(config: Config) -> str:
    """Hash of the file with the UNet's weights; of several (a model in shards), of their hashes."""
    from ..mini.files.weights import CHECKPOINT

    folder = of_mini(config)
    path = folder / CHECKPOINT if folder else found("base", config.model.base)
    if path.is_file():
        return sha256(path)
    files = sorted((path / "unet").glob("*.safetensors")) or sorted((path / "unet").glob("*.bin"))
    hashes = [sha256(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def device() -> torch.device:
    """What this process of a run computes on, as accelerate chooses it."""
    return accelerate.PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device


def of_mini(config: Config) -> Path | None:
    """Folder of the mini world's files where the base is one (`mini`: those of the repository), else None."""
    from ..mini.files.weights import CHECKPOINT
    from ..mini.plan import WEIGHTS

    folder = WEIGHTS if config.model.base == "mini" else Path(config.model.base)
    return folder if (folder / CHECKPOINT).is_file() else None


def read_frozen(config: Config) -> tuple[Frozen, Preview | None]:
    """The frozen models, and the decoder of previews where there is a second loss or a validation."""
    names, dtype = config.model, DTYPES[config.precision]
    drawn = config.lookahead.arm != "none" or config.validate_every > 0
    if folder := of_mini(config):
        from ..mini.drawn_people import frozen

        mini = frozen(folder)
        mini.vae.to(memory_format=torch.channels_last)  # a plain CNN: quicker so
        # One of its own: what reads pictures may leave the device while previews are decoded there.
        preview = load.Preview(copy.deepcopy(mini.vae)) if drawn else None
        if dtype != mini.unet.dtype:
            mini.unet.to(dtype)
            mini.vae.to(dtype)  # this one, unlike SDXL's, is no worse in 16 bit, and is most of the work of reading
        return mini, preview
    base = found("base", names.base)
    vae = found("picture_vae", names.picture_vae) if names.picture_vae else None
    vision = load.load_image_encoder(found("image_encoder", names.image_encoder), dtype)
    preview = load.load_preview(found("vae", names.vae)) if drawn else None
    return Frozen(*load.load_base(base, dtype, vae), vision), preview


def make_step(config: Config, frozen: Frozen, preview: Preview | None) -> Step:
    """The step, with an encoder that begins where `model.start` is."""
    names, beside = config.model, _beside(config)
    start = encoder_file.read(found("start", names.start, *beside))
    torch.manual_seed(config.seed)  # of the KV encoder's first weights
    ranks = (names.kv_rank, names.export_rank) if names.kv else (0, 0)
    encoder = Encoder.start_from(start, frozen.unet, *ranks)
    shortcut = None
    if config.lookahead.arm == "shortcut":
        path = found("shortcut", names.shortcut, *beside)
        try:
            shortcut = lora.load(lora.public(read_tensors(path)[0]), frozen.unet).to(frozen.unet.dtype)
        except KeyError as error:
            raise ModelError(f"{path} is no LoRA for this base ({error.args[0]}): use one for SDXL.") from error
    attention = {}
    if of_mini(config):
        from ..mini.stages.image_prompt import softmax_attention

        attention = {"attention": softmax_attention}  # faster than SDPA's on a CPU, at these sizes
    null = frozen.null_features()
    if null.shape[-1] != start.sizes.image_width:
        raise ModelError(
            f"The image encoder has width {null.shape[-1]}, and {start.name} reads {start.sizes.image_width}: use the "
            "image encoder that it was trained with (ViT-H/14 for the public *_vit-h files)."
        )
    return Step(config, frozen.unet, encoder, null, shortcut, preview, **attention)


def read_faces(config: Config) -> tuple[Recogniser | None, Detector | None, str]:
    """Recogniser and detector of the identity loss, and the recogniser's licence as far as it is known.

    Both are there without a second loss too, where they are named: for validation, and to know where to crop.
    """
    names, folder = config.model, of_mini(config)
    wanted = config.lookahead.arm != "none" or (names.detector is not None and names.recogniser is not None)
    if folder:
        from ..mini.drawn_people import face_models

        return face_models(folder, names.recogniser) if wanted else (None, None, "none")
    if not wanted:
        return None, open_detector(names.detector) if names.detector else None, "none"
    detector = open_detector(names.detector)
    pack, path = detector.pack, found("recogniser", names.recogniser)
    inside = path.resolve() == (pack.recogniser and pack.recogniser.resolve())
    recogniser = arcface.read(path, pack.preprocessing if inside else None)
    return recogniser, detector, pack.licence if inside else "unknown: ask where the recogniser comes from"


class PackDetector:
    """A pack's detector (`faces.Detector`) at the sizes that it can look at."""

    def __init__(self, pack: FaceModels):
        self.pack, self.sizes = pack, (pack.only_size,) if pack.only_size else SIZES

    def __call__(self, pictures: Tensor) -> list[list[Face]]:
        return self.pack.find(pictures, self.sizes)


def open_detector(folder: str | None) -> PackDetector:
    """The detector of an insightface pack. Raises FileNotFoundError, FaceModelError or ImportError."""
    return PackDetector(FaceModels(found("detector", folder)))


def _beside(config: Config) -> tuple[Path, ...]:
    """Where files are looked for that are not where they are named."""
    folder = of_mini(config)
    return (folder,) if folder else ()
