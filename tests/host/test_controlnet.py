"""The mini ControlNet in the host's stock nodes against diffusers: same weights, latents, text and edges."""

import asyncio
import logging
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file
from tensors import relative

ROOT = Path(__file__).resolve().parents[2]
SIGMA_STEP = 601


@pytest.fixture(scope="module")
def net(pack):
    """A ControlNet in which nothing is zero."""
    controlnet = pack.module("mini.stages.controlnet").build()
    g = torch.Generator().manual_seed(8)
    for name, value in controlnet.state_dict().items():
        fan = value[0].numel() if value.ndim > 1 else 1
        noise = torch.randn(value.shape, generator=g) * (fan**-0.5 if fan > 1 else 0.1)
        value.copy_(1 + noise if value.ndim == 1 and name.endswith("weight") else noise)
    return controlnet.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def stock(pack):
    """The host's own nodes, taught the mini sizes, with a folder in which ControlNetLoader looks."""
    import folder_paths

    extension = ROOT / "mini" / "host_extension"
    assert asyncio.run(pack.host_nodes.load_custom_node(str(extension), module_parent="custom_nodes"))
    folder = pack.base / "models" / "controlnet"
    folder.mkdir(parents=True, exist_ok=True)
    folder_paths.add_model_folder_path("controlnet", str(folder))

    def load(tensors):
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "mini.safetensors")
        return pack.host_nodes.NODE_CLASS_MAPPINGS["ControlNetLoader"]().load_controlnet("mini.safetensors")[0]

    def apply(text, control, image, strength):
        node = pack.host_nodes.NODE_CLASS_MAPPINGS["ControlNetApplyAdvanced"]()
        return node.apply_controlnet(text, text, control, image, strength, 0.0, 1.0)[0]

    return load, apply


@pytest.mark.contract
def test_the_stock_loader_finds_every_weight(net, stock, pack, caplog):
    tensors = pack.module("mini.files.checkpoint").cldm_controlnet(net.state_dict())
    with caplog.at_level(logging.DEBUG):
        control = stock[0](tensors)
    assert type(control).__name__ == "ControlNet"
    loaded = {f"control_model.{k}": v for k, v in control.control_model.state_dict().items()}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[k], tensors[k]) for k in tensors)
    assert not [r.message for r in caplog.records if "controlnet keys" in r.message or "no match" in r.message]


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_the_host_computes_what_diffusers_computes(mini, net, stock, tools, pack, strength):
    load, apply = stock
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    text = mini.text(11, width=128, height=128)
    sigma = float(mini.model.get_model_object("model_sampling").sigmas[SIGMA_STEP])
    hint = (tools.picture(5, height=128, width=128) > 0.5).float()
    control = load(pack.module("mini.files.checkpoint").cldm_controlnet(net.state_dict()))
    unet = tools.diffusers_unet(mini)

    def in_host(positive):
        return (x * sigma - tools.denoised(mini.model, positive, positive, x * sigma, sigma)) / sigma

    def in_diffusers(net):
        pooled, sizes = text[0][1]["pooled_output"], torch.tensor([[128.0, 128, 0, 0, 128, 128]])
        read = pack.module("sdxl.shared_unet").Condition(
            text[0][0].expand(2, -1, -1), pooled.expand(2, -1), sizes.expand(2, -1)
        )
        predict = pack.module("mini.stages.controlnet").predict
        scaled, edges = x * sigma / (sigma**2 + 1) ** 0.5, hint.movedim(-1, 1).expand(2, -1, -1, -1)
        return predict(unet, net, scaled, torch.tensor(SIGMA_STEP), read, edges, strength)

    ours = in_host(apply(text, control, hint, strength))
    print("relative rms difference", relative(ours, in_diffusers(net)))
    assert relative(ours, in_diffusers(net)) < 1e-4
    assert relative(ours, in_diffusers(None)) > 1e-2  # the edges do something here


@pytest.mark.contract
def test_our_edges_are_those_of_the_host_s_canny_node(pack):
    import comfy_extras.nodes_canny

    module = pack.module("mini.world.edges")
    faces = pack.module("mini.world.references").reference_faces(4)
    noise = torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(1))
    for picture in (faces, noise):
        for low, high in ((module.LOW, module.HIGH), (0.1, 0.3)):
            theirs = comfy_extras.nodes_canny.Canny.execute(picture.movedim(1, -1), low, high)
            theirs = numpy.asarray(theirs.result[0].movedim(-1, 1))
            ours = numpy.asarray(module.edges(picture, low, high))
            assert ours.shape == theirs.shape and set(numpy.unique(ours)) == {0, 1}
            assert (ours != theirs).mean() < 0.005, (low, high)
