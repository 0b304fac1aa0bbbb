"""Recognisers: public layouts of weights, and ArcFace ONNX in torch against onnxruntime."""

import sys

import pytest
import torch
from lcm_lookahead.lookahead.vision import arcface
from lcm_lookahead.lookahead.vision.arcface import IR, IResNet, RecogniserError, from_onnx, from_weights, read
from lcm_lookahead.mini.files import weights
from lcm_lookahead.mini.plan import WEIGHTS
from torch import nn
from torch.nn import functional as F

MINI = WEIGHTS / "insightface/models/mini/rec_mini.onnx"
FIFTY, HUNDRED = [3, 4, 14, 3], [3, 13, 30, 3]


def seeded(network: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights and norms, so that no two tensors are equal and no place may be exchanged."""
    g = torch.Generator().manual_seed(seed)
    for key, value in network.state_dict().items():
        if not value.is_floating_point():
            continue
        fan = value[0].numel() if value.ndim > 1 else 1
        random = torch.randn(value.shape, generator=g) * (fan**-0.5 if fan > 1 else 0.1)
        is_scale = value.ndim == 1 and key.endswith(("weight", "running_var"))
        value.copy_(1 + random.abs() if is_scale else random)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def iresnet():
    """The smallest network of insightface's own layout."""
    return seeded(IResNet([2, 2, 2, 2]))


def crops(n: int = 2, seed: int = 1) -> torch.Tensor:
    small = torch.rand(n, 3, 14, 14, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(small, (112, 112), mode="bilinear")


def plain_ir(w: dict, x: torch.Tensor, blocks: list[int], squeezed: bool) -> torch.Tensor:
    """The network of model_ir_se50.pth, written out once more from its description."""

    def norm(x, key):
        return F.batch_norm(x, *(w[f"{key}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")))

    x = F.prelu(norm(F.conv2d(x, w["input_layer.0.weight"], padding=1), "input_layer.1"), w["input_layer.2.weight"])
    number = 0
    for count in blocks:
        for i in range(count):
            key, stride = f"body.{number}", 2 if i == 0 else 1
            if f"{key}.shortcut_layer.0.weight" in w:
                shortcut = F.conv2d(x, w[f"{key}.shortcut_layer.0.weight"], stride=stride)
                shortcut = norm(shortcut, f"{key}.shortcut_layer.1")
            else:
                shortcut = x[:, :, ::stride, ::stride]
            y = F.conv2d(norm(x, f"{key}.res_layer.0"), w[f"{key}.res_layer.1.weight"], padding=1)
            y = F.prelu(y, w[f"{key}.res_layer.2.weight"])
            y = norm(F.conv2d(y, w[f"{key}.res_layer.3.weight"], stride=stride, padding=1), f"{key}.res_layer.4")
            if squeezed:
                s = F.conv2d(y.mean((2, 3), keepdim=True), w[f"{key}.res_layer.5.fc1.weight"]).relu()
                y = y * F.conv2d(s, w[f"{key}.res_layer.5.fc2.weight"]).sigmoid()
            x, number = y + shortcut, number + 1
    x = norm(x, "output_layer.0").flatten(1)
    x = F.linear(x, w["output_layer.3.weight"], w["output_layer.3.bias"])
    return F.normalize(norm(x, "output_layer.4"), dim=-1)


def test_ir_se50_of_the_public_layout_computes_what_its_description_says():
    w = seeded(IR(FIFTY, squeezed=True)).state_dict()
    assert "body.23.res_layer.5.fc2.weight" in w and w["output_layer.3.weight"].shape == (512, 512 * 49)
    recogniser = from_weights(w, "model_ir_se50.pth")
    found = recogniser(crops())
    assert torch.allclose(found, plain_ir(w, crops() * 2 - 1, FIFTY, True), atol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=0.01)


def test_the_layout_is_found_from_the_weights_and_nothing_else(iresnet):
    plain, x = seeded(IR([2, 2, 2, 2], squeezed=False)).state_dict(), crops()
    assert torch.allclose(from_weights(plain, "x")(x), plain_ir(plain, x * 2 - 1, [2, 2, 2, 2], False), atol=1e-5)
    values = iresnet.state_dict().items()
    wrapped = {f"module.{key}": value.half() if value.is_floating_point() else value for key, value in values}
    found = from_weights(wrapped, "backbone.pth")(crops())
    assert torch.cosine_similarity(found, iresnet(crops() * 2 - 1)).min() > 0.999
    del wrapped["module.bn1.num_batches_tracked"]  # older files have none
    from_weights(wrapped, "backbone.pth")


def test_ir_100_is_known_by_its_blocks():
    with torch.device("meta"):
        for network in (IR(HUNDRED, squeezed=False), IResNet(HUNDRED)):
            assert sum(p.numel() for p in network.parameters()) == pytest.approx(65.1e6, rel=0.01)
        assert sum(p.numel() for p in IR(FIFTY, squeezed=True).parameters()) == pytest.approx(43.8e6, rel=0.01)


def test_a_pth_file_is_read_without_running_what_is_in_it(tmp_path, iresnet):
    torch.save({"state_dict": iresnet.state_dict(), "epoch": 3}, tmp_path / "backbone.pth")
    assert torch.cosine_similarity(read(tmp_path / "backbone.pth")(crops()), iresnet(crops() * 2 - 1)).min() > 0.9999
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pth")  # a pickled module is code
    with pytest.raises(RecogniserError, match="nothing in it was executed"):
        read(tmp_path / "whole.pth")


def spoiled(how: str) -> dict:
    with torch.device("meta"):
        w = IResNet([2, 2, 2, 2]).state_dict()
    if how == "missing":
        del w["layer3.1.prelu.weight"]
    elif how == "surplus":
        w["head.weight"] = torch.zeros(3)
    elif how == "larger crop":
        w["fc.weight"] = torch.zeros(512, 512 * 64)
    elif how == "depth":
        w = {key: value for key, value in w.items() if not key.startswith("layer2.1")}
    elif how == "other":
        w = {"conv.weight": torch.zeros(3)}
    return w


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", "lacks layer3.1.prelu.weight"),
        ("surplus", "unknown weight head.weight"),
        ("larger crop", "another shape of fc.weight"),
        ("depth", "7 residual blocks"),
        ("other", "no face recogniser of a known layout"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_sentence(how, words):
    with pytest.raises(RecogniserError, match=words) as error:
        from_weights(spoiled(how), "backbone.pth")
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def session(path):
    onnxruntime = pytest.importorskip("onnxruntime")
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def export(network: nn.Module, path, x: torch.Tensor, opset: int = 17, dynamic: bool = True):
    axes = {"input.1": {0: "n"}, "embedding": {0: "n"}} if dynamic else None
    with pytest.warns(DeprecationWarning):
        torch.onnx.export(
            network.eval(),
            (x,),
            str(path),
            input_names=["input.1"],
            output_names=["embedding"],
            dynamic_axes=axes,
            dynamo=False,
            opset_version=opset,
        )
    return path


def test_the_mini_recogniser_in_torch_gives_what_onnxruntime_gives():
    recogniser = read(MINI)
    x = crops(5)
    theirs = torch.from_numpy(session(MINI).run(None, {"input.1": (x * 2 - 1).numpy()})[0])
    assert (recogniser(x) - F.normalize(theirs, dim=-1)).abs().max() < 1e-4
    own = weights.face_recogniser()
    assert (recogniser(x) - F.normalize(own(x * 2 - 1), dim=-1)).abs().max() < 1e-3  # stored in 16 bit


def test_a_recogniser_of_insightface_s_layout_exported_to_onnx_is_read(tmp_path):
    """iresnet is what w600k_r50, glintr100 and AuraFace are: the same operations, fewer and narrower blocks."""
    network = seeded(IResNet([2, 2, 2, 2], widths=(8, 16, 24, 32)))
    path = export(network, tmp_path / "w600k.onnx", crops(1))
    assert torch.allclose(read(path)(crops()), F.normalize(network(crops() * 2 - 1), dim=-1), atol=1e-5)


def test_the_gradient_is_that_of_finite_differences():
    recogniser = read(MINI).double()
    x, g = crops(1).double().requires_grad_(), torch.Generator().manual_seed(5)
    towards = F.normalize(torch.randn(1, 128, generator=g, dtype=torch.float64), dim=-1)
    (1 - (recogniser(x) * towards).sum()).backward()
    assert not any(p.requires_grad for p in recogniser.parameters())
    for _ in range(4):
        step = torch.randn(x.shape, generator=g, dtype=torch.float64)
        with torch.no_grad():
            up, down = ((recogniser(x + sign * 1e-8 * step) * towards).sum() for sign in (1, -1))
        assert -(up - down).item() / 2e-8 == pytest.approx((x.grad * step).sum().item(), rel=1e-5)


class Normalising(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network((x - 127.5) * (1 / 127.5))


class OneRow(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 7, 7)

    def forward(self, x):
        return self.conv(x).reshape(1, -1)[:, :128]


def test_a_graph_that_normalises_by_itself_is_given_bytes(tmp_path):
    network = weights.face_recogniser()
    path = export(Normalising(network), tmp_path / "mxnet.onnx", crops(1) * 255)
    recogniser = read(path)
    assert (recogniser.mean, recogniser.deviation) == (0.0, 1.0)
    assert torch.allclose(recogniser(crops()), F.normalize(network(crops() * 2 - 1), dim=-1), atol=1e-5)
    assert read(MINI).mean == 127.5
    assert read(MINI, scale=(0.0, 255.0)).deviation == 255.0  # what a manifest states goes first


def test_a_graph_made_for_one_crop_is_run_one_by_one(tmp_path):
    torch.manual_seed(0)
    network = OneRow().requires_grad_(False)
    recogniser = read(export(network, tmp_path / "one.onnx", crops(1), dynamic=False))
    x = crops(3)
    expected = torch.cat([F.normalize(network(row * 2 - 1), dim=-1) for row in x.split(1)])
    assert torch.allclose(recogniser(x), expected, atol=1e-5)


def test_an_operation_that_onnx2torch_does_not_know_is_named(tmp_path):
    import onnx

    model = onnx.load(MINI)
    next(node for node in model.graph.node if node.op_type == "PRelu").op_type = "ThresholdedRelu"
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(RecogniserError, match="odd.onnx uses an operation .*ThresholdedRelu.*dynamo=False"):
        read(tmp_path / "odd.onnx")


def test_a_small_file_that_asks_for_gigabytes_is_refused_before_it_runs(tmp_path):
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(MINI)
    asked = numpy_helper.from_array(torch.tensor([1 << 40]).numpy())
    last = model.graph.node[-1]
    end, last.output[0] = last.output[0], "before"
    for node in (
        helper.make_node("Add", ["before", "small"], [end]),
        helper.make_node("ReduceSum", ["large"], ["small"], keepdims=0),
        helper.make_node("ConstantOfShape", ["shape"], ["large"]),
        helper.make_node("Constant", [], ["shape"], value=asked),
    ):
        model.graph.node.insert(len(model.graph.node) if node.op_type == "Add" else 0, node)
    onnx.save(model, tmp_path / "rec.onnx")
    with pytest.raises(RecogniserError, match="would make 1099511627776 numbers") as error:
        from_onnx(tmp_path / "rec.onnx")
    assert "\n" not in str(error.value)


def test_a_network_that_differs_from_onnxruntime_is_refused(monkeypatch):
    import onnx2torch

    convert = onnx2torch.convert

    def wrong(model):
        network = convert(model)
        for p in network.parameters():
            p.data.mul_(1.1)
        return network

    monkeypatch.setattr(onnx2torch, "convert", wrong)
    with pytest.raises(RecogniserError, match="something else in torch than in onnxruntime"):
        from_onnx(MINI)


def test_a_file_that_is_no_recogniser_is_refused(tmp_path):
    with pytest.raises(RecogniserError, match="no ArcFace recogniser.*9 outputs"):
        read(MINI.with_name("det_mini.onnx"))
    (tmp_path / "cut.onnx").write_bytes(MINI.read_bytes()[:1000])
    with pytest.raises(RecogniserError, match="cut.onnx cannot be read as ONNX"):
        read(tmp_path / "cut.onnx")


def test_without_onnx2torch_it_is_said_what_to_install(monkeypatch):
    arcface.import_onnx2torch()
    find_spec = arcface.importlib.util.find_spec
    monkeypatch.setattr(arcface.importlib.util, "find_spec", lambda n: None if n == "onnx2torch" else find_spec(n))
    with pytest.raises(
        ImportError, match="no onnx2torch: run .pip install onnx., then .pip install --no-deps onnx2torch"
    ):
        read(MINI)
    monkeypatch.undo()
    for name in [name for name in sys.modules if name.split(".")[0] == "onnx2torch"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)  # its import fails, as where it does not fit torch
    with pytest.raises(ImportError, match="cannot be imported"):
        read(MINI)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    """They would leave a loss that no picture counts for, without a word."""
    torch.save({"input_layer.0.weight": torch.full((2, 2), float("nan"))}, tmp_path / "mine.pth")
    with pytest.raises(
        arcface.RecogniserError, match="mine.pth: input_layer.0.weight holds values that are not finite"
    ):
        arcface.read(tmp_path / "mine.pth")
