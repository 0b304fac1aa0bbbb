"""The grammar of people and prompts: who is drawn is decided by numbers alone, evenly, and typos are said."""

from collections import Counter
from pathlib import Path

import pytest
import yaml
from lcm_lookahead.trainer.config import CONFIGS, ConfigError
from lcm_lookahead.trainer.data.generate.config import load
from lcm_lookahead.trainer.data.generate.people import halton, read_people
from lcm_lookahead.trainer.data.generate.prompts import plan_pictures

FOLDER = CONFIGS / "generate"
MINI = FOLDER / "mini.yaml"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configurations_are_valid_and_begin_with_their_command(path):
    config = load(path)
    assert path.read_text().startswith(f"# lookahead generate trainer/configs/generate/{path.name}\n")
    person = read_people(config)(0)
    plans = plan_pictures(config.prompts, person, "key")
    assert len(plans) == config.prompts.per_person and plans[0].plain
    for plan in plans:
        assert person.description in plan.prompt
        assert plan.prompt.replace(person.description, "a face") == plan.caption
        assert "  " not in plan.prompt and "{" not in plan.prompt


def test_a_person_is_a_function_of_the_number_whatever_was_drawn_before():
    people = read_people(load(MINI))
    forwards = [people(n) for n in range(20)]
    other = read_people(load(MINI))
    assert [other(n) for n in reversed(range(20))] == forwards[::-1]
    assert [read_people(load(MINI, ["seed=1"]))(n) for n in range(20)] != forwards


def test_thresholds_change_nobody_but_the_grammar_does():
    before, after = (read_people(load(MINI, [o])) for o in ("checks.similarity=0.1", "checks.similarity=0.9"))
    assert [before(n) for n in range(9)] == [after(n) for n in range(9)]
    other = read_people(load(MINI, ["people.attributes.beard.values={a beard: 1}"]))
    assert all("a beard" in other(n).description for n in range(9))


@pytest.mark.parametrize("first", [0, 137, 5000])
def test_every_stretch_of_people_is_balanced_and_so_are_the_combinations(first):
    config = load(MINI)
    people = [read_people(config)(n).attributes for n in range(first, first + 60)]
    for name in config.people.balance:
        values = config.people.attributes[name].values
        for value in values:
            share = sum(value in person[name] for person in people) / len(people)
            assert abs(share - 1 / len(values)) < 0.05, (name, value)
    pairs = Counter((p["hair"], p["skin"]) for p in people)
    assert len(pairs) == 20 and max(pairs.values()) <= 5  # 3 each, were it a table


def test_balance_follows_the_weights():
    config = load(MINI, ["people.attributes.skin.values={pale: 3, dark: 1, tan: 0}"])
    skins = Counter(read_people(config)(n).attributes["skin"] for n in range(64))
    assert skins.keys() == {("pale",), ("dark",)}
    assert skins["pale",] == pytest.approx(48, abs=3)


def test_halton_is_the_radical_inverse():
    assert [halton(n, 2) for n in range(5)] == [0, 0.5, 0.25, 0.75, 0.125]
    assert halton(7, 3) == pytest.approx(1 / 3 + 2 / 9)


def test_styles_repeat_only_when_all_were_drawn():
    config = load(MINI, ["prompts.per_person=9", "prompts.plain_count=2"])
    for number in range(5):
        plans = plan_pictures(config.prompts, read_people(config)(number), "key")
        assert len({plan.style for plan in plans[2:]}) == 7
        assert [plan.plain for plan in plans] == [True] * 2 + [False] * 7
        assert len({plan.seed for plan in plans}) == 9


def test_what_a_person_has_instead_of_hair_leaves_out_its_colour():
    config = load(FOLDER / "sdxl.yaml", ["people.attributes.hair_style.values={a bald head: 1, a bun: 0}"])
    person = read_people(config)(0)
    assert person.attributes["hair_colour"] == person.attributes["hair_texture"] == ()
    assert "a bald head" in person.description and "black" not in person.description


def test_names_are_drawn_in_their_order_and_hidden_in_the_caption(tmp_path):
    (tmp_path / "names.txt").write_bytes("Ada Example\r\n\r\nBen Example\r\n".encode("utf-8-sig"))  # as Windows writes
    config = load(MINI, ["people=null", f"names={tmp_path / 'names.txt'}"])
    people = read_people(config)
    plans = plan_pictures(config.prompts, people(1), people.key)
    assert plans[0].prompt == "a photo of Ben Example" and plans[0].caption == "a photo of a face"
    assert config.content()["names"] == "names.txt"
    with pytest.raises(ConfigError, match="holds 2 names, and person 2 is asked for"):
        people(2)


def test_the_configuration_tells_contents_apart_from_where_and_how_much():
    content = load(MINI).content()
    assert load(MINI, ["out=elsewhere", "shards=99"]).content() == content
    assert load(MINI, ["checks.similarity=0.31"]).content() != content
    assert load(MINI, ["generator.batch=3"]).content() != content


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"people": {"subject": "{skn} face"}}, "the template '{skn} face' names 'skn'.* did you mean 'skin'?"),
        ({"people": {"phrases": ["{hair"]}}, "the braces of '{hair' do not match"),
        ({"people": {"balance": ["skin", "hare"]}}, "balance names 'hare'.* did you mean 'hair'?"),
        ({"people": {"attributes": {"hair": {"valuess": {}}}}}, r"hair.valuess is no key .* did you mean values\?"),
        ({"people": {"attributes": {"hair": {"draw": [2, 1]}}}}, r"draw is \[2, 1\]"),
        ({"people": {"attributes": {"beard": {"unless": {"hair": ["bunn"]}}}}}, "'bunn', which is no value of hair"),
        ({"people": {"attributes": {"beard": {"values": {"a beard": -1}}}}}, "beard.values.a beard is -1"),
        ({"prompts": {"styles": {}}}, "prompts.styles: it has no value to draw from"),
        ({"prompts": {"styles": {"a comic": 0, "a sketch": 0}}}, "all weights are zero"),
        ({"prompts": {"template": "{stile} of {person}"}}, "names 'stile'.* did you mean 'style'?"),
        ({"prompts": {"template": "{style}"}}, "must hold {person} once"),
        ({"prompts": {"plain_count": 9}}, "plain_count is 9, and per_person only 6"),
        ({"checks": {"clip": None, "style": 0.5}}, "style is 0.5, and nothing tells styles"),
        ({"checks": {"detector": None}}, "recogniser needs a detector"),
        ({"generator": {"base": None}}, "'sdxl' needs base"),
        ({"names": "names.txt"}, "either people .* or names"),
        ({"promts": {}}, r"promts is no key of a configuration: did you mean prompts\?"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(change, sentence, tmp_path):
    values = yaml.safe_load(MINI.read_text())

    def merge(below, above):
        for key, value in above.items():
            whole = key in ("styles", "values") or not isinstance(value, dict) or key not in below
            below[key] = value if whole else merge(below[key], value)
        return below

    path = Path(tmp_path / "bad.yaml")
    path.write_text(yaml.safe_dump(merge(values, change), sort_keys=False))
    with pytest.raises(ConfigError, match=sentence) as caught:
        load(path)
    assert "\n" not in str(caught.value)
