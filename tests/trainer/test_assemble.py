"""Real files of every kind, of the mini world's size: what is assembled from them is what the shipped files give."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from lcm_lookahead.cli import assemble as assembling
from lcm_lookahead.cli import bases
from lcm_lookahead.lookahead.files.tensors import read_tensors, sha256
from lcm_lookahead.lookahead.method.attention import eager_attention, softmax_attention
from lcm_lookahead.lookahead.vision import clip
from lcm_lookahead.mini import drawn_people
from lcm_lookahead.mini.files import checkpoint, derived, insightface_pack
from lcm_lookahead.mini.files.weights import CLIP_VISION
from lcm_lookahead.mini.plan import WEIGHTS
from lcm_lookahead.mini.stages.text import tokenize, tokenizer
from lcm_lookahead.sdxl import configs, cpu_attention, load
from lcm_lookahead.tools.common import Problem
from lcm_lookahead.trainer.config import CONFIGS
from lcm_lookahead.trainer.lookahead import config
from lcm_lookahead.trainer.lookahead.draws import draw
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return drawn_people.write_folder(tmp_path_factory.mktemp("sdxl"))


def public(folder, **values):
    """The configuration of the mini world, with all models named as those of a real SDXL."""
    pack = WEIGHTS / insightface_pack.DETECTOR
    names = {
        "base": folder,
        "start": WEIGHTS / "mini_ip_adapter_plus_face.safetensors",
        "shortcut": WEIGHTS / "mini_lcm_lora.safetensors",
        "vae": folder / "vae",
        "image_encoder": folder / "image_encoder",
        "recogniser": WEIGHTS / insightface_pack.RECOGNISER,
        "detector": pack.parent,
    } | values
    overrides = [f"model.{k}={v}" for k, v in names.items()]
    return config.load(CONFIGS / "mini.yaml", ["precision=fp32", *overrides, "data.people=3", "batch=2"])


def outcomes(c):
    recipe, source = assembling.assemble(c)
    batch = source.batch([4, 11], [0, 1], CPU)
    draws = draw(c, [0, 1], source.latent_shape)
    with torch.no_grad():
        return {part: recipe.losses(part, batch, draws) for part in recipe.parts}, recipe.about


def test_a_diffusers_folder_gives_the_losses_of_the_same_weights(folder):
    shipped, about = outcomes(config.load(CONFIGS / "mini.yaml", ["data.people=3", "batch=2", "precision=fp32"]))
    real, theirs = outcomes(public(folder))
    for part in shipped:
        assert torch.equal(real[part].valid, shipped[part].valid)
        assert torch.allclose(real[part].values, shipped[part].values, atol=2e-4), part
    assert shipped["lookahead"].valid.all()
    assert about["size"] == theirs["size"] == "128" and theirs["recogniser_licence"].startswith("Apache-2.0")


def test_in_16_bit_the_unet_and_a_tiny_autoencoder_are_and_the_losses_stay(folder):
    c = public(folder)
    full, _ = outcomes(c)
    recipe, source = assembling.assemble(c.model_copy(update={"precision": "bf16"}))
    step = recipe.losses
    assert step.unet.dtype == step.shortcut.branches[0].lora_down.weight.dtype == torch.bfloat16
    assert source.models.vae.dtype == torch.bfloat16
    # What decodes previews, what is trained, and, on a CPU, what reads captions and images:
    in_32_bit = step.decode_preview.vae, source.models.text.first, source.models.vision
    assert {m.dtype for m in in_32_bit} == {step.encoder.image_proj.latents.dtype} == {torch.float32}
    batch, draws = source.batch([4, 11], [0, 1], CPU), draw(c, [0, 1], source.latent_shape)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = step("diffusion", batch, draws)
    assert torch.allclose(half.values, full["diffusion"].values, rtol=0.05)


def test_the_text_is_padded_and_cut_as_the_mini_world_was_trained(folder):
    text = load.load_base(folder, torch.float32)[1]
    for caption in ("a photo of a face", "", "a face " * 60):
        ids = tokenize(tokenizer(), [caption])[0]
        for n, t in enumerate(text.tokenizers):
            mine = t(caption, padding="max_length", max_length=77, truncation=True).input_ids
            assert mine == ids[n].tolist(), (n, caption)


def small_text(kind, width, act):
    values = configs.TEXT | {"hidden_size": width, "projection_dim": width, "intermediate_size": 2 * width}
    values |= {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_act": act}
    return values, kind(CLIPTextConfig(**values)).eval()


def test_a_single_checkpoint_is_read_as_the_folder_of_the_same_weights(folder, tmp_path):
    """In the layout of SDXL's release, with text encoders of two widths, by which diffusers tells them apart."""
    torch.manual_seed(0)
    unet = drawn_people.frozen().unet
    first, second = (
        small_text(kind, *rest)
        for kind, *rest in ((CLIPTextModel, 32, "quick_gelu"), (CLIPTextModelWithProjection, 48, "gelu"))
    )
    parts = (unet.state_dict(), first[1].state_dict(), second[1].state_dict(), {})
    tensors = {k: v for k, v in checkpoint.sdxl_checkpoint(*parts).items() if not k.startswith("first_stage")}
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "sdxl.safetensors")
    values = {k: v for k, v in unet.config.items() if not k.startswith("_")}
    written = configs.write_configs(tmp_path / "configs", values, first[0], second[0])

    vae = load.load_vae(folder / "vae")
    read, text, _ = load.read_checkpoint(tmp_path / "sdxl.safetensors", written, torch.float32, vae)
    assert all(torch.equal(v, unet.state_dict()[k]) for k, v in read.state_dict().items())
    expected = load.PromptEncoder(configs.tokenizers(), first[1], second[1])
    for mine, theirs in zip(text("a face"), expected("a face"), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_the_configs_of_a_single_checkpoint_are_sdxl_s(tmp_path):
    configs.write_configs(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["vae"] == ["diffusers", "AutoencoderKL"]
    assert sum(p.numel() for p in configs.unet().parameters()) == 2_567_463_684
    with torch.device("meta"):
        sizes = [
            CLIPTextModel(CLIPTextConfig(**configs.TEXT)),
            CLIPTextModelWithProjection(CLIPTextConfig(**configs.TEXT_2)),
            AutoencoderKL(**configs.VAE),
        ]
    assert [sum(p.numel() for p in m.parameters()) for m in sizes] == [123_060_480, 694_659_840, 83_653_863]


def test_both_kinds_of_autoencoder_read_pictures(folder, tmp_path):
    torch.manual_seed(0)
    AutoencoderKL(**configs.VAE | {"block_out_channels": [8] * 4, "norm_num_groups": 4}).save_pretrained(tmp_path)
    pictures = torch.rand(2, 3, 64, 64)
    tiny, large = (outcome_of(folder, vae, pictures) for vae in (folder / "vae", tmp_path))
    assert tiny.shape == large.shape == (2, 4, 8, 8)
    vae = AutoencoderKL.from_pretrained(tmp_path)
    with torch.no_grad():
        mean = vae.encode(pictures * 2 - 1).latent_dist.mean
    assert torch.allclose(large, mean * 0.13025, atol=1e-6)


def outcome_of(folder, vae, pictures):
    frozen = load.Frozen(*load.load_base(folder, torch.float32, vae), drawn_people.frozen().vision)
    return frozen.latents(pictures)


@pytest.mark.parametrize("names", ["diffusers", "author"])
def test_taesd_is_read_under_either_names(folder, tmp_path, names):
    vae = load.load_vae(folder / "vae")
    tensors = vae.decoder.state_dict()
    if names == "author":
        own = {f"decoder.{k}": v for k, v in tensors.items()}
        tensors = {k.removeprefix("taesd_decoder."): v for k, v in checkpoint.taesd(own).items() if "decoder" in k}
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "taesdxl_decoder.safetensors")
    latents = torch.randn(1, 4, 8, 8)
    preview = load.load_preview(tmp_path / "taesdxl_decoder.safetensors")
    assert torch.equal(preview(latents), vae.decode(latents).sample)


def test_an_image_encoder_is_read_from_its_weights_alone():
    """ComfyUI's files: names with "vision_model.", no config; on the meta device, as they are 1.3 GB."""
    with torch.device("meta"):
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**configs.VIT_H))
    assert sum(p.numel() for p in model.parameters()) == 632_076_800
    shipped = drawn_people.frozen().vision
    with torch.device("meta"):
        empty = CLIPVisionModelWithProjection(shipped.config)
    own = {k if k.startswith("v") else f"vision_model.{k}": v for k, v in shipped.state_dict().items()}
    read = clip.fill(empty, own)
    seen = torch.rand(1, 3, 128, 128)
    assert torch.equal(read(pixel_values=seen).image_embeds, shipped(pixel_values=seen).image_embeds)
    with pytest.raises(ValueError, match="patch_embedding.* has the shape .*, not"):
        clip.fill(empty.to("meta"), {k: v[:1] if "patch" in k else v for k, v in own.items()})
    del own["visual_projection.weight"]
    with pytest.raises(ValueError, match="visual_projection.weight is missing"):
        clip.fill(empty.to("meta"), own)


