"""Stage: the networks that only ever measure. Their people appear in no other training."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..plan import Plan
from ..world.data import Pictures
from ..world.styles import blur
from . import stage
from .networks import EvaluationRecogniser, StyleScorer, ThingJudge

BATCH = 96


def disturb(x: Tensor, numbers: torch.Generator) -> Tensor:
    """Shift, noise and blur at random: generated pictures are less exact than drawn ones."""
    rows, columns = torch.randint(-6, 7, (2,), generator=numbers).tolist()
    x = F.pad(x, (6, 6, 6, 6), mode="replicate")
    x = x[:, :, 6 + rows : x.shape[2] - 6 + rows, 6 + columns : x.shape[3] - 6 + columns]
    noise, strength, soft, sigma = torch.rand(4, generator=numbers).tolist()
    if noise < 0.4:
        x = x + torch.randn(x.shape, generator=numbers).to(x) * strength * 0.1
    return blur(x, 0.6 + 2.0 * sigma) if soft < 0.4 else x


def train_recogniser(folder: Path, pictures: Pictures, plan: Plan) -> None:
    """Regression of the parameters that the faces were drawn with, from any style."""
    target = pictures.labels["identity"]

    def loss(net: EvaluationRecogniser, x: Tensor, index: Tensor) -> Tensor:
        return F.mse_loss(net(x).float(), target[index].to(x.device))

    net = EvaluationRecogniser()
    net.centre.copy_(target.mean(0))
    _train("recogniser", folder, net, loss, pictures, plan.recogniser_steps, plan.seed + 2)


def train_style_scorer(folder: Path, pictures: Pictures, plan: Plan) -> None:
    style, place = pictures.labels["style"], pictures.labels["place"]

    def loss(net: StyleScorer, x: Tensor, index: Tensor) -> Tensor:
        s, p = (y.float() for y in net(x))
        return F.cross_entropy(s, style[index].to(x.device)) + F.cross_entropy(p, place[index].to(x.device))

    _train("style_scorer", folder, StyleScorer(), loss, pictures, plan.style_steps, plan.seed + 3)


def train_thing_judge(folder: Path, pictures: Pictures, plan: Plan) -> None:
    """Regression of the parameters that the things were drawn with, from any style."""
    target = pictures.labels["identity"]

    def loss(net: ThingJudge, x: Tensor, index: Tensor) -> Tensor:
        return F.mse_loss(net(x).float(), target[index].to(x.device))

    net = ThingJudge()
    net.centre.copy_(target.mean(0))
    _train("things_judge", folder, net, loss, pictures, plan.things_judge_steps, plan.seed + 14)


def train_things_scorer(folder: Path, things: Pictures, faces: Pictures, plan: Plan) -> None:
    """Style and place of pictures of things and of faces: the scorer of faces alone takes a thing's flat paint for
    another style. Half of each batch are things."""
    style, place = (torch.cat([p.labels[k] for p in (things, faces)]) for k in ("style", "place"))

    def picked(numbers: torch.Generator) -> Tensor:
        half = BATCH // 2
        of_things = torch.randint(len(things), (half,), generator=numbers)
        return torch.cat([of_things, len(things) + torch.randint(len(faces), (BATCH - half,), generator=numbers)])

    def images(index: Tensor, device: torch.device) -> Tensor:
        of_things = index < len(things)
        return torch.cat(
            [things.images(index[of_things], device), faces.images(index[~of_things] - len(things), device)]
        )

    def loss(net: StyleScorer, x: Tensor, index: Tensor) -> Tensor:
        s, p = (y.float() for y in net(x))
        return F.cross_entropy(s, style[index].to(x.device)) + F.cross_entropy(p, place[index].to(x.device))

    steps, seed = plan.things_scorer_steps, plan.seed + 15
    _train_on("things_scorer", folder, StyleScorer(), loss, picked, images, steps, seed)


def _train(name: str, folder: Path, net: nn.Module, loss, pictures: Pictures, steps: int, seed: int) -> None:
    def picked(numbers: torch.Generator) -> Tensor:
        return torch.randint(len(pictures), (BATCH,), generator=numbers)

    _train_on(name, folder, net, loss, picked, pictures.images, steps, seed)


def _train_on(name: str, folder: Path, net: nn.Module, loss, picked, images, steps: int, seed: int) -> None:
    """picked: a step's generator -> numbers of pictures; images: these and a device -> [n, 3, h, w]."""
    out = folder / f"{name}.safetensors"
    if out.exists():
        return
    torch.manual_seed(seed)
    for m in net.modules():  # weights drawn again, from the stage's own seed
        if hasattr(m, "reset_parameters"):
            m.reset_parameters()
    device = stage.device()
    net.to(device)

    def loss_of_step(step: int) -> Tensor:
        numbers = stage.numbers_of_step(seed, step)
        index = picked(numbers)
        x = disturb(images(index, device), numbers)
        with stage.autocast(device):
            return loss(net, x, index)

    stage.train(name, folder, {name: net}, loss_of_step, steps=steps, rate=2e-3, decay=0.05)
    stage.write_tensors(out, net.state_dict())
    stage.finish(name, folder)


def load(folder: Path) -> tuple[EvaluationRecogniser, StyleScorer]:
    nets = EvaluationRecogniser(), StyleScorer()
    for net, name in zip(nets, ("recogniser", "style_scorer"), strict=True):
        net.load_state_dict(stage.read_tensors(folder / f"{name}.safetensors"))
        net.eval().requires_grad_(False)
    return nets
