"""What the host does with our nodes before it runs one: it registers and lists them, and validates what it is sent."""

import asyncio
import inspect
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.contract
LOADERS = {
    "LookaheadLoadEncoder": "encoder_name",
    "LookaheadConvertEncoder": "source_name",
    "LookaheadLoadFaceAnalysis": "pack_name",
    "LookaheadCLIPLoss": "clip_name",
    "LookaheadLoadReference": "reference_name",
    "LookaheadLoadConcept": "concept_name",
    "LookaheadPromptScore": "clip_name",
    "LookaheadLoadNoiseGuide": "guide_name",
}


@contextmanager
def closed(folder: Path):
    """The folder as one that was made by another user, who may read it alone."""
    if os.geteuid():
        folder.chmod(0)
    else:
        os.seteuid(65534)
    try:
        yield
    finally:
        if os.geteuid() != 65534:
            folder.chmod(0o700)
        else:
            os.seteuid(0)


def register(pack, monkeypatch):
    """Have the host load the pack once more; returns its answer and the nodes that it registered."""
    registered = {}
    monkeypatch.setattr(pack.host_nodes, "NODE_CLASS_MAPPINGS", registered)
    loaded = asyncio.run(pack.host_nodes.load_custom_node(str(ROOT), module_parent="custom_nodes"))
    return loaded, sorted(registered)


def test_folders_that_may_not_be_read_leave_the_pack_whole(pack, monkeypatch, caplog):
    """As in a container, where root has unpacked the face models: the lists are empty, and errors name the folder."""
    for folder in ("insightface/models/antelopev2", "lookahead"):
        (pack.base / "models" / folder).mkdir(parents=True, exist_ok=True)
    (pack.base / "models" / "insightface" / "models" / "antelopev2" / "a.onnx").touch()
    with closed(pack.base / "models" / "insightface"):
        loaded, registered = register(pack, monkeypatch)
        assert loaded and registered == sorted(pack.nodes)
        text = pack.nodes["LookaheadLoadFaceAnalysis"].validate_inputs("antelopev2")
    assert "ComfyUI may not read" in text and text.endswith(".")
    assert "antelopev2" in pack.nodes["LookaheadLoadFaceAnalysis"].define_schema().inputs[0].options
    shutil.rmtree(pack.base / "models" / "insightface")


def test_a_folder_that_was_removed_since_it_was_listed_is_empty(pack):
    folder = pack.base / "models" / "lookahead"
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    (folder / "sub" / "mine.safetensors").touch()
    node = pack.nodes["LookaheadConvertEncoder"]
    assert "sub/mine.safetensors" in node.define_schema().inputs[0].options
    shutil.rmtree(folder)
    assert node.define_schema().inputs[0].options == []
    assert "There is no encoder file" in node.validate_inputs("sub/mine.safetensors")


def test_a_folder_that_cannot_be_made_is_a_sentence(pack, tools):
    folder = pack.base / "models" / "lookahead"
    shutil.rmtree(folder, ignore_errors=True)
    folder.touch()
    with pytest.raises(ValueError, match="cannot be made") as error:
        pack.module("nodes.reference.convert_encoder").target_path("mine")
    assert str(error.value).endswith("write there.") and "Errno" not in str(error.value)
    folder.unlink()


@pytest.mark.parametrize(("version", "says"), [("0.13.0", "this is 0.13.0 ("), (None, "this is an older one (")])
def test_a_host_that_is_too_old_gets_one_sentence_and_no_node(pack, monkeypatch, caplog, version, says):
    import comfyui_version
    from comfy_api.latest import io

    monkeypatch.delattr(io, "ControlAfterGenerate")
    if version:
        monkeypatch.setattr(comfyui_version, "__version__", version)
    else:
        monkeypatch.delattr(comfyui_version, "__version__")
    assert register(pack, monkeypatch) == (False, [])
    (line,) = [record.message for record in caplog.records if "comfy_entrypoint" in record.message]
    assert says in line and "needs ComfyUI 0.16.3 or newer" in line and "ControlAfterGenerate" in line


def test_a_fault_of_ours_on_a_new_host_is_not_called_the_host_s(pack, monkeypatch, caplog):
    from comfy_api.latest import io

    monkeypatch.delattr(io, "ControlAfterGenerate")
    assert register(pack, monkeypatch) == (False, [])
    assert "update ComfyUI" not in caplog.text and "ControlAfterGenerate" in caplog.text


def test_the_oldest_host_is_that_of_the_metadata(pack):
    assert (
        f'requires-comfyui = ">={pack.module("nodes.versions").OLDEST_HOST}"' in (ROOT / "pyproject.toml").read_text()
    )


def validated(pack, inputs_of):
    """The host's errors for a graph of each node, by node: (inputs that it names, texts)."""
    import execution

    out = {}
    for name in pack.nodes:
        graph = {"1": {"class_type": name, "inputs": inputs_of(name)}}
        valid, errors, _ = asyncio.run(execution.validate_inputs("test", graph, "1", {}))
        out[name] = (
            {e["extra_info"].get("input_name") for e in errors},
            [f"{e['message']} {e['details']}" for e in errors],
        )
    return out


