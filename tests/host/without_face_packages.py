"""What `test_without_face_packages.py` runs in a process of its own, in which the packages cannot be imported."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def test_the_packages_are_not_to_be_had_and_all_nodes_are_there(pack):
    for name in ("insightface", "onnxruntime"):
        with pytest.raises(ImportError):
            __import__(name)
        assert name not in sys.modules
    pages = {path.stem for path in (ROOT / "web/docs").glob("Lookahead*.md")}
    assert pages and pack.nodes.keys() == pages


@pytest.mark.parametrize("node", ["LookaheadLoadFaceAnalysis"])
def test_a_face_node_says_in_one_sentence_what_to_install(pack, node):
    shutil.copytree(ROOT / "mini/weights/insightface/models/mini", pack.base / "models/insightface/models/mini")
    assert pack.nodes[node].define_schema().inputs[0].options == ["mini"]
    assert pack.nodes[node].validate_inputs("mini") is True
    with pytest.raises(ImportError) as error:
        pack.nodes[node].execute("mini")
    text = str(error.value)
    assert "pip install insightface onnxruntime" in text and "ComfyUI's Python has no insightface" in text
    assert "\n" not in text and text.endswith(".")


def test_the_image_prompt_draws(mini, tools):
    reference = tools.reference(mini, tools.picture(1))
    latent = torch.zeros(1, 4, 8, 8)
    drawn = [
        tools.sample(model, mini.text(1), mini.text(2), latent, steps=1)
        for model in (mini.model, tools.apply(mini.model, reference))
    ]
    assert drawn[1].isfinite().all() and not torch.equal(*drawn)
