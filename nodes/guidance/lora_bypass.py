"""A few-step LoRA bypasses the layers of the base that is loaded, with a strength for each picture.

The base keeps its weights: a second patcher of the same UNet would unload it in the middle of a run. Where all pictures
of a pass have one strength, the LoRA is folded into each layer's weight as that is used, W + s B A, which takes rank /
tokens of the layer's own work; else it runs beside the layer, since one weight cannot have a strength for each picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from comfy.weight_adapter.lora import LoRAAdapter
from torch import Tensor, nn

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

Patch = tuple[float, Any, float, Any, Any]  # strength, what is added, strength of the weight itself, offset, function

# That a layer has more with a bypass beside it than folded, and multiplications that take as long as starting one of
# them and its gradient, on a CPU's core; a GPU does more of them in that time.
_OPERATIONS, _STARTING = 4, 2_000_000
KEPT_BYTES = 2**28  # of folded weights that one pass may keep for its backward; in SDXL folding anew is next to nothing


class Bypass(nn.Module):
    """A LoRA adds scale * up(mid(down(x))) to one Linear or Conv2d; mid splits some convolutions in three."""

    def __init__(self, layer: nn.Module, shape: torch.Size, patch: Patch):
        super().__init__()
        up, down, alpha, mid = (_in_precision_of(layer, tensor) for tensor in patch[1].weights[:4])
        rank = down.shape[0]
        self.scale = patch[0] * (1.0 if alpha is None else float(alpha) / rank)
        if isinstance(layer, nn.Conv2d):
            kernel = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
            inner = down.reshape(rank, shape[1], 1, 1) if mid is not None else down.reshape(rank, *shape[1:])
            self.down = _convolution(inner, **({} if mid is not None else kernel))
            self.mid = None if mid is None else _convolution(mid, **kernel)
            self.up = _convolution(up.reshape(shape[0], up.shape[1], 1, 1))
        else:
            self.down, self.up = _linear(down.reshape(rank, -1)), _linear(up.reshape(shape[0], -1))
            self.mid = None if mid is None else _linear(mid.reshape(rank, -1))

    def is_cheaper_folded(self, x: Tensor) -> bool:
        """Compares rank * in * out (folded) with positions * rank * (in + out) (beside the layer) for an input, and
        counts what starting the operations takes."""
        rank, inputs, outputs = len(self.down.weight), self.down.weight[0].numel(), self.up.weight.shape[0]
        positions = x.numel() // self.down.weight.shape[1]
        return rank * inputs * outputs <= rank * positions * (inputs + outputs) + _OPERATIONS * _STARTING

    def add_to(self, weight: Tensor, strength: float) -> Tensor:
        """The layer's weight [out, ...] with strength * this change in it, a new tensor of its device and precision."""
        up, down = (layer.weight.to(weight).flatten(1) for layer in (self.up, self.down))
        return torch.addmm(weight.flatten(1), up, down, alpha=strength * self.scale).reshape(weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        if self.mid is not None:
            x = self.mid(x)
        return self.scale * self.up(x)


def _in_precision_of(layer: nn.Module, tensor: Any) -> Any:
    """A LoRA's tensor as its layer computes, once for all; as it is, where that would be less exact."""
    to = layer.weight.dtype
    if not isinstance(tensor, Tensor) or to not in (torch.float32, torch.float16, torch.bfloat16):
        return tensor
    return tensor.to(to) if torch.promote_types(tensor.dtype, to) == to else tensor


def _linear(weight: Tensor) -> nn.Module:
    with torch.device("meta"):  # the LoRA's tensor takes this place
        layer = comfy.ops.manual_cast.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _convolution(weight: Tensor, **kernel: Any) -> nn.Module:
    with torch.device("meta"):
        layer = comfy.ops.manual_cast.Conv2d(
            weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), bias=False, **kernel
        )
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


@dataclass(frozen=True, eq=False)
class Strengths:
    """Bypasses act in a pass with these strengths. rows: of each row [n]; common: that of all rows, or None."""

    rows: Tensor
    common: float | None

    @staticmethod
    def of(rows: Tensor) -> Strengths:
        """Looks whether all rows have one strength."""
        different = set(rows.tolist())
        return Strengths(rows, different.pop() if len(different) == 1 else None)


