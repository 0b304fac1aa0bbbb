"""The small image-text model: its folder loads through transformers, and its training knows which captions fit."""

import pytest
import torch
from lcm_lookahead.mini.files.shipped import table
from lcm_lookahead.mini.stages import clip, stage
from lcm_lookahead.mini.stages.text import tokenizer
from lcm_lookahead.mini.world import data
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return clip.build().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return data.pictures(tmp_path_factory.mktemp("people"), "train", 40, ("photo", "comic"), 32)


def test_the_shipped_folder_loads_through_transformers_and_gives_the_same(model, tmp_path):
    shipped = tmp_path / "weights" / clip.FOLDER
    stage.write_tensors(shipped / "model.safetensors", stage.half(model.state_dict()), {"format": "pt"})
    clip.write_configuration(model, shipped)
    folder = clip.make_folder(tmp_path / "folder", tmp_path / "weights")
    read = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    processor, tokens = CLIPImageProcessor.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    picture = torch.randint(0, 256, (3, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    pixels = processor(Image.fromarray(picture.permute(1, 2, 0).numpy()), return_tensors="pt").pixel_values
    texts = ["a comic of a face in the snow", "a photo"]
    said = read(**tokens(texts, padding=True, return_tensors="pt"), pixel_values=pixels)
    assert torch.allclose(said.image_embeds, clip.embed_pictures(model, picture[None] / 255), atol=2e-3)
    assert torch.allclose(said.text_embeds, clip.embed_texts(model, texts), atol=2e-3)


def test_it_is_as_small_as_planned(model):
    planned = {line.file: line for line in table()}[f"{clip.FOLDER}/model.safetensors"]
    assert sum(p.numel() for p in model.parameters()) <= planned.parameters


def test_cutting_the_padding_changes_nothing(model):
    ids = clip.token_ids(tokenizer(), ["a photo of a face on a beach", "smiling"]).long()
    cut = clip.shorten(ids)
    assert cut.shape[1] < ids.shape[1]
    assert torch.allclose(model.text_model(cut).pooler_output, model.text_model(ids).pooler_output, atol=1e-5)


def test_captions_fit_their_own_picture_and_others_that_look_as_they_say(people):
    captions = clip.Captions(people, torch.Generator().manual_seed(2))
    index = torch.arange(len(people))
    _, match = captions.draw(index, torch.Generator().manual_seed(3))
    assert match.diagonal().all()
    assert 0.01 < match.float().mean() < 0.9
    short = captions.said[1]
    fits = ((short[:, None] == captions.truth[None]) | (short[:, None] < 0)).all(-1)
    same = torch.tensor([[a == b for b in people.short] for a in people.short])
    assert torch.equal(fits, same)


def test_an_incomplete_caption_says_only_what_it_keeps():
    looks = dict(style=3, place=5, skin=0, hair=0, hair_colour=4, glasses=2, moustache=1, beard=0, smile=1)
    keep = [name in ("style", "hair_colour", "beard", "moustache") for name in clip.SAID]
    text, said = clip.incomplete_caption(looks, keep)
    assert text == "a comic, a moustache" and said == ["style", "moustache"]  # no hair to have a colour, no beard
    text, said = clip.incomplete_caption(looks, [False] * len(clip.SAID))
    assert text == "a comic" and said == ["style"]
