"""A LoRA of the mini world in the host's stock `LoraLoaderModelOnly`: every key finds its layer, none is left over."""

import logging

import pytest
import torch
from safetensors.torch import save_file
from tensors import relative

STRENGTH = 0.7


@pytest.fixture(scope="module", params=["mini", "sdxl"])
def case(request, worlds, tools, pack):
    """A world of the host, diffusers' UNet with its weights, and a random LoRA beside that."""
    world = worlds(request.param)
    lora = pack.module("sdxl.lora")
    with torch.inference_mode():
        unet = tools.diffusers_unet(world)
        made = lora.build(unet, 4, conv_rank=2)
        g = torch.Generator().manual_seed(4)
        for branch in made.branches:
            up, down = branch.lora_up.weight, branch.lora_down.weight
            up.data = torch.randn(up.shape, generator=g) * 0.3 / len(down)
            down.data = torch.randn(down.shape, generator=g) / down[0].numel() ** 0.5
        return world, unet, made, lora.public_tensors(made)


@pytest.fixture
def stock_loader(pack):
    """The node as the host's executor would call it, with the file where it looks for LoRAs."""
    import folder_paths

    def load(model, tensors, strength):
        folder = pack.base / "models" / "loras"
        folder.mkdir(parents=True, exist_ok=True)
        folder_paths.add_model_folder_path("loras", str(folder))
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, folder / "mini_lora.safetensors")
        node = pack.host_nodes.NODE_CLASS_MAPPINGS["LoraLoaderModelOnly"]()
        return node.load_lora_model_only(model, "mini_lora.safetensors", strength)[0]

    return load


@pytest.mark.contract
def test_the_trainer_reads_every_name_that_the_host_reads(case, pack):
    """By the host's own table of names -> weights, for all layers that a LoRA may change."""
    import comfy.lora

    world, unet, *_ = case
    names = pack.module("lookahead.files.lora_file").names_of
    ldm_unet = pack.module("lookahead.files.original_names").ldm_unet
    paths = [p for p, m in unet.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    layers = {path: name for name, path in ldm_unet({f"{path}.weight": path for path in paths}).items()}
    ours = {name: f"diffusion_model.{layers[path]}" for name, path in names(paths).items()}
    hosts = comfy.lora.model_lora_keys_unet(world.model.model, {})
    wanted = {name: key for name, key in hosts.items() if key in ours.values() and not name.endswith(".bias")}
    assert len(set(wanted.values())) == len(paths) and {name: ours.get(name) for name in wanted} == wanted


@pytest.mark.contract
def test_every_key_is_used(case, stock_loader, caplog):
    import comfy.lora

    world, _, made, tensors = case
    with caplog.at_level(logging.WARNING):
        patched = stock_loader(world.model, tensors, STRENGTH)
        assert not [
            r.message for r in caplog.records if "lora key not loaded" in r.message or "NOT LOADED" in r.message
        ]
        assert len(patched.patches) == len(made.paths)
        comfy.lora.load_lora({"lora_unet_nowhere.alpha": torch.ones(())}, {})
    assert "lora_unet_nowhere.alpha" in caplog.text  # the host does say so when a key is left over


def test_the_patched_model_computes_what_our_branches_compute(case, stock_loader, tools):
    world, unet, made, tensors = case
    patched = stock_loader(world.model, tensors, STRENGTH)
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    text = world.text(11, width=128, height=128)
    sigma = float(world.model.get_model_object("model_sampling").sigmas[601])

    def in_host(model):
        return (x * sigma - tools.denoised(model, text, text, x * sigma, sigma)) / sigma

    def in_diffusers():
        added = {"text_embeds": text[0][1]["pooled_output"].expand(2, -1)}
        added["time_ids"] = torch.tensor([[128.0, 128, 0, 0, 128, 128]]).expand(2, -1)
        context = text[0][0].expand(2, -1, -1)
        scaled = x * sigma / (sigma**2 + 1) ** 0.5
        return unet(scaled, 601, encoder_hidden_states=context, added_cond_kwargs=added).sample

    plain = in_diffusers()
    made.attach(unet)
    with made.at(STRENGTH):
        ours = in_diffusers()
    made.detach()
    assert relative(ours, plain) > 0.05  # the LoRA does something here
    assert relative(in_host(patched), ours) < 1e-4
    assert relative(in_host(world.model), plain) < 1e-4  # and the model that was given stays as it was


def test_the_benchmark_s_random_lora_lies_on_layers_that_are_there(pack, worlds):
    """The host names layers too that SDXL has not (`make bench ARGS="--full-size 256"` ended there)."""
    bench = pack.module("tools.bench_in_host")
    model = worlds("sdxl").model
    patched = bench._with_random_lora(model, rank=2)
    weights = model.model.state_dict()
    assert len(patched.patches) > 100 and patched.patches.keys() <= weights.keys()
