"""CLIP (Radford et al. 2021, arXiv 2103.00020) as a measure: a picture encoder with gradients, and vectors of texts.

Files are those of transformers: a whole CLIPModel (both halves) or the picture half alone. The networks are the
package's own; what shapes do not tell comes from the configuration beside a file, or is that of the public models.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..files.atomic import first_line
from ..files.tensors import check_numbers, read_tensors
from .images import CLIP_MEAN, CLIP_STD

TRANSFORMERS_NAMES = ("model", "pytorch_model")  # beside these lies the config.json that belongs to them
# Heads and activation of the public picture halves by their width: OpenAI's B and L, OpenCLIP's H, g and bigG.
PUBLIC = {
    768: (12, "quick_gelu"),
    1024: (16, "quick_gelu"),
    1280: (16, "gelu"),
    1408: (16, "gelu"),
    1664: (16, "gelu"),
}


@dataclass(frozen=True, eq=False)
class CLIPFile:
    """A CLIP file holds weights and settings. configuration: "vision" and "text", those that shapes do not tell."""

    name: str
    tensors: Mapping[str, Tensor]
    configuration: Mapping[str, Mapping[str, Any]]

    @property
    def configuration_name(self) -> str:
        """The file beside it that says what shapes do not tell."""
        stem = Path(self.name).stem
        return "config.json" if stem in TRANSFORMERS_NAMES else f"{stem}_config.json"

    @property
    def has_text(self) -> bool:
        return "text_projection.weight" in self.tensors


def read(path: str | os.PathLike[str]) -> CLIPFile:
    """Read a CLIP file in the transformers layout into host memory.

    Settings come from `<name>_config.json` beside it (`config.json` for a model.safetensors), else they are those of
    the public models. Raises ValueError, one sentence, for a file that is damaged or no CLIP in this layout.
    """
    path = Path(path)
    tensors, _ = read_tensors(path)
    check_numbers(tensors, path.name)
    if "visual.conv1.weight" in tensors:
        raise ValueError(
            f"{path.name} is in OpenCLIP's own layout: use the model.safetensors of the same model in the layout of "
            "transformers."
        )
    if "visual_projection.weight" not in tensors:
        raise ValueError(
            f"{path.name} is not a CLIP in the transformers layout (it has no visual_projection.weight): use the "
            "model.safetensors of a CLIP, such as openai/clip-vit-large-patch14."
        )
    file = CLIPFile(path.name, tensors, {})
    beside = path.with_name(file.configuration_name)
    if beside.is_file():
        try:
            settings = json.loads(beside.read_text(encoding="utf-8"))
            vision = settings.get("vision_config", settings)  # a picture half alone has no second level
            text = settings.get("text_config", {})
            if not isinstance(vision, dict) or not isinstance(text, dict):
                raise ValueError("no settings by name")
            file = CLIPFile(path.name, tensors, {"vision": vision, "text": text})
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{beside.name} beside {path.name} is not a configuration: download it again.") from error
    return file


def picture_config(file: CLIPFile) -> Any:
    """The package's configuration of the picture half: sizes from the shapes, the rest from beside or as published."""
    from transformers import CLIPVisionConfig

    width, _, _, patch = shape(file, "vision_model.embeddings.patch_embedding.weight", 4)
    positions, _ = shape(file, "vision_model.embeddings.position_embedding.weight", 2)
    sizes = {
        **layers(file, "vision_model."),
        "hidden_size": width,
        "patch_size": patch,
        "image_size": patch * math.isqrt(positions - 1),
        "projection_dim": shape(file, "visual_projection.weight", 2)[0],
    }
    return CLIPVisionConfig(**{**(file.configuration.get("vision") or public_settings(file)), **sizes})


