"""Files as others write them."""

from pathlib import Path

import torch
from lcm_lookahead.lookahead.files.tensors import read_tensors
from lcm_lookahead.lookahead.method.face_id import FaceIDSizes


def halves(weights: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The nested dict of a stock IP-Adapter's .bin."""
    nested: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in weights.items():
        half, _, name = key.partition(".")
        nested[half][name] = value
    return nested


def write_face_id(path: Path, adapter: Path, face_width: int) -> None:
    """A random FaceID Plus v2 (.bin) for the base of a stock IP-Adapter Plus, without a LoRA."""
    stock, numbers = read_tensors(adapter)[0], torch.Generator().manual_seed(6)
    context, image = (stock[f"image_proj.{name}.weight"].shape for name in ("proj_out", "proj_in"))
    sizes = FaceIDSizes(4, context[0], face_width, 2 * face_width, image[1], 2, context[0] // 64, 4 * context[0])
    weights = {f"image_proj.{name}": shape for name, shape in sizes.shapes().items()}
    weights |= {name: tuple(value.shape) for name, value in stock.items() if name.startswith("ip_adapter.")}
    drawn = {name: torch.randn(shape, generator=numbers) * shape[-1] ** -0.5 for name, shape in weights.items()}
    torch.save(halves(drawn), path)
