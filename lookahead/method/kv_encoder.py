"""The KV encoder (arXiv 2404.03620, section 4.3): the base's own UNet with low-rank changes of attention projections.

It is an algebra over projections that are already made: whoever runs the UNet (processors of diffusers, patches of the
host) projects x with the base's layer W, and asks here what the KV encoder makes of W x. Its two halves are

    kv_encoder   W x + s B A x     what the pass itself goes on with: queries, keys, values, outputs of both attentions
    kv_export    W x + s B' A' x   the keys and values of a self-attention that the picture reads

so the export starts from the base's projection, not from the tuned one. A layer is named "<half>.<path>.<projection>",
with the block's path in diffusers' UNet: "kv_export.mid_block.attentions.0.transformer_blocks.0.attn1.to_k".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType

import torch
from torch import Tensor, nn

KV_ENCODER, KV_EXPORT = "kv_encoder", "kv_export"  # the halves, as the names of the files begin
TUNED = tuple(f"attn{n}.{layer}" for n in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out.0"))
EXPORTED = ("attn1.to_k", "attn1.to_v")

Widths = tuple[int, int]  # of a projection: in, out


class LowRank(nn.Module):
    """A low-rank change of a projection, kept apart from it: x [..., in] -> scale * B A x [..., out].

    LoRA (arXiv 2106.09685); A is [rank, in], B is [out, rank]. `operations` gives the linear layers (the host passes
    its own, which cast as they go).
    """

    def __init__(self, width_in: int, width_out: int, rank: int, scale: float = 1.0, operations: ModuleType = nn):
        super().__init__()
        self.lora_A = operations.Linear(width_in, rank, bias=False)
        self.lora_B = operations.Linear(rank, width_out, bias=False)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        out = self.lora_B(self.lora_A(x))
        return out if self.scale == 1 else out * self.scale


def last_path(paths: Iterable[str]) -> str:
    """The transformer block that runs last: its attentions come after every key and value that is exported."""
    ups = [path for path in paths if path.startswith("up_blocks")]
    return max(ups, key=lambda path: [int(n) for n in path.split(".")[1::2]])


def layers(paths: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Half, path and projection of every layer that a KV encoder has for these blocks, in the order of the files."""
    paths = tuple(paths)
    last = last_path(paths)
    yield from ((KV_ENCODER, path, projection) for path in paths if path != last for projection in TUNED)
    yield from ((KV_EXPORT, path, projection) for path in paths for projection in EXPORTED)


class KVEncoder(nn.ModuleDict):
    """The low-rank changes by name of layer, with "/" for "." (names of modules hold no dots). Empty: none, as where
    keys and values are exported without training."""

    @classmethod
    def fresh(cls, paths: Iterable[str], widths: Callable[[str], Widths], kv_rank: int, export_rank: int) -> KVEncoder:
        """A new one, to be trained, which changes nothing yet: A is drawn from N(0, 1/rank^2), B is zero.

        widths: of the base's layer "<path>.<projection>".
        """
        kv = cls()
        for half, path, projection in layers(paths):
            rank = kv_rank if half == KV_ENCODER else export_rank
            change = LowRank(*widths(f"{path}.{projection}"), rank)
            nn.init.normal_(change.lora_A.weight, std=1 / rank)
            nn.init.zeros_(change.lora_B.weight)
            kv[_key(half, path, projection)] = change
        return kv

    @classmethod
    def from_weights(
        cls,
        weights: Mapping[str, tuple[Tensor, Tensor]],
        scale: Callable[[int], float] = lambda rank: 1.0,
        operations: ModuleType = nn,
    ) -> KVEncoder:
        """That of an encoder file, frozen, in the file's precision. The tensors are taken, not copied.

        weights: A [rank, in] and B [out, rank] by name of layer (`EncoderFile.kv_layers`); scale: of a rank
        (`EncoderFile.kv_scale`); operations: as in `LowRank`.
        """
        kv = cls()
        for name, (a, b) in weights.items():
            rank, width_in = a.shape
            with torch.device("meta"):
                change = LowRank(width_in, b.shape[0], rank, scale(rank), operations)
            change.load_state_dict({"lora_A.weight": a, "lora_B.weight": b}, assign=True)
            kv[_key(name)] = change
        return kv.requires_grad_(False).eval()

    def change(self, half: str, path: str, projection: str) -> LowRank | None:
        """The change of one projection of a block, None where there is none."""
        key = _key(half, path, projection)
        return self[key] if key in self else None

    def tuned(self, path: str, projection: str, projected: Tensor, x: Tensor) -> Tensor:
        """What the reference pass goes on with. projection: one of TUNED; projected: x by the base's own layer."""
        return _changed(self.change(KV_ENCODER, path, projection), projected, x)

    def exported(self, path: str, projection: str, projected: Tensor, x: Tensor) -> Tensor:
        """What the picture reads. projection: one of EXPORTED; projected: x by the base's own layer, not tuned."""
        return _changed(self.change(KV_EXPORT, path, projection), projected, x)

    @property
    def widths(self) -> dict[str, Widths]:
        """By name of layer."""
        return {
            key.replace("/", "."): (change.lora_A.weight.shape[1], change.lora_B.weight.shape[0])
            for key, change in self.items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """The weights under the names of the encoder file."""
        return {
            f"{key.replace('/', '.')}.lora_{which}.weight": getattr(change, f"lora_{which}").weight
            for key, change in self.items()
            for which in "AB"
        }

    @torch.no_grad()
    def copy_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the values of `tensors()`. Raises ValueError where names or ranks differ."""
        own = self.tensors()
        for name in own.keys() | tensors.keys():
            if name not in own or name not in tensors or own[name].shape != tensors[name].shape:
                raise ValueError(
                    f"The KV encoder of the file differs from the one to be trained in {name}: set kv_rank and "
                    "export_rank to the file's ranks."
                )
            own[name].copy_(tensors[name])


def _key(*name: str) -> str:
    return ".".join(name).replace(".", "/")


def _changed(change: LowRank | None, projected: Tensor, x: Tensor) -> Tensor:
    return projected if change is None else projected + change(x)