def text_config(file: CLIPFile) -> Any:
    """The package's configuration of the text half: sizes from the shapes, the rest from beside or as published."""
    from transformers import CLIPTextConfig

    vocabulary, width = shape(file, "text_model.embeddings.token_embedding.weight", 2)
    sizes = {
        **layers(file, "text_model."),
        "hidden_size": width,
        "vocab_size": vocabulary,
        "max_position_embeddings": shape(file, "text_model.embeddings.position_embedding.weight", 2)[0],
        "projection_dim": shape(file, "text_projection.weight", 2)[0],
    }
    given = file.configuration.get("text") or {**public_settings(file), "num_attention_heads": width // 64}
    return CLIPTextConfig(**{**given, **sizes})


def public_settings(file: CLIPFile) -> dict[str, Any]:
    """Activation (of both halves) and heads (of the picture half) where no configuration says them.

    Raises ValueError, one sentence, for a size that no public model has.
    """
    width = shape(file, "vision_model.embeddings.patch_embedding.weight", 4)[0]
    if width not in PUBLIC:
        raise ValueError(
            f"{file.name} is no public CLIP by its size (its picture half is {width} wide), so nothing says how it is "
            f"built: put its configuration beside it, as {file.configuration_name}."
        )
    heads, activation = PUBLIC[width]
    return {"hidden_act": activation, "num_attention_heads": heads}


class CLIPPictures(nn.Module):
    """The picture half: pictures [n, 3, size, size] in [0, 1] -> [n, channels], not normalised, in float32."""

    mean: Tensor
    std: Tensor

    def __init__(self, file: CLIPFile):
        super().__init__()
        from transformers import CLIPVisionModelWithProjection

        network: Any = loaded(file, CLIPVisionModelWithProjection, picture_config)
        self.model: nn.Module = network
        self.size: int = network.config.image_size
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.model(pixel_values=(pictures - self.mean) / self.std).image_embeds


@torch.no_grad()
def embed_texts(file: CLIPFile, ids: Tensor) -> Tensor:
    """Unit vectors [n, channels] of texts, given as the CLIP tokenizer's ids [n, length] with the end token in each.

    The text half is built for this alone and dropped again. Raises ValueError where the file has none.
    """
    from transformers import CLIPTextModelWithProjection

    if not file.has_text:
        raise ValueError(
            f"{file.name} holds CLIP's picture half alone: use a whole CLIP (the model.safetensors of "
            "openai/clip-vit-large-patch14, say) to compare with words."
        )
    model = loaded(file, CLIPTextModelWithProjection, text_config)
    return F.normalize(model(input_ids=ids.long()).text_embeds, dim=-1)


def directions(texts: Tensor, neutral: Tensor) -> Tensor:
    """The ways [n, channels] from a neutral text to others, unit vectors, given unit vectors [n, channels], [channels].

    As a target it rewards what the text says beyond the neutral one; what both say of any picture ("a photo of a face")
    cancels. Raises ValueError where a text equals the neutral one.
    """
    ways = texts - neutral
    if bool((ways.norm(dim=-1) < 1e-4).any()):
        raise ValueError("The text and the neutral text say the same: write what the picture should be like.")
    return F.normalize(ways, dim=-1)


def shape(file: CLIPFile, name: str, dimensions: int) -> torch.Size:
    """The shape of a tensor; ValueError where the file lacks it or it has another number of dimensions."""
    tensor = file.tensors.get(name)
    if tensor is None or tensor.ndim != dimensions:
        raise ValueError(f"{file.name} is not a complete CLIP ({name} is missing or damaged): download it again.")
    return tensor.shape


def layers(file: CLIPFile, half: str) -> dict[str, int]:
    """Number of layers and width of their perceptrons in one half."""
    count = 0
    while f"{half}encoder.layers.{count}.mlp.fc1.weight" in file.tensors:
        count += 1
    width = shape(file, f"{half}encoder.layers.0.mlp.fc1.weight", 2)[0]
    return {"num_hidden_layers": count, "intermediate_size": width}


def loaded(file: CLIPFile, kind: type[nn.Module], configured: Callable[[CLIPFile], Any]) -> nn.Module:
    """The package's network with the file's weights in float32, frozen. Raises ValueError where they do not fit.

    configured: gives the package's configuration of this half.
    """
    try:
        config = configured(file)
        with torch.device("meta"):  # the file's tensors take these places: nothing is allocated or initialised twice
            network = kind(config)
    except Exception as error:  # the package believes in a configuration: a TypeError, KeyError, ZeroDivisionError ...
        if type(error) is ValueError and str(error).startswith(file.name):
            raise
        raise ValueError(
            f"{file.name} or {file.configuration_name} beside it says how no CLIP can be built ({first_line(error)}): "
            "download both again."
        ) from error
    try:
        return fill(network, file.tensors, torch.float32)
    except ValueError as error:
        raise ValueError(f"{file.name} does not fit CLIP's layout: {error}; download it again.") from error


def fill(network: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> nn.Module:
    """Put weights in the layout of transformers into one half of CLIP, built on the meta device; frozen.

    Some versions of transformers leave out the "vision_model." or "text_model." with which files name a half's weights.
    dtype: of the weights, None as they are stored. Raises ValueError, which says of a weight what is wrong with it.
    """
    half = "text_model." if hasattr(network.config, "vocab_size") else "vision_model."
    weights = {}
    for name, place in network.state_dict().items():
        if name.endswith("position_ids"):
            continue
        found = next((tensors[k] for k in (name, half + name, name.removeprefix(half)) if k in tensors), None)
        if found is None or found.shape != place.shape:
            got = "is missing" if found is None else f"has the shape {list(found.shape)}, not {list(place.shape)}"
            raise ValueError(f"{name} {got}")
        weights[name] = found if dtype is None else found.to(dtype)
    network.load_state_dict(weights, assign=True, strict=False)
    for module in network.modules():  # counting numbers, which newer files do not hold
        position_ids = module._buffers.get("position_ids")
        if position_ids is not None:
            module.position_ids = torch.arange(position_ids.shape[-1]).expand(1, -1)
    return network.requires_grad_(False).eval()