def test_the_name_of_the_mini_world_and_the_paths_of_its_files_are_one_and_the_same(tmp_path):
    named = config.load(CONFIGS / "mini.yaml", ["data.people=3", "batch=2", "precision=fp32"])
    base = bases.known_base("mini")
    files = bases.resolve(named.model, base)
    spelled = named.model_copy(update={"model": files})
    assert files.base == str(base.folder) and Path(files.start).is_file() and Path(files.detector).is_dir()
    one, about = outcomes(named)
    two, theirs = outcomes(spelled)
    assert all(torch.equal(one[part].values, two[part].values) for part in one)
    assert about["base_model_hash"] == sha256(WEIGHTS / "mini_sdxl.safetensors") != theirs["base_model_hash"]


def test_on_a_cpu_attention_is_written_out_where_it_is_small_and_means_the_same(monkeypatch):
    q, k, v = torch.randn(3, 2, 12, 8).unbind()
    expected = softmax_attention(q, k, v, 2)
    assert torch.allclose(cpu_attention.cpu_attention(q, k, v, 2), expected, atol=1e-6)
    assert torch.equal(cpu_attention.cpu_attention(q, k, v, 2), eager_attention(q, k, v, 2))
    monkeypatch.setattr(cpu_attention, "MOST", 12 * 12 - 1)
    assert torch.equal(cpu_attention.cpu_attention(q, k, v, 2), expected)


