"""Trained weights -> the encoder file that the nodes load as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ...lookahead.files import encoder_file
from ...sdxl.encoder import Encoder
from .config import Config


def export(path: Path, encoder: Encoder, config: Config, steps: int, about: Mapping[str, str] | None = None) -> Path:
    """Write the encoder file, in 32 bit, with where it comes from.

    steps: that it was trained for. about: more fields of its metadata (`encoder_file.METADATA_FIELDS`), such as the
    licence of the recogniser. Raises EncoderFileError where the nodes would refuse the result.
    """
    shown = config.shareable()
    metadata = {
        "base_model": shown["model"]["base"],
        "kv_prompt": config.data.kv_prompt,
        "recogniser": shown["model"]["recogniser"] or "none",
        "data": shown["data"]["source"],
        "config": json.dumps(shown),
        "steps": str(steps),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": config.name,
        "modelspec.architecture": "stable-diffusion-xl-v1-base/ip-adapter",
    }
    if config.model.kv:
        metadata |= {"kv_rank": str(config.model.kv_rank)}
    path.parent.mkdir(parents=True, exist_ok=True)
    pairs = encoder.projection_weights
    encoder_file.write(path, encoder.image_proj.state_dict(), pairs, metadata | dict(about or {}), encoder.kv.tensors())
    return path