def test_missing_inputs_are_named_and_nothing_is_raised(pack):
    for name, (named, texts) in validated(pack, lambda name: {}).items():
        required = {i.id for i in pack.nodes[name].define_schema().inputs if not i.optional}
        assert named == required and all("Required input is missing" in text for text in texts), name


@pytest.mark.parametrize("name", LOADERS)
def test_without_a_value_there_is_no_file_or_it_comes_by_a_link(pack, name):
    """The page sends "" where a list is empty; what comes by a link, None, is looked for when the node runs."""
    node, folders = (
        pack.nodes[name],
        ("lookahead", "insightface/models/pack", "clip_vision", "lookahead_references", "lookahead_concepts"),
    )
    for empty in ("", None):
        text = node.validate_inputs(**{LOADERS[name]: empty})
        assert "There is no" in text and text.endswith(".")
    for folder in folders:
        (pack.base / "models" / folder).mkdir(parents=True, exist_ok=True)
        (pack.base / "models" / folder / ("a.onnx" if "pack" in folder else "a.safetensors")).touch()
    try:
        assert node.validate_inputs(**{LOADERS[name]: None}) is True
        assert re.fullmatch("No .* is chosen: choose one, such as .*", node.validate_inputs(**{LOADERS[name]: ""}))
        others = {"device": "cpu"} if name == "LookaheadLoadFaceAnalysis" else {}
        if name != "LookaheadConvertEncoder":
            assert isinstance(node.fingerprint_inputs(**{LOADERS[name]: None}, **others), str | None)
    finally:
        for folder in folders:
            shutil.rmtree(pack.base / "models" / folder.partition("/")[0])


def test_a_loss_whose_choices_are_unknown_or_come_by_a_link(pack):
    node = pack.nodes["LookaheadLPIPSLoss"]
    assert node.validate_inputs(backbone=None) is True and node.validate_inputs(weights=None) is True
    assert "choose one of vgg" in node.validate_inputs(backbone="resnet")
    assert isinstance(node.fingerprint_inputs(backbone=None), str)


def test_inputs_of_other_versions_are_left_out_with_a_line_in_the_log(pack, mini, tools, caplog):
    reference = tools.reference(mini, tools.picture(1))
    node = pack.nodes["LookaheadApplyImagePrompt"]
    (model,) = node.EXECUTE_NORMALIZED(model=mini.model, reference=reference, weight_type="linear", combine=1).result
    assert "lookahead" in model.model_options["transformer_options"]
    (line,) = [record.message for record in caplog.records if "has no input" in record.message]
    assert "LookaheadApplyImagePrompt has no input combine and no weight_type" in line
    assert isinstance(pack.nodes["LookaheadLoadEncoder"].fingerprint_inputs(encoder_name="gone", old=None), str)


def test_errors_carry_the_name_of_the_pack_not_the_path_of_its_folder(pack, tmp_path):
    import execution

    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(ValueError) as error:
        pack.module("lookahead.files.encoder_file").read(tmp_path / "empty.safetensors")
    assert execution.full_type_name(type(error.value)) == "LCM-Lookahead.EncoderFileError"
    for module, name in (("face_models", "FaceModelError"), ("arcface", "RecogniserError")):
        kind = getattr(pack.module(f"lookahead.vision.{module}"), name)
        assert execution.full_type_name(kind) == f"LCM-Lookahead.{name}"


def test_what_a_node_shows_stays_when_the_page_is_loaded_again(pack):
    """The host keeps that of nodes with this mark (and of those that end a graph), where it knows the mark."""
    showing = {}
    for name, node in pack.nodes.items():
        if "ui=" in inspect.getsource(node):
            schema = node.define_schema()
            showing[name] = schema.is_output_node or getattr(schema, "has_intermediate_output", True)
    assert len(showing) > 12 and all(showing.values()), showing


WORDS = {  # what artists look for, and a node that has to be among what is found
    "instantid": "LookaheadApplyImagePrompt",
    "pulid": "LookaheadApplyImagePrompt",
    "portrait": "LookaheadEncodeReference",
    "person": "LookaheadEncodeReference",
    "consistent": "LookaheadApplyImagePrompt",
    "consistent character": "LookaheadLoadReference",
    "face swap": "LookaheadApplyImagePrompt",
    "taesd": "LookaheadShortcut",
    "faceid": "LookaheadEncodeFace",
    "face id": "LookaheadEncodeFace",
    "personalization": "LookaheadPredictConcept",
}


@pytest.mark.parametrize("word", WORDS)
def test_what_artists_look_for_finds_a_node(pack, word):
    """In the host's search, which looks for a word in names and aliases."""
    schema = pack.nodes[WORDS[word]].define_schema()
    if not hasattr(schema, "search_aliases"):
        pytest.skip("this host knows no aliases")
    assert any(word in text.lower() for text in (schema.display_name, *schema.search_aliases))
