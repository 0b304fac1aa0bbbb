"""Reference files: what is written comes back, and whatever does not fit together is refused in one sentence."""

import json
from dataclasses import replace

import pytest
import torch
from lcm_lookahead.lookahead.files import reference_file
from lcm_lookahead.lookahead.files.reference_file import ReferenceFileError, SavedSubject, weights_mark
from safetensors.torch import save_file


def rand(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def whole():
    return SavedSubject(
        tokens=rand(1, 4, 8),
        null_tokens=rand(1, 4, 8),
        latents=rand(2, 4, 3, 3),
        mask=rand(2, 24, 24),
        kv_text=rand(1, 7, 8),
        kv_pooled=rand(1, 5),
        face=rand(2, 6),
        encoder="some encoder.safetensors",
        encoder_mark="0123456789abcdef",
        recogniser="w600k_r50.onnx",
        weight=-0.5,
    )


def test_what_is_written_comes_back_to_the_bit(whole, tmp_path):
    untrained = SavedSubject(latents=rand(1, 4, 2, 2), one_each=True)
    reference_file.write(tmp_path / "a.safetensors", [whole, untrained], "Anna\nCC0")
    subjects, about = reference_file.read(tmp_path / "a.safetensors")
    assert about == "Anna\nCC0" and [s.settings for s in subjects] == [whole.settings, untrained.settings]
    for old, new in zip((whole, untrained), subjects, strict=True):
        assert old.tensors.keys() == new.tensors.keys()
        assert all(torch.equal(value, new.tensors[key]) for key, value in old.tensors.items())
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    text = reference_file.provenance(subjects, about, "a.safetensors")
    assert "Anna" in text and "weight -0.5" in text and "24x24" in text and "w600k_r50.onnx" in text


def test_one_subject_twice_is_written_twice(whole, tmp_path):
    """As two nodes that combine one reference with itself make it: the same tensors under two names."""
    reference_file.write(tmp_path / "a.safetensors", [whole, replace(whole, weight=2.0)])
    (first, second), _ = reference_file.read(tmp_path / "a.safetensors")
    assert second.weight == 2.0 and all(torch.equal(second.tensors[k], v) for k, v in first.tensors.items())


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": None},
        {"null_tokens": None},
        {"null_tokens": rand(1, 5, 8)},
        {"tokens": rand(4, 8)},
        {"tokens": torch.full((1, 4, 8), float("nan"))},
        {"latents": rand(2, 16, 3, 3)},
        {"latents": None},
        {"mask": rand(1, 24, 24)},
        {"mask": rand(2, 64, 24)},
        {"mask": 2 * torch.ones(2, 24, 24)},
        {"mask": torch.zeros(2, 24, 24)},
        {"kv_text": rand(2, 7, 8)},
        {"kv_pooled": rand(2, 5)},
        {"kv_text": None},
        {"encoder_mark": ""},
        {"weight": float("inf")},
        {"tokens": None, "null_tokens": None, "latents": None, "mask": None, "kv_text": None, "kv_pooled": None},
    ],
    ids=lambda change: " ".join(change),
)
def test_what_does_not_fit_together_is_refused_and_nothing_is_written(whole, change, tmp_path):
    with pytest.raises(ReferenceFileError) as error:
        reference_file.write(tmp_path / "a.safetensors", [replace(whole, **change)])
    sentence(error)
    assert not list(tmp_path.iterdir())


def sentence(error):
    text = str(error.value)
    assert text.startswith("a.safetensors") and text.endswith(".") and "\n" not in text and text.count(". ") == 0
    return text


META = {"format": "lcm-lookahead-reference", "format_version": "1", "about": ""}
ONE = {"encoder": "", "encoder_mark": "", "recogniser": "", "one_each": False, "weight": 1.0}


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({}, "no reference file"),
        ({**META, "format": "lcm-lookahead-encoder"}, "no reference file"),
        ({**META, "format_version": "2"}, "update the pack"),
        (META, "which subjects"),
        ({**META, "subjects": "[" * 5000}, "which subjects"),
        ({**META, "subjects": json.dumps([])}, "which subjects"),
        ({**META, "subjects": json.dumps([ONE] * 65)}, "which subjects"),
        ({**META, "subjects": json.dumps([{**ONE, "more": 1}])}, "which subjects"),
        ({**META, "subjects": json.dumps([{**ONE, "weight": "1"}])}, "which subjects"),
        ({**META, "subjects": json.dumps([{**ONE, "weight": float("nan")}])}, "finite"),
        ({**META, "subjects": json.dumps([{**ONE, "weight": 1e38}])}, "up to 100"),
        ({**META, "subjects": json.dumps([{**ONE, "one_each": 1}])}, "which subjects"),
    ],
)  # fmt: skip
def test_files_that_are_none_or_damaged_are_refused(metadata, says, tmp_path):
    save_file({"0.latents": rand(1, 4, 2, 2)}, tmp_path / "a.safetensors", metadata or None)
    with pytest.raises(ReferenceFileError) as error:
        reference_file.read(tmp_path / "a.safetensors")
    assert says in sentence(error)


@pytest.mark.parametrize("key", ["1.latents", "0.secret", "latents", "0.latents.0", "00.latents"])
def test_tensors_that_belong_to_no_subject_are_refused(key, tmp_path):
    metadata = {**META, "subjects": json.dumps([ONE])}
    save_file({"0.latents": rand(1, 4, 2, 2), key: rand(1, 4, 2, 2)}, tmp_path / "a.safetensors", metadata)
    with pytest.raises(ReferenceFileError) as error:
        reference_file.read(tmp_path / "a.safetensors")
    assert key in sentence(error)


def test_every_cut_of_a_file_is_refused(whole, tmp_path):
    reference_file.write(tmp_path / "whole.safetensors", [whole])
    data = (tmp_path / "whole.safetensors").read_bytes()
    for length in range(0, len(data), 97):
        (tmp_path / "a.safetensors").write_bytes(data[:length])
        with pytest.raises(ReferenceFileError) as error:
            reference_file.read(tmp_path / "a.safetensors")
        assert str(error.value).startswith("a.safetensors") and str(error.value).endswith(".")


def test_a_missing_file_and_one_with_integers_are_refused(tmp_path):
    with pytest.raises(ReferenceFileError):
        reference_file.read(tmp_path / "a.safetensors")
    metadata = {**META, "subjects": json.dumps([ONE])}
    save_file({"0.latents": torch.ones(1, 4, 2, 2, dtype=torch.int32)}, tmp_path / "a.safetensors", metadata)
    with pytest.raises(ReferenceFileError) as error:
        reference_file.read(tmp_path / "a.safetensors")
    assert "int32" in sentence(error)


def test_the_mark_of_weights_knows_names_shapes_and_values():
    weights = {"a": rand(3, 3), "b": rand(40)}
    mark = weights_mark(weights.items())
    assert mark == weights_mark(reversed(list(weights.items()))) and len(mark) == 16
    assert mark == weights_mark({"a": weights["a"].clone(), "b": weights["b"]}.items())
    others = [
        {"a": weights["a"], "c": weights["b"]},
        {**weights, "a": rand(1, 9)},
        {**weights, "b": weights["b"] + 1e-3},
    ]
    assert mark not in [weights_mark(other.items()) for other in others]
