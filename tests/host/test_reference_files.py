"""Save and Load Lookahead Reference: the same bits without the picture, and what is refused."""

import pytest
import torch
from damaged import check_that_nothing_is_kept_of_a_file_cut_short

LATENT = (1, 4, 8, 8)


@pytest.fixture
def names(pack, tmp_path):
    """Where the host looks for reference files: nothing is there but what a test puts there."""
    import folder_paths

    known = folder_paths.folder_names_and_paths["lookahead_references"]
    before, known[0][:] = list(known[0]), [str(tmp_path)]
    folder_paths.filename_list_cache.pop("lookahead_references", None)
    yield tmp_path
    known[0][:] = before
    folder_paths.filename_list_cache.pop("lookahead_references", None)


@pytest.fixture
def elsewhere(names, tmp_path_factory):
    """A folder that is configured before the other."""
    import folder_paths

    folder = tmp_path_factory.mktemp("elsewhere")
    folder_paths.folder_names_and_paths["lookahead_references"][0].insert(0, str(folder))
    return folder


@pytest.fixture
def both(mini, tools):
    """A reference for image prompt and KV injection, of two pictures under masks."""
    mask = (tools.picture(3, n=2)[..., 0] > 0.5).float()
    return tools.kv_reference(mini, tools.picture(1, n=2), encoder=tools.kv_encoder(mini), mask=mask)


def draw(mini, tools, reference, kv=True):
    model = tools.apply(mini.model, reference, weight=0.8)
    model = tools.inject(model, reference) if kv else model
    return tools.sample(model, mini.text(1), mini.text(2), torch.zeros(LATENT), steps=2)


@pytest.mark.contract
def test_a_saved_person_is_drawn_to_the_bit_without_the_picture(pack, mini, tools, both, names):
    report = tools.run("LookaheadSaveReference", both, "anna", about="drawn, CC0")
    loaded, text = pack.nodes["LookaheadLoadReference"].execute("anna.safetensors", tools.kv_encoder(mini)).result
    assert report.startswith("Written: ") and "drawn, CC0" in text and loaded.subjects[0].pixels is None
    assert torch.equal(draw(mini, tools, both), draw(mini, tools, loaded))


def test_the_report_says_where_the_file_is_among_several_configured_folders(tools, both, names, elsewhere):
    report = tools.run("LookaheadSaveReference", both, "anna")
    path = elsewhere / "anna.safetensors"
    assert path.is_file() and not any(names.iterdir()) and report.startswith(f"Written: {path}, ")
    assert tools.run("LookaheadSaveReference", both, "anna").startswith(f"There already: {path}, ")


def test_the_image_prompt_alone_holds_no_picture(pack, mini, tools, both, names):
    tools.run("LookaheadSaveReference", both, "anna", contents="image prompt only")
    loaded = tools.run("LookaheadLoadReference", "anna.safetensors", tools.kv_encoder(mini))
    (subject,) = loaded.subjects
    assert subject.latents is subject.mask is subject.kv_prompt is None
    assert torch.equal(draw(mini, tools, both, kv=False), draw(mini, tools, loaded, kv=False))
    with pytest.raises(ValueError) as error:
        tools.inject(mini.model, loaded)
    assert "VAE" in tools.one_sentence(error)


def test_a_reference_without_an_encoder_needs_none_and_leaves_one_aside(mini, tools, names):
    reference = tools.kv_reference(mini, tools.picture(1))
    tools.run("LookaheadSaveReference", reference, "thing")
    for encoder in (None, tools.kv_encoder(mini)):
        (subject,) = tools.run("LookaheadLoadReference", "thing.safetensors", encoder).subjects
        assert subject.encoder is None and torch.equal(subject.latents, reference.subjects[0].latents)
    with pytest.raises(ValueError) as error:
        tools.run("LookaheadSaveReference", reference, "other", contents="image prompt only")
    tools.one_sentence(error)
    assert [path.name for path in names.iterdir()] == ["thing.safetensors"]


def test_another_encoder_or_none_is_refused(mini, tools, both, names):
    tools.run("LookaheadSaveReference", both, "anna")
    for other in (None, tools.encoder(mini.encoder)):
        with pytest.raises(ValueError) as error:
            tools.run("LookaheadLoadReference", "anna.safetensors", other)
        assert "read with the encoder test.safetensors" in tools.one_sentence(error)


def test_a_file_is_never_overwritten_and_queueing_again_is_no_mistake(mini, tools, both, names):
    tools.run("LookaheadSaveReference", both, "anna")
    before = (names / "anna.safetensors").read_bytes()
    assert tools.run("LookaheadSaveReference", both, "anna").startswith("There already: ")
    for options in ({"about": "else"}, {"contents": "image prompt only"}):
        with pytest.raises(ValueError) as error:
            tools.run("LookaheadSaveReference", both, "anna", **options)
        assert "exists already" in tools.one_sentence(error)
    assert (names / "anna.safetensors").read_bytes() == before
    for name in ("", "a/b", "..", "C:\\x", "a\0b", "a\nb", "é" * 101):
        with pytest.raises(ValueError) as error:
            tools.run("LookaheadSaveReference", both, name)
        tools.one_sentence(error)


def test_of_a_reference_file_that_was_cut_short_nothing_is_kept(mini, tools, both, names):
    tools.run("LookaheadSaveReference", both, "anna")
    encoder = tools.kv_encoder(mini)
    path = names / "anna.safetensors"
    check_that_nothing_is_kept_of_a_file_cut_short(
        path, lambda: tools.run("LookaheadLoadReference", path.name, encoder)
    )


def test_a_file_that_is_not_there_is_named_with_the_folder_searched(pack, tools, names):
    node = pack.nodes["LookaheadLoadReference"]
    assert node.define_schema().inputs[0].options == []
    assert "Save Lookahead Reference" in node.validate_inputs()
    assert str(names) in node.validate_inputs("anna.safetensors")
    with pytest.raises(FileNotFoundError) as error:
        node.execute("anna.safetensors")
    tools.one_sentence(error)