class Bypasses(nn.Module):
    """The bypasses of one shortcut on one base. now: the strengths of this pass, None while they are off."""

    def __init__(self, base: nn.Module, patches: dict[str, list[Patch]]):
        super().__init__()
        self.now: Strengths | None = None
        self._room = 0  # bytes that this pass may keep yet
        self.beside = nn.ModuleList()
        self._by_layer: dict[int, list[Bypass]] = {}
        for key, added in patches.items():
            layer = base.get_submodule(key.removesuffix(".weight"))
            shape = getattr(layer, "_orig_shape", None) or layer.weight.shape
            for patch in added:
                bypass = Bypass(layer, torch.Size(shape), patch)
                self.beside.append(bypass)
                self._by_layer.setdefault(id(layer), []).append(bypass)
        self.requires_grad_(False).eval()

    def fold(self, layer: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        """Gives what makes the weight that a layer uses now, for its input x, of its own; None where nothing acts, it
        cannot be folded in, or x is so small that running beside the layer is less work."""
        bypasses, strength = self._by_layer.get(id(layer), []), self.now and self.now.common
        if strength is None or not bypasses or any(bypass.mid is not None for bypass in bypasses):
            return None
        if not bypasses[0].is_cheaper_folded(x):
            return None

        def folded(weight: Tensor) -> Tensor:
            for bypass in bypasses:
                weight = bypass.add_to(weight, strength)
            return weight

        return folded

    def of(self, layer: nn.Module) -> Callable[[Tensor], Tensor] | None:
        """Gives what a layer adds to its own output now, a function of its input, or None."""
        if self.now is None or id(layer) not in self._by_layer:
            return None
        bypasses, strengths = self._by_layer[id(layer)], self.now.rows

        def change(x: Tensor) -> Tensor:
            # Each row may have been cut into tiles (as HyperTile does): tiles of a row are neighbours.
            strength = strengths.to(x).repeat_interleave(x.shape[0] // len(strengths))
            out = sum(bypass(x) for bypass in bypasses)
            return out * strength.reshape(-1, *[1] * (out.ndim - 1))

        return change

    def kept(self, folded: Tensor) -> Tensor | None:
        """A folded weight, where there is room to keep it until the pass goes back through it."""
        if folded.nbytes > self._room:  # a smaller one may still fit
            return None
        self._room -= folded.nbytes
        return folded

    @contextmanager
    def switched(self, to: Strengths | None) -> Iterator[None]:
        """Inside, the bypasses act with other strengths, or not."""
        before, self.now, self._room = self.now, to, KEPT_BYTES
        try:
            yield
        finally:
            self.now = before


def bypass_patcher(base: nn.Module, patches: dict[str, list[Patch]]) -> ModelPatcher:
    """The bypasses as a model that the host loads and unloads."""
    return comfy.model_patcher.ModelPatcher(
        Bypasses(base, patches),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def added_patches(base: ModelPatcher, shortcut: ModelPatcher) -> tuple[dict[str, list[Patch]], int]:
    """The weight patches that `shortcut` has and `base` lacks, by weight, and how many `base` has that it lacks."""
    added: dict[str, list[Patch]] = {}
    more = 0
    for key in {**base.patches, **shortcut.patches}:
        left = list(base.patches.get(key, ()))
        for patch in shortcut.patches.get(key, ()):
            same = next((n for n, other in enumerate(left) if _same(patch, other)), None)
            if same is None:
                added.setdefault(key, []).append(patch)
            else:
                del left[same]
        more += len(left)
    return added, more


def check_patches(added: dict[str, list[Patch]], base: nn.Module) -> None:
    """Raise ValueError, one sentence, where a patch cannot run as a bypass."""
    for key, patches in added.items():
        path = key.removesuffix(".weight")
        for _, value, strength_model, offset, function in patches:
            kind = getattr(value, "name", None) or (value[0] if isinstance(value, tuple) else type(value).__name__)
            layer = base.get_submodule(path) if path != key else None
            plain = offset is None and function is None and strength_model == 1.0
            lora = isinstance(value, LoRAAdapter) and value.weights[4] is None and value.weights[5] is None
            linear = hasattr(layer, "in_features") or isinstance(layer, nn.Conv2d)
            if not (plain and lora and linear):
                if isinstance(value, LoRAAdapter) and value.weights[4] is not None:
                    kind = "DoRA"
                raise ValueError(
                    f"The shortcut's MODEL changes {key} by a patch of the kind {kind}, and a shortcut takes plain "
                    "LoRA alone: use a LoRA file of up and down matrices, or a distilled checkpoint."
                )


def _same(a: Patch, b: Patch) -> bool:
    """Whether two patches are one, or two readings of one file."""
    if a[1] is b[1]:
        return a[0] == b[0] and a[2] == b[2]
    mine, others = (getattr(patch[1], "weights", None) for patch in (a, b))
    if a[0] != b[0] or a[2] != b[2] or type(a[1]) is not type(b[1]) or mine is None or len(mine) != len(others):
        return False
    return all(_equal(x, y) for x, y in zip(mine, others, strict=True))


def _equal(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor) or isinstance(y, Tensor):
        return isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and torch.equal(x, y)
    return x == y
