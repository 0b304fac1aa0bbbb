"""The layout of the paper's published data is read as a folder of people."""

import json

import pytest
import torch
from lcm_lookahead.trainer.data.pairs import DataError, Entry, listing
from lcm_lookahead.trainer.data.published import caption
from PIL import Image


def test_people_captions_and_references_are_read_from_names(tmp_path):
    person = "old man with curly hair"
    files = {
        f"{person}/vanilla/A_photo_of_conceptname_482.png": person,
        f"{person}/stylized/A_pencil_drawing_of_conceptname_90210.png": person,
    }
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        pixels = (torch.rand(40, 40, 3) * 255).byte().numpy()
        Image.fromarray(pixels).save(tmp_path / file)
    (tmp_path / "metadata.json").write_text(json.dumps(files))
    entries, gone = listing(tmp_path)
    drawing, photo = entries
    assert not gone and photo == Entry(next(iter(files)), person, "A photo of a face", True)
    assert (drawing.person, drawing.text, drawing.reference) == (person, "A pencil drawing of a face", False)


@pytest.mark.parametrize(
    ("stem", "said"),
    [
        ("A_photo_of_an_Old_Man_in_a_forest_12", "A photo of a face in a forest"),
        ("an_oil_painting_of_conceptname", "an oil painting of a face"),
        ("a_photo_of_an_old_mandarin_7", "a photo of an old mandarin"),
        ("123", None),
    ],
)
def test_a_caption_is_the_name_without_seed_and_person(stem, said):
    assert caption(stem, "old man") == said


@pytest.mark.parametrize("content", ["[1]", '{"a.png": {"x": 1}}', "{"])
def test_another_json_is_refused_in_a_sentence(tmp_path, content):
    (tmp_path / "metadata.json").write_text(content)
    with pytest.raises(DataError, match="metadata.json is no table .*: write an object from each file to its person"):
        listing(tmp_path)
