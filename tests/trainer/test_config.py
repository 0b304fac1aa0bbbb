"""Configurations: what is wrong is said in a sentence that helps, before anything is loaded."""

import pytest
from lcm_lookahead.trainer.config import CONFIGS, ConfigError, read_values
from lcm_lookahead.trainer.lookahead.config import Config, from_values, load
from pydantic import BaseModel

SMALL = {"model": {"base": "b", "start": "s"}, "data": {"source": "d"}, "lookahead": {"arm": "none"}}
WITH_X0 = {"base": "b", "start": "s", "vae": "v", "recogniser": "r"}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_configuration_is_valid(path):
    assert load(path).steps > 0


def test_the_paper_s_configuration_has_the_paper_s_figures():
    c = load(CONFIGS / "sdxl_paper.yaml")
    assert (c.steps, c.batch, c.model.kv_rank, c.model.export_rank) == (5000, 8, 4, 4)
    assert (c.optimiser.adapter_rate, c.optimiser.kv_rate, c.lookahead.importance) == (1e-5, 5e-6, 0.2)
    assert (c.lookahead.arm, c.lookahead.full_strength, c.lookahead.least_strength) == ("shortcut", 0.5, 0.1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stepz": 5}, "stepz is no key of a configuration: did you mean steps"),
        ({"optimiser": {"kv_rat": 1}}, r"optimiser.kv_rat .* did you mean kv_rate"),
        ({"lookahead": {"arm": "none", "wieght": 1}}, r"lookahead.wieght .* did you mean weight"),
        ({"steps": 0}, "steps is 0: .*greater than or equal to 1"),
        ({"drop": {"text": 0.6, "both": 0.5}}, "their sum must be at most 1"),
        ({"lookahead": {"arm": "shortcut"}}, "needs model.vae and model.recogniser and model.shortcut"),
        ({"lookahead": {"arm": "none", "semantic_alignment": 0.6}}, "compare previews, and lookahead.arm is 'none'"),
        (
            {"lookahead": {"arm": "x0", "contrast": 0.1}, "batch": 8, "accumulate": 8, "model": WITH_X0},
            "computes one at a time: raise",
        ),
        ({"lookahead": {"arm": "none", "contrast": 0.1}}, "contrast compares previews, and lookahead.arm is 'none'"),
        ({"lookahead": {"arm": "none", "align": "sds"}}, "align 'sds' is for lookahead.arm 'shortcut', not 'none'"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"data": {}}, "data.source is missing"),
    ],
)
def test_a_mistake_is_named_with_its_cure(change, said):
    with pytest.raises(ConfigError, match=said):
        from_values(SMALL | change)


def test_with_contrast_a_run_goes_on_with_as_many_samples_at_a_time():
    plain, contrast = (
        from_values(SMALL | {"lookahead": {"arm": "x0", **more}, "model": WITH_X0}) for more in ({}, {"contrast": 0.1})
    )
    assert plain.free - contrast.free == {"accumulate"} and contrast.free < plain.free
    assert (plain.least_rows, contrast.least_rows) == (1, 2)


@pytest.mark.parametrize(
    ("word", "ours"),
    [
        ("gradient_accumulation_steps", "accumulate"),
        ("mixed_precision", "precision"),
        ("max_grad_norm", "optimiser.clip"),
        ("optimiser.learning_rate", "optimiser.adapter_rate and optimiser.kv_rate"),
        ("--train-batch-size", "batch"),
    ],
)
def test_another_trainer_s_word_for_a_field_is_answered_with_ours(word, ours):
    with pytest.raises(ConfigError) as error:
        load(CONFIGS / "mini.yaml", [f"{word}=1"])
    assert str(error.value).endswith(f"did you mean {ours}?")


def test_every_synonym_is_of_a_field_that_exists_and_is_no_field_itself():
    values = load(CONFIGS / "mini.yaml").model_dump()
    for word, ours in Config.SYNONYMS.items():
        assert word not in values, word
        for field in ours.split(" and "):
            section, _, name = field.rpartition(".")
            assert name in (values[section] if section else values), (word, ours)


def test_every_field_is_described():
    def undescribed(section):
        for name, info in section.model_fields.items():
            kind = info.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from undescribed(kind)
            elif not info.description:
                yield f"{section.__name__}.{name}"

    assert not list(undescribed(Config))