def test_a_file_that_is_named_stays_and_other_bases_know_nothing():
    model = config.load(CONFIGS / "mini.yaml").model.model_copy(update={"vae": "mine", "shortcut": "other"})
    files = bases.resolve(model, bases.known_base("mini"))
    assert (files.vae, files.shortcut) == ("mine", "other")
    assert bases.known_base("sdxl") is None and bases.resolve(model, None) == model
    assert bases.known_base(str(WEIGHTS)).checkpoint == WEIGHTS / "mini_sdxl.safetensors"


def test_the_base_of_things_is_made_of_the_shipped_files_and_looks_through_the_eyes_that_know_them(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # where there is no build
    monkeypatch.setattr(derived, "CACHE", tmp_path)
    base, faces = bases.known_base("mini_things"), bases.known_base("mini")
    seen, other = read_tensors(base.beside / CLIP_VISION)[0], read_tensors(faces.beside / CLIP_VISION)[0]
    shipped = read_tensors(WEIGHTS / derived.THINGS_VISION)[0]
    assert seen.keys() == shipped.keys() == other.keys() and all(torch.equal(seen[k], shipped[k]) for k in seen)
    assert not all(torch.equal(seen[k], other[k]) for k in seen)
    drawn, before = read_tensors(base.checkpoint)[0], read_tensors(faces.checkpoint)[0]
    assert drawn.keys() == before.keys() and not all(torch.equal(drawn[k], before[k]) for k in drawn)
    assert {"mug", "umbrella"} < {*base.nouns}


def test_a_base_of_things_without_its_files_is_asked_for_by_its_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(derived, "WEIGHTS", tmp_path)
    with pytest.raises(Problem, match="mini build --only things_lora,things_vision"):
        bases.known_base("mini_things")
    (tmp_path / "things_lora.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="image encoder that knows things.*--only things_vision"):
        derived.write_things_base(tmp_path / "things_lora.safetensors", tmp_path / "to", tmp_path)
    assert not (tmp_path / "to").exists()


def test_the_folder_of_the_mini_world_is_written_once_and_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = drawn_people.model_folder(cache=tmp_path)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]

    def harm(*_):
        raise AssertionError("written again")

    monkeypatch.setattr(drawn_people, "write_folder", harm)
    assert drawn_people.model_folder(cache=tmp_path) == folder

    def full(to, _):
        (to / "unet").mkdir(parents=True)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(drawn_people, "write_folder", full)
    with pytest.raises(load.ModelError, match="cannot be written to .*No space left on device"):
        drawn_people.model_folder(cache=tmp_path / "full")
    assert not list((tmp_path / "full" / "mini").iterdir())
    with pytest.raises(FileNotFoundError, match="There is no .*mini_sdxl.safetensors"):
        drawn_people.model_folder(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("base", "nowhere", r"There is no nowhere, which model.base names: get SDXL .*stable-diffusion-xl-base-1.0"),
        ("start", "none.bin", r"There is no none.bin, which model.start names: .*h94/IP-Adapter"),
        ("detector", "none", r"which model.detector names: get the folder of an unpacked insightface pack"),
        ("vae", "image_encoder", "image_encoder holds None, and AutoencoderKL and AutoencoderTiny are known"),
        ("image_encoder", "unet", "cannot be read as an image encoder"),
        ("base", "vae", "has no folder unet and no text_encoder"),
        ("shortcut", str(WEIGHTS / "mini_ip_adapter_plus_face.safetensors"), "is no LoRA for this base"),
        ("recogniser", str(WEIGHTS / "mini_lcm_lora.safetensors"), "is no face recogniser of a known layout"),
    ],
)
def test_a_wrong_file_is_named_with_where_the_right_one_is(folder, field, value, said):
    value = folder / value if (folder / value).is_dir() else value
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        assembling.assemble(public(folder, **{field: value}))
    assert "\n" not in str(error.value)
