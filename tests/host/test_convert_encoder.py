"""Convert Lookahead Encoder: a stock file becomes an encoder file that the loader lists and that acts the same."""

import pytest
import torch
from damaged import check_that_nothing_is_kept_of_a_file_cut_short
from safetensors.torch import load_file, save_file


@pytest.fixture
def models(pack, mini):
    """models/lookahead with a stock .bin in it; emptied afterwards."""
    folder = pack.base / "models" / "lookahead"
    folder.mkdir(parents=True, exist_ok=True)
    halves = {"image_proj": {}, "ip_adapter": {}}
    for key, value in mini.encoder.items():
        half, _, name = key.partition(".")
        halves[half][name] = value
    torch.save(halves, folder / "stock.bin")
    yield folder
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.contract
def test_a_stock_file_is_converted_and_back(pack, mini, tools, models):
    node = pack.nodes["LookaheadConvertEncoder"]
    assert "stock.bin" in node.define_schema().inputs[0].options and node.validate_inputs("stock.bin") is True
    report = tools.run("LookaheadConvertEncoder", "stock.bin", "mine", precision="as stored")
    assert "mine.safetensors: LCM-Lookahead encoder" in report
    assert report.startswith(f"Written: {models / 'mine.safetensors'}\n")  # wherever extra_model_paths put it
    tools.run("LookaheadConvertEncoder", "mine.safetensors", "back.safetensors", "ip-adapter", "as stored")
    back = load_file(models / "back.safetensors")
    assert back.keys() == mini.encoder.keys() and all(torch.equal(back[k], v) for k, v in mini.encoder.items())
    assert "mine.safetensors" in pack.nodes["LookaheadLoadEncoder"].define_schema().inputs[0].options
    encoder = tools.run("LookaheadLoadEncoder", "mine.safetensors")
    assert torch.equal(encoder.network.projection_weights[0][0], mini.encoder["ip_adapter.1.to_k_ip.weight"])


def test_the_report_says_where_the_file_is_among_several_configured_folders(tools, models, tmp_path, monkeypatch):
    import folder_paths

    known, endings = folder_paths.folder_names_and_paths["lookahead"]
    places = [str(tmp_path / "elsewhere"), *known]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "lookahead", (places, endings))
    report = tools.run("LookaheadConvertEncoder", "stock.bin", "mine", precision="as stored")
    path = tmp_path / "elsewhere" / "mine.safetensors"
    assert path.is_file() and report.startswith(f"Written: {path}\n") and not (models / "mine.safetensors").exists()


@pytest.mark.parametrize("name", ["stock.bin", "mine.safetensors"])
def test_of_an_encoder_that_was_cut_short_nothing_is_kept(tools, models, name):
    tools.run("LookaheadConvertEncoder", "stock.bin", "mine.safetensors")
    check_that_nothing_is_kept_of_a_file_cut_short(models / name, lambda: tools.run("LookaheadLoadEncoder", name))


@pytest.mark.parametrize(
    "name", ["", "..", "../mine", "sub/mine", "sub\\mine", "stock2.safetensors", "é" * 101, "a\nb"]
)
def test_names_that_leave_the_folder_or_exist_are_refused(pack, mini, tools, models, name):
    save_file(mini.encoder, models / "stock2.safetensors")
    before = sorted(pack.base.rglob("*.safetensors"))
    with pytest.raises(ValueError) as error:
        tools.run("LookaheadConvertEncoder", "stock.bin", name)
    tools.one_sentence(error)
    assert sorted(pack.base.rglob("*.safetensors")) == before


def test_a_missing_source_names_the_folders_that_were_searched(pack):
    assert "models/lookahead" in pack.nodes["LookaheadConvertEncoder"].validate_inputs("gone.pt")