def test_the_arms_of_the_ablation_differ_in_nothing_but_the_arm():
    whole = load(CONFIGS / "mini.yaml").model_dump()
    for name, arm in (("none", "none"), ("x0", "x0"), ("shortcut", "shortcut")):
        values = load(CONFIGS / f"mini_{name}.yaml").model_dump()
        assert values["out"] != whole["out"] and values["lookahead"]["arm"] == arm and not values["model"]["kv"]
        values |= {"name": whole["name"], "out": whole["out"]}
        values["model"]["kv"], values["lookahead"]["arm"] = True, "shortcut"
        assert values == whole, name


def test_a_file_extends_another_and_says_so_where_that_cannot_be(tmp_path):
    (tmp_path / "a.yaml").write_text(f"extends: {CONFIGS / 'mini.yaml'}\nsteps: 3\nlookahead: {{weight: 2.0}}\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\nseed: 4\n")
    c, mini = load(tmp_path / "b.yaml", ["steps=5"]), load(CONFIGS / "mini.yaml")
    assert (c.steps, c.seed, c.lookahead.weight, c.batch) == (5, 4, 2.0, mini.batch)
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    with pytest.raises(ConfigError, match="extends itself, by way of"):
        load(tmp_path / "b.yaml")
    (tmp_path / "a.yaml").write_text("extends: c.yaml\n")
    with pytest.raises(ConfigError, match="There is no file .*c.yaml, which .*a.yaml extends"):
        load(tmp_path / "b.yaml")


@pytest.mark.parametrize(("harm", "said"), [("folder", "cannot be read"), ("latin-1", "is no YAML")])
def test_a_file_that_is_no_yaml_is_said(tmp_path, harm, said):
    path = tmp_path / "run.yaml"
    path.mkdir() if harm == "folder" else path.write_bytes("name: Jörg".encode(harm))
    with pytest.raises(ConfigError, match=said):
        load(path)


def test_overrides_reach_into_sections():
    c = load(CONFIGS / "mini.yaml", ["optimiser.kv_rate=1e-4", "steps=7", "lookahead.arm=none", "model.kv=false"])
    assert (c.optimiser.kv_rate, c.steps, c.lookahead.arm, c.model.kv) == (1e-4, 7, "none", False)
    for override, said in (
        ("steps", "write section.key=value"),
        ("steps.x=1", "a value and no section"),
        ("out=/J\udcf6rg", r"The value of out, /J\\xf6rg, is not in UTF-8: rename"),
    ):
        with pytest.raises(ConfigError, match=said):
            load(CONFIGS / "mini.yaml", [override])


def test_the_rate_is_a_function_of_the_step_alone():
    o = from_values(SMALL | {"optimiser": {"warmup": 10, "schedule": "cosine"}}).optimiser
    assert [o.factor(n, 100) for n in (0, 9)] == pytest.approx([0.1, 0.98], abs=1e-2) and o.factor(100, 100) < 1e-9
    constant = from_values(SMALL).optimiser
    assert {constant.factor(n, 100) for n in range(100)} == {1.0}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "extends: mini.yaml\nsteps: 5\nname: x\nsteps: 500\n",
            "run.yaml: steps is there twice, in lines 2 and 4: ",
        ),
        ("extends: mini.yaml\nmodel: {kv: true, kv: false}\n", "run.yaml: kv is there twice, in lines 2 and 2: "),
    ],
)
def test_a_key_that_is_given_twice_is_refused_in_any_section(tmp_path, text, said):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        load(tmp_path / "run.yaml")


def test_a_key_of_a_merged_mapping_may_be_given_again(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "extends: mini.yaml\nmodel: &own {kv: false}\ndata: {source: d}\noptimiser: &o {warmup: 3}\n"
    )
    assert load(tmp_path / "run.yaml").optimiser.warmup == 3
    (tmp_path / "merged.yaml").write_text("a: &a {steps: 3, batch: 2}\nb: {<<: *a, steps: 4}\n")
    assert read_values(tmp_path / "merged.yaml")["b"] == {"steps": 4, "batch": 2}


@pytest.mark.parametrize("name", ["mini.yaml", "trainer/configs/mini.yaml", "generate/mini.yaml"])
def test_a_file_that_comes_along_is_found_by_its_name_from_anywhere(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert read_values(name) == read_values(CONFIGS / name.removeprefix("trainer/configs/"))
    (tmp_path / "mine.yaml").write_text(f"extends: {name}\nout: elsewhere\n")
    assert read_values("mine.yaml") == read_values(name) | {"out": "elsewhere"}
    (tmp_path / "mini.yaml").write_text("name: mine\n")  # one's own comes first
    assert read_values("mini.yaml") == {"name": "mine"}
