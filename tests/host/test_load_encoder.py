"""Load Lookahead Encoder: what it lists, finds, shows and refuses."""

import json
import time

import pytest
from safetensors.torch import save_file

pytestmark = pytest.mark.contract


@pytest.fixture
def folders(pack, mini, tmp_path):
    """Encoder files where the host looks for them; `folders(name)` -> path in models/<name>, emptied afterwards."""
    made = []

    def put(folder, name, weights=mini.encoder, metadata=None):
        path = pack.base / "models" / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, path, metadata=metadata)
        made.append(path)
        return path

    yield put
    for path in set(made):
        path.unlink()


def test_encoders_are_listed_from_both_folders_and_nothing_else(pack, folders):
    folders("lookahead", "mine.safetensors")
    folders("ipadapter", "sub/stock.safetensors")
    note = pack.base / "models" / "lookahead" / "README.txt"
    note.write_text("not a model")
    schema = pack.nodes["LookaheadLoadEncoder"].define_schema()
    assert schema.inputs[0].options == ["mine.safetensors", "sub/stock.safetensors"]
    note.unlink()


def test_folders_that_a_user_configured_stay_and_are_searched(pack, tmp_path, mini):
    import folder_paths

    load = pack.module("nodes.reference.load_encoder")
    own = tmp_path / "elsewhere"
    own.mkdir()
    save_file(mini.encoder, own / "far.safetensors")
    folder_paths.add_model_folder_path("ipadapter", str(own), is_default=True)
    try:
        pack.module("nodes.folders").register("ipadapter")
        pack.module("nodes.folders").register("ipadapter")
        paths = folder_paths.get_folder_paths("ipadapter")
        assert paths == [str(own), str(pack.base / "models" / "ipadapter")]
        assert "far.safetensors" in load.encoder_names() and load.encoder_path("far.safetensors").startswith(str(own))
    finally:
        folder_paths.folder_names_and_paths["ipadapter"][0].remove(str(own))
        folder_paths.filename_list_cache.pop("ipadapter", None)  # the host notices new folders, not lost ones


def test_a_missing_file_names_the_folders_that_were_searched(pack, tools):
    text = pack.nodes["LookaheadLoadEncoder"].validate_inputs("gone.safetensors")
    assert "gone.safetensors" in text and "models/lookahead" in text and "models/ipadapter" in text
    with pytest.raises(FileNotFoundError) as error:
        pack.nodes["LookaheadLoadEncoder"].execute("gone.safetensors")
    tools.one_sentence(error)


def test_the_loader_shows_where_a_file_comes_from(pack, folders):
    metadata = {
        "format": "lcm-lookahead-encoder",
        "format_version": "1",
        "base_model": "a mini SDXL",
        "recogniser": "IR-SE50",
        "recogniser_licence": "research only",
    }
    folders("lookahead", "mine.safetensors", metadata=metadata)
    out = pack.nodes["LookaheadLoadEncoder"].execute("mine.safetensors")
    encoder, text = out.result
    assert "a mini SDXL" in text and "research only" in text and encoder.metadata["recogniser"] == "IR-SE50"
    assert text in json.dumps(out.ui.as_dict(), ensure_ascii=False).replace("\\n", "\n")


def test_a_replaced_file_is_loaded_again(pack, folders, mini):
    node = pack.nodes["LookaheadLoadEncoder"]
    folders("lookahead", "mine.safetensors")
    before = node.fingerprint_inputs("mine.safetensors")
    assert node.fingerprint_inputs("mine.safetensors") == before
    time.sleep(0.01)
    folders("lookahead", "mine.safetensors", {k: v + 1 for k, v in mini.encoder.items()})
    assert node.fingerprint_inputs("mine.safetensors") != before


def test_a_damaged_file_is_refused_at_the_loader(pack, tools, folders):
    path = folders("lookahead", "mine.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError) as error:
        pack.nodes["LookaheadLoadEncoder"].execute("mine.safetensors")
    assert "mine.safetensors" in tools.one_sentence(error)
