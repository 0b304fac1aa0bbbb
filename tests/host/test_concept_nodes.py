"""The nodes of concepts in a running ComfyUI on the mini checkpoint: predict, tune, save, draw, and stop on the way."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from concept_files import random_concept_encoder
from lcm_lookahead.cli import assemble_concept
from lcm_lookahead.lookahead.files.concept_file import read_concept, read_concept_encoder
from lcm_lookahead.lookahead.method.concept_tuning import Tuning
from lcm_lookahead.mini.files.host_models import mini_host
from lcm_lookahead.mini.world.references import reference_faces
from lcm_lookahead.sdxl.concept_maker import predict_concept, tuner
from lcm_lookahead.trainer.concept.config import ConceptModels
from PIL import Image

BLEND, STEPS = 0.4, 2


@pytest.fixture(scope="module")
def frozen():
    with torch.inference_mode(False):
        return assemble_concept.frozen_models(ConceptModels(base="mini"), "fp32")


@pytest.fixture(scope="module")
def encoder_file(frozen, tmp_path_factory):
    return random_concept_encoder(frozen, tmp_path_factory.mktemp("encoder"), BLEND)


@pytest.fixture(scope="module")
def server(encoder_file):
    def prepare(base):
        (base / "models" / "lookahead").mkdir(parents=True, exist_ok=True)
        (base / "models" / "lookahead" / encoder_file.name).write_bytes(encoder_file.read_bytes())

    directory = os.environ.get("COMFYUI_DIR")
    with mini_host(announce=False, directory=directory and Path(directory), prepare=prepare) as host:
        pixels = (reference_faces(1)[0].movedim(0, -1) * 255).round().byte().numpy()
        Image.fromarray(pixels).save(host.folder("input") / "thing.png")
        Image.new("RGB", (1, 1)).save(host.folder("input") / "dot.png")
        yield host


def graph(picture="thing.png", text="a comic of a S*", apply=None, tune=STEPS, encode=None, vae=True, flow=False):
    """From a picture to a drawing, with the concept saved and loaded on the way."""
    kinds = {
        "base": ("CheckpointLoaderSimple", {"ckpt_name": "sd_xl_base_1.0.safetensors"}),
        "vision": ("CLIPVisionLoader", {"clip_name": "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"}),
        "picture": ("LoadImage", {"image": picture}),
        "encoder": ("LookaheadLoadConceptEncoder", {"encoder_name": "random_concept_encoder.safetensors"}),
    }
    models = {"model": ["base", 0], "clip": ["base", 1]}
    read = {"concept_encoder": ["encoder", 0], "clip_vision": ["vision", 0], "image": ["picture", 0]}
    read |= {"vae": ["base", 2]} if vae else {}
    if flow:
        kinds["flow"] = ("ModelSamplingSD3", {"model": ["base", 0], "shift": 3.0})
        models["model"] = ["flow", 0]
    kinds["predicted"] = ("LookaheadPredictConcept", {**models, **read})
    rates = {"steps": tune, "batch": 2, "offset_rate": 0.003, "word_rate": 0.05, "blend": -1.0, "seed": 5, "words": 3}
    given = {"concept": ["predicted", 0], "vae": ["base", 2], "image": ["picture", 0]}
    kinds["tuned"] = ("LookaheadTuneConcept", {**models, **given, **rates})
    stock = {"name": "mine", "also_as_lora_and_embedding": True}
    kinds["saved"] = ("LookaheadSaveConcept", {"concept": ["tuned", 0], **stock})
    prompt = {"clip": ["base", 1], "concept": ["tuned", 0], "text": text, "pooled": "blended", **(encode or {})}
    kinds["positive"] = ("LookaheadEncodeConceptPrompt", prompt)
    kinds["negative"] = ("CLIPTextEncode", {"clip": ["base", 1], "text": ""})
    where = {"strength": 1.0, "blend": -1.0, "start": 0.0, "end": 1.0, "rows": "all", "blocks": "all", **(apply or {})}
    kinds["applied"] = ("LookaheadApplyConcept", {"model": ["base", 0], "concept": ["tuned", 0], **where})
    kinds["latent"] = ("EmptyLatentImage", {"width": 128, "height": 128, "batch_size": 1})
    run = {"seed": 3, "steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    ends = {"positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["latent", 0]}
    kinds["run"] = ("KSampler", {"model": ["applied", 0], **ends, **run})
    kinds["decoded"] = ("VAEDecode", {"samples": ["run", 0], "vae": ["base", 2]})
    kinds["drawn"] = ("SaveImage", {"images": ["decoded", 0], "filename_prefix": "concept"})
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in kinds.items()}


def drawn(host, result):
    file = result.outputs["drawn"]["images"][0]
    return np.asarray(Image.open(host.folder("output") / file["subfolder"] / file["filename"]))


def texts(result, node):
    return "".join(result.outputs[node]["text"])


@pytest.fixture(scope="module")
def made(server):
    """The graph has run."""
    return server.run(graph()).check()


@pytest.mark.contract
def test_the_nodes_lead_from_a_picture_to_a_drawing_and_to_files_that_stock_nodes_offer(server, made):
    folder = server.base / "models"
    assert (folder / "lookahead_concepts" / "mine.safetensors").is_file()
    assert (folder / "loras" / "mine_lora.safetensors").is_file()
    assert (folder / "embeddings" / "mine_embedding.safetensors").is_file()
    assert texts(made, "predicted").split()[0] in ("face", "mug", "car", "boat")
    assert texts(made, "positive").startswith("a comic of a ") and "S*" not in texts(made, "positive")
    assert drawn(server, made).shape == (128, 128, 3)


@pytest.mark.contract
def test_tuning_in_the_host_is_that_of_the_pipeline(server, made, frozen, encoder_file):
    """The same picture, seed and steps: the losses agree, and the tuned numbers as far as Adam's first steps, whose
    size does not depend on the gradient's, let them."""
    picture = reference_faces(1)[0].mul(255).round().div(255)
    found = read_concept(server.base / "models" / "lookahead_concepts" / "mine.safetensors")
    with torch.inference_mode(False):
        network, words, _ = read_concept_encoder(encoder_file)
        before = predict_concept(network, words, frozen, picture, 128, BLEND)
        with tuner(frozen) as maker:
            expected, losses = maker.tune(before, picture, Tuning(STEPS, 2, 0.003, 0.05, BLEND, seed=5, words=3))
    assert torch.allclose(found.word_l, expected.word_l, atol=0.02)
    shown = [float(line.split(": ")[1]) for line in texts(made, "tuned").splitlines()]
    assert shown == pytest.approx(losses, rel=0.01)
    assert found.word == expected.word and found.about["steps"] == str(STEPS)
    for name, (_, b) in expected.offsets.items():
        moved, theirs = b - before.offsets[name][1], found.offsets[name][1] - before.offsets[name][1]
        cosine = torch.nn.functional.cosine_similarity(moved.flatten(), theirs.flatten(), dim=0)
        assert float(cosine) > 0.9, name


def test_strength_0_draws_what_the_model_draws_without_the_node(server, made):
    without = graph(apply={"strength": 0.0})
    bypassed = dict(without)
    bypassed["run"] = {"class_type": "KSampler", "inputs": {**without["run"]["inputs"], "model": ["base", 0]}}
    off, none = (drawn(server, server.run(each).check()) for each in (without, bypassed))
    assert np.array_equal(off, none) and not np.array_equal(off, drawn(server, made))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"picture": "dot.png"}, "1 x 1 pixels"),
        ({"text": "a comic of a mug"}, "has no S*"),
        ({"text": "a S* beside a S*"}, "has 2 S*"),
        ({"vae": False}, "connect vae"),
        ({"flow": True}, "switched to flow matching, and random_concept_encoder.safetensors knows"),
    ],
)
def test_bad_input_is_one_sentence_and_the_next_run_draws_as_before(server, made, change, said):
    result = server.run(graph(**change))
    assert result.error and said in str(result.error)
    assert np.array_equal(drawn(server, server.run(graph()).check()), drawn(server, made))
