"""Face recognisers that gradients flow through: IR-SE50 and its family in the public layouts, and any ArcFace ONNX.

All see an aligned crop (`faces.align`), RGB, and give a vector that says who it is.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..files.atomic import first_line
from ..files.tensors import EncoderFileError, check_numbers, read_tensors
from .faces import CROP

BYTES = (127.5, 127.5)  # mean and deviation, in bytes, of what ArcFace's networks are trained on
_BLOCKS = ([2, 2, 2, 2], [3, 4, 6, 3], [3, 4, 14, 3], [3, 13, 30, 3], [3, 8, 36, 3])  # 18, 34, 50, 100, 152 layers
_WIDTHS = (64, 128, 256, 512)
_WRAPPERS = ("state_dict.", "model.", "module.", "backbone.", "net.")  # what trainers put before the names
_MOST_NUMBERS = 1 << 27  # in one step of a recogniser at one crop; IR-100 at 112 pixels has 800,000
_FURTHEST = 1e-3  # what onnx2torch may be off, as a share of the longest embedding


class RecogniserError(ValueError):
    """Why a file cannot be used as a recogniser, in one sentence for the user."""


class Recogniser(nn.Module):
    """Aligned crops -> who it is.

    network: [n, 3, size, size] -> [n, d]. mean, deviation: of its input, in bytes. one_by_one: it takes no batches.
    """

    def __init__(
        self,
        network: nn.Module,
        name: str,
        size: int = CROP,
        scale: tuple[float, float] = BYTES,
        one_by_one: bool = False,
    ):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.name, self.size, self.one_by_one = name, size, one_by_one
        self.mean, self.deviation = scale

    def forward(self, crops: Tensor) -> Tensor:
        """RGB in [0, 1], [n, 3, size, size] -> unit vectors [n, d], float32 (float64 for a network of float64)."""
        x = (crops * 255 - self.mean) / self.deviation
        rows = [self.network(row) for row in x.split(1)] if self.one_by_one else [self.network(x)]
        return F.normalize(torch.cat(rows), dim=-1)


def read(path: str | os.PathLike[str], scale: tuple[float, float] | None = None) -> Recogniser:
    """A recogniser from its file: ONNX, or weights of IR-SE50, IR-50, IR-100 (.pth, .pt, .bin, .safetensors).

    scale: mean and deviation of its input in bytes where they are stated somewhere (a pack's manifest).
    Raises RecogniserError, one sentence, for any other file; ImportError where ONNX cannot be read here.
    """
    path = Path(path)
    if path.suffix.lower() == ".onnx":
        return from_onnx(path, scale)
    try:
        tensors, _ = read_tensors(path)
        check_numbers(tensors, path.name)
    except EncoderFileError as error:
        raise RecogniserError(str(error)) from error
    return from_weights(tensors, path.name, scale or BYTES)


def from_weights(tensors: Mapping[str, Tensor], name: str, scale: tuple[float, float] = BYTES) -> Recogniser:
    """The network whose weights these are, by their names. Raises RecogniserError, one sentence."""
    tensors = dict(tensors)
    for prefix in _WRAPPERS:
        if tensors and all(key.startswith(prefix) for key in tensors):
            tensors = {key[len(prefix) :]: value for key, value in tensors.items()}
    if "input_layer.0.weight" in tensors:
        count, make = _units(tensors, "body."), _ir(tensors)
    elif "layer1.0.conv1.weight" in tensors:
        count, make = _units(tensors, "layer"), IResNet
    else:
        some = ", ".join(sorted(tensors)[:3])
        raise RecogniserError(
            f"{name} is no face recogniser of a known layout (it begins with {some}): use IR-SE50 (model_ir_se50.pth), "
            "an IR-50 or IR-100 of ArcFace, or an ArcFace .onnx."
        )
    blocks = next((blocks for blocks in _BLOCKS if sum(blocks) == count), None)
    if blocks is None:
        raise RecogniserError(
            f"{name} has {count} residual blocks, and {', '.join(str(sum(b)) for b in _BLOCKS)} are known: the file is "
            "incomplete or of another kind."
        )
    with torch.device("meta"):  # the file's tensors take these places
        network = make(blocks)
    expected = network.state_dict()
    counters = {key for key in expected if key.endswith("num_batches_tracked")}
    missing = sorted(expected.keys() - tensors.keys() - counters)
    surplus = sorted(tensors.keys() - expected.keys())
    wrong = sorted(key for key in expected.keys() & tensors.keys() if expected[key].shape != tensors[key].shape)
    if missing or surplus or wrong:
        key = (missing or surplus or wrong)[0]
        what = "lacks" if missing else "has the unknown weight" if surplus else "has another shape of"
        raise RecogniserError(
            f"{name} {what} {key}: it is damaged or made for other pictures than crops of {CROP} pixels, so use the "
            "published file."
        )
    values = {key: torch.zeros((), dtype=torch.long) if key in counters else tensors[key].float() for key in expected}
    network.load_state_dict(values, assign=True)
    return Recogniser(network, name, CROP, scale)


def from_onnx(path: Path, scale: tuple[float, float] | None = None) -> Recogniser:
    """An ArcFace ONNX in torch, through onnx2torch; where onnxruntime is there, both must agree on the same input.

    scale: as `read`; by default a graph that begins by subtracting and multiplying normalises by itself (mxnet's), and
    any other wants (bytes - 127.5) / 127.5. Raises RecogniserError or ImportError, one sentence.
    """
    import_onnx2torch()
    import onnx
    from onnx2torch import convert

    name = path.name
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's own kinds, and OSError
        raise RecogniserError(f"{name} cannot be read as ONNX ({first_line(error)}): download it again.") from error
    size = _input_size(model, name)
    _check_memory(model, name)
    try:
        network = convert(model)
    except NotImplementedError as error:
        raise RecogniserError(
            f"{name} uses an operation that onnx2torch does not know ({first_line(error)}): use the same recogniser in "
            "torch (.pth or .safetensors), or export it with opset 17 by torch's older exporter (dynamo=False)."
        ) from error
    except Exception as error:  # a KeyError, an AssertionError ...: whatever it stumbles over
        raise RecogniserError(
            f"onnx2torch cannot convert {name} ({type(error).__name__}: {first_line(error)}): use the same recogniser "
            "in torch (.pth or .safetensors)."
        ) from error
    network.float().eval()
    one_by_one = _check(network, model, path, size)
    return Recogniser(network, name, size, scale or _scale(model.graph), one_by_one)


def import_onnx2torch() -> None:
    """Raise ImportError, one sentence that says what to install, where onnx2torch cannot be used."""
    missing = [name for name in ("onnx", "onnx2torch") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"A recogniser in ONNX needs onnx and onnx2torch for its gradient, and ComfyUI's Python has no "
            f"{' and no '.join(missing)}: run `pip install onnx`, then `pip install --no-deps onnx2torch` (which else "
            "may replace torch), then restart ComfyUI, or choose a recogniser in torch."
        )
    try:
        import onnx2torch  # noqa: F401
    except Exception as error:  # a torchvision of another build raises RuntimeError
        raise ImportError(
            f"onnx2torch cannot be imported ({first_line(error)}), most often because torchvision does not fit torch: "
            "install a torchvision that does, or choose a recogniser in torch."
        ) from error


def _input_size(model: Any, name: str) -> int:
    weights = {weight.name for weight in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    sizes = [[d.dim_value for d in value.type.tensor_type.shape.dim] for value in inputs]
    ok = len(sizes) == 1 and len(sizes[0]) == 4 and sizes[0][1] == 3 and sizes[0][2] == sizes[0][3]
    size = sizes[0][2] if ok else 0
    if not ok or len(model.graph.output) != 1 or (size % CROP and size % 128) or not size:
        raise RecogniserError(
            f"{name} is no ArcFace recogniser: one has one input of 3 x {CROP} x {CROP} and one output, and this has "
            f"inputs {sizes} and {len(model.graph.output)} outputs."
        )
    return size


def _check_memory(model: Any, name: str) -> None:
    """Raise RecogniserError for a graph that makes gigabytes of a few numbers, as a small hostile file can."""
    from onnx import shape_inference

    try:
        inferred = shape_inference.infer_shapes(model, data_prop=True).graph.value_info
    except Exception:  # what cannot be inferred is found out, or not, when it is converted
        return
    for value in inferred:
        numbers = math.prod(max(d.dim_value, 1) for d in value.type.tensor_type.shape.dim)
        if numbers > _MOST_NUMBERS:
            raise RecogniserError(
                f"{name} would make {numbers} numbers of one crop (in {value.name[:40]!a}), which no recogniser does: "
                "it is damaged or hostile, so use the published file."
            )


def _scale(graph: Any) -> tuple[float, float]:
    """Does the graph normalise by itself? (insightface asks its nodes' names, which torch writes otherwise.)"""
    before = set()
    for node in graph.node[:8]:
        if node.op_type == "Conv":
            break
        before.add(node.op_type)
    return (0.0, 1.0) if "Sub" in before and before & {"Mul", "Div"} else BYTES


def _check(network: nn.Module, model: Any, path: Path, size: int) -> bool:
    """Whether the network must be given one crop at a time. Raises RecogniserError where it is not what the file says.

    Two crops are compared, that of one row in a batch of two with the row alone and, where it is there, onnxruntime.
    """
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        single = torch.cat([network(row) for row in x.split(1)])
        try:
            both = network(x)
            one_by_one = both.shape != single.shape or _far(both, single)
        except RuntimeError:  # a reshape to a batch of one
            one_by_one = True
    if single.ndim != 2 or not single.isfinite().all():
        raise RecogniserError(
            f"{path.name} gives {list(single.shape)} instead of a vector a crop: it is no recogniser."
        )
    if importlib.util.find_spec("onnxruntime") is not None:
        import onnxruntime

        try:
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            asked = session.get_inputs()[0].name
            theirs = torch.cat([torch.from_numpy(session.run(None, {asked: row.numpy()})[0]) for row in x.split(1)])
        except Exception as error:  # a class of its own for each of its states
            raise RecogniserError(
                f"onnxruntime refuses {path.name} ({type(error).__name__}), which onnx2torch can read: it is damaged; "
                "download it again."
            ) from error
        if _far(single, theirs):
            raise RecogniserError(
                f"{path.name} gives something else in torch than in onnxruntime: onnx2torch misreads it, so use the "
                "same recogniser in torch (.pth or .safetensors)."
            )
    return one_by_one


def _far(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() > _FURTHEST * b.norm(dim=-1).max())


# The public layouts. Names of modules are those of the files.


def _units(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many residual blocks there are, numbered body.0, body.1, ... or layer1.0, ... layer4.2."""
    return len({".".join(key.split(".")[:2]) for key in tensors if key.startswith(prefix)})


def _ir(tensors: Mapping[str, Tensor]) -> Callable[[list[int]], nn.Module]:
    squeezed = any(".res_layer.5." in key for key in tensors)
    return lambda blocks: IR(blocks, squeezed)


class _Squeeze(nn.Module):
    """Squeeze and excitation: every channel weighed by what all of them hold on average."""

    def __init__(self, width: int, reduction: int = 16):
        super().__init__()
        self.fc1 = nn.Conv2d(width, width // reduction, 1, bias=False)
        self.fc2 = nn.Conv2d(width // reduction, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class _IRUnit(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int, squeezed: bool):
        super().__init__()
        if inner == outer:
            self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        else:
            shortcut = nn.Conv2d(inner, outer, 1, stride, bias=False)
            self.shortcut_layer = nn.Sequential(shortcut, nn.BatchNorm2d(outer))
        layers = [
            nn.BatchNorm2d(inner),
            nn.Conv2d(inner, outer, 3, 1, 1, bias=False),
            nn.PReLU(outer),
            nn.Conv2d(outer, outer, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outer),
        ]
        self.res_layer = nn.Sequential(*layers, *([_Squeeze(outer)] if squeezed else []))

    def forward(self, x: Tensor) -> Tensor:
        return self.res_layer(x) + self.shortcut_layer(x)


class IR(nn.Module):
    """IR-50, IR-100, IR-152 and, squeezed, IR-SE50 in the layout of `model_ir_se50.pth` (InsightFace_Pytorch), which
    face.evoLVe and CurricularFace share: crops [n, 3, 112, 112] of (bytes - 127.5) / 127.5 -> [n, 512]."""

    def __init__(self, blocks: list[int], squeezed: bool, widths: tuple[int, ...] = _WIDTHS):
        super().__init__()
        width = widths[0]
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.PReLU(width)
        )
        units, inner = [], width
        for outer, count in zip(widths, blocks, strict=True):
            units += [_IRUnit(inner if i == 0 else outer, outer, 2 if i == 0 else 1, squeezed) for i in range(count)]
            inner = outer
        self.body = nn.Sequential(*units)
        last = widths[-1]
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(last),
            nn.Dropout(0.0),
            nn.Flatten(),
            nn.Linear(last * (CROP // 16) ** 2, 512),
            nn.BatchNorm1d(512),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.output_layer(self.body(self.input_layer(x)))


class _IResNetUnit(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv1 = nn.Conv2d(inner, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.prelu = nn.PReLU(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outer)
        self.downsample: nn.Module | None = None
        if stride != 1 or inner != outer:
            shortcut = nn.Conv2d(inner, outer, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        y = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.bn3(self.conv2(y)) + (x if self.downsample is None else self.downsample(x))


class IResNet(nn.Module):
    """iresnet18 to iresnet152 in the layout of insightface's own torch files (arcface_torch's `backbone.pth`): crops
    [n, 3, 112, 112] of (bytes - 127.5) / 127.5 -> [n, 512]."""

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, blocks: list[int], widths: tuple[int, ...] = _WIDTHS):
        super().__init__()
        width = widths[0]
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.prelu = nn.PReLU(width)
        inner = width
        for number, (outer, count) in enumerate(zip(widths, blocks, strict=True), 1):
            units = [_IResNetUnit(inner if i == 0 else outer, outer, 2 if i == 0 else 1) for i in range(count)]
            setattr(self, f"layer{number}", nn.Sequential(*units))
            inner = outer
        self.bn2 = nn.BatchNorm2d(inner)
        self.fc = nn.Linear(inner * (CROP // 16) ** 2, 512)
        self.features = nn.BatchNorm1d(512)

    def forward(self, x: Tensor) -> Tensor:
        x = self.prelu(self.bn1(self.conv1(x)))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
        return self.features(self.fc(self.bn2(x).flatten(1)))
