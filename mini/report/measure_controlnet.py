"""Does the ControlNet do what it is for? Edges of samples against the edges that they were given, held-out people."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F

from ...evaluation.stats import Interval, bootstrap
from ...sdxl.shared_unet import Condition
from ..stages import base, controlnet, evaluators, stage, vae
from ..world.data import Pictures
from ..world.edges import edges
from ..world.faces import STYLES
from ..world.sheet import save_grid
from .measure import sample

STEPS = 20  # of DDIM
NEAR = 3  # pixels a side of the window within which two edges count as the same


def agreement(found: Tensor, wanted: Tensor) -> Tensor:
    """[n]: F1 of edges `found` against `wanted` [n, 3, h, w] of 0 and 1, each within one pixel of the other."""

    def share(a: Tensor, b: Tensor) -> Tensor:
        near = F.max_pool2d(b[:, :1], NEAR, 1, NEAR // 2)
        return (a[:, :1] * near).sum((1, 2, 3)) / a[:, :1].sum((1, 2, 3)).clamp(min=1)

    precision, recall = share(found, wanted), share(wanted, found)
    return 2 * precision * recall / (precision + recall).clamp(min=1e-6)


def edge_guided(
    unet: UNet2DConditionModel, net: ControlNetModel | None, hint: Tensor
) -> Callable[[Tensor, Tensor, Condition], Tensor]:
    """`controlnet.predict` under edges `hint` [n, 3, 8h, 8w], for batches of n rows or a multiple; without if `net` is
    None."""

    def predict(x: Tensor, t: Tensor, text: Condition) -> Tensor:
        return controlnet.predict(unet, net, x, t, text, hint.repeat(len(x) // len(hint), 1, 1, 1))

    return predict


@torch.no_grad()
def report(folder: Path, pictures: Pictures, people: int = 32, seed: int = 1) -> dict[str, Interval]:
    """A picture each of `people` people, styles in turn: its edges with the short prompt of its own style, and with
    that of the next style. Also draws `controlnet.png`: picture, edges, without them, with them, in the other style.
    """
    unet, text = base.load(folder)
    net = controlnet.load(stage.read_tensors(folder / "controlnet.safetensors"))
    autoencoder = vae.load(folder)
    _, scorer = evaluators.load(folder)
    style, rows = pictures.labels["style"], []
    there = style.unique()
    for person in range(people):  # of the pictures of this person, the one in the style whose turn it is
        mine = range(person * pictures.per_person, (person + 1) * pictures.per_person)
        rows.append(next(i for i in mine if style[i] == there[person % len(there)]))
    index = torch.tensor(rows)
    picture = pictures.images(index)
    hint = edges(picture)
    short = [pictures.short[i] for i in rows]
    following = there[(torch.searchsorted(there, style[index]) + 1) % len(there)]
    others = [s.replace(STYLES[style[i]], STYLES[k]) for s, i, k in zip(short, rows, following.tolist(), strict=True)]
    drawn = {}
    for name, prompts, with_net in (
        ("without edges", short, None),
        ("with edges", short, net),
        ("with edges, next style", others, net),
    ):
        predict = edge_guided(unet, with_net, hint)
        z = sample(predict, text, prompts, torch.Generator().manual_seed(seed), STEPS)
        drawn[name] = (autoencoder.decoder(z) / 2 + 0.5).clamp(0, 1)
    figures = {}
    for name, x in drawn.items():
        wanted = following if name.endswith("style") else style[index]
        figures[f"edge agreement, {name}"] = _mean(agreement(edges(x), hint))
        figures[f"style accuracy, {name}"] = _mean((scorer(x)[0].argmax(1) == wanted).float())
    rebuilt = (autoencoder.decoder(autoencoder.encoder(picture * 2 - 1)) / 2 + 0.5).clamp(0, 1)
    figures["edge agreement, reconstruction of the picture itself"] = _mean(agreement(edges(rebuilt), hint))
    for name, value in figures.items():
        print(f"{name:52} {value}")
    save_grid(torch.stack([picture, hint, *drawn.values()])[:, :16].flatten(0, 1), 16, folder / "controlnet.png")
    (folder / "controlnet_report.json").write_text(json.dumps({k: list(v) for k, v in figures.items()}, indent=1))
    return figures


def _mean(values: Tensor) -> Interval:
    return bootstrap(lambda rows: values[rows].mean().item(), len(values))
