"""What the tool for translations finds wrong, on one small node in the languages of the page."""

import json

import pytest
from lcm_lookahead.tools import locales
from lcm_lookahead.tools.common import Problem

NODE = {
    "display_name": "Lookahead Thing",
    "description": "Lowers the noise, see models/things. 0.5 is right.",
    "category": "things",
    "input": {
        "required": {
            "step_size": ["FLOAT", {"tooltip": "How far. LoRA counts."}],
            "order": [["as it is", "LoRA"], {"tooltip": "In which order, by step_size."}],
            "sampler": ["COMBO", {"options": ["euler", "heun"], "tooltip": "The sampler."}],
        },
        "hidden": {"prompt": ["PROMPT", {}]},
    },
    "output": ["IMAGE"],
    "output_name": ["picture"],
    "output_tooltips": ["What came out of Lookahead Thing."],
}
OBJECT_INFO = {
    "LookaheadThing": NODE,
    "KSampler": {"input": {"required": {"sampler_name": [["euler", "heun"], {}]}}, "category": "sampling"},
}
TEXTS = {
    "Lookahead Thing": "Lookahead Ding",
    NODE["description"]: "Senkt das Rauschen, siehe models/things. 0.5 ist richtig.",
    "step_size": "Weite",
    "How far. LoRA counts.": "Wie weit. LoRA zählt.",
    "order": "Folge",
    "In which order, by step_size.": "In welcher Folge, nach Weite.",
    "as it is": "wie es ist",
    "sampler": "Sampler",
    "The sampler.": "Der Sampler.",
    "picture": "Bild",
    "What came out of Lookahead Thing.": "Was aus Lookahead Ding kam.",
    "things": "Dinge",
}
PAGE = "# Lookahead Thing\n\nSee `models/things`.\n\n- `order`: 3 of **Lookahead Thing**.\n"
TRANSLATED = "# Lookahead Ding\n\n`models/things`.\n\n- `order` (Folge): 3 von **Lookahead Ding**.\n\n*Maschine*\n"


@pytest.fixture
def folders(tmp_path):
    """Catalogues and pages with which nothing is wrong."""
    folder, pages = tmp_path / "locales", tmp_path / "docs"
    (pages / "LookaheadThing").mkdir(parents=True)
    folder.mkdir()
    (pages / "LookaheadThing.md").write_text(PAGE)
    glossary = {"stays": ["LoRA"], "words": {"noise": dict.fromkeys(locales.LANGUAGES, "Lärm|Rauschen")}}
    (folder / "glossary.json").write_text(json.dumps(glossary))
    for code in locales.LANGUAGES:
        catalogue = {"language": code, "read_by": [], "notice": "*Maschine*", "texts": TEXTS, "pages": {}}
        (folder / f"{code}.json").write_text(json.dumps(catalogue))
        (pages / "LookaheadThing" / f"{code}.md").write_text(TRANSLATED)
    tool = locales.Locales(OBJECT_INFO, folder, pages)
    tool.take()
    tool.write()
    return folder, pages


def faults(folders, code="de", **changed):
    """What is wrong after texts of a catalogue are changed (None: taken out)."""
    folder, pages = folders
    path = folder / f"{code}.json"
    catalogue = json.loads(path.read_text())
    catalogue["texts"] |= changed.pop("texts", {})
    catalogue["texts"] = {text: word for text, word in catalogue["texts"].items() if word is not None}
    path.write_text(json.dumps(catalogue | changed))
    tool = locales.Locales(OBJECT_INFO, folder, pages)
    tool.write()
    return tool.faults()


def test_with_everything_translated_there_is_nothing_to_say(folders):
    assert faults(folders) == []


def test_it_names_a_text_without_a_translation_and_leaves_it_english_in_the_page(folders):
    assert faults(folders, texts={"picture": None}) == ["de: missing: 'picture'"]
    written = json.loads((folders[0] / "de" / "nodeDefs.json").read_text())["LookaheadThing"]
    assert "name" not in written["outputs"]["0"] and written["outputs"]["0"]["tooltip"]


def test_it_names_a_text_that_was_changed_since_and_what_it_was(folders):
    old = "How far. LoRA counted."
    found = faults(folders, texts={"How far. LoRA counts.": None, old: "Wie weit."})
    assert found == [f"de: missing: 'How far. LoRA counts.', which was {old!r} when it was translated"]


def test_it_names_what_no_node_says_any_more(folders):
    assert faults(folders, texts={"Zebra": "Zebra"}) == ["de: left over: 'Zebra'"]


@pytest.mark.parametrize(
    ("text", "translation", "said"),
    [
        (NODE["description"], "Senkt das Rauschen, siehe models/things. 0.05 ist richtig.", "numbers ['0.05']"),
        (NODE["description"], "Senkt das Rauschen, siehe models/Dinge. 0.5 ist richtig.", "files and folders"),
        (NODE["description"], "Senkt das Geräusch, siehe models/things. 0.5 ist richtig.", "the glossary has 'noise'"),
        ("How far. LoRA counts.", "Wie weit. Lora zählt.", "no 'LoRA'"),
        ("In which order, by step_size.", "In welcher Folge, nach step_size.", "no 'Weite', as 'step_size' is called"),
        ("What came out of Lookahead Thing.", "Was herauskam.", "no 'Lookahead Ding'"),
        ("picture", "Bild | Bilder", "one of the signs"),
        ("picture", " ", "nothing, or blanks"),
    ],
)
def test_it_names_what_a_translation_has_not_kept(folders, text, translation, said):
    found = faults(folders, texts={text: translation})
    assert len(found) == 1 and found[0].startswith("de: ") and said in found[0] and repr(text) in found[0]


def test_numbers_that_english_writes_as_words_may_stand_in_digits(folders):
    assert faults(folders, texts={"picture": "1 Bild"}) == []


def test_lists_of_the_host_and_hidden_inputs_are_no_texts_of_ours():
    node = locales.english(OBJECT_INFO)["nodeDefs"]["LookaheadThing"]
    assert "options" not in node["inputs"]["sampler"] and "prompt" not in node["inputs"]
    assert node["inputs"]["order"]["options"] == {"as it is": "as it is", "LoRA": "LoRA"}
    assert locales.english(OBJECT_INFO)["main"] == {"nodeCategories": {"things": "things"}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda page: page.replace("# Lookahead Ding", "# Ding"), "does not begin with '# Lookahead Ding'"),
        (lambda page: page.replace("`models/things`", "`models/Dinge`"), "other code"),
        (lambda page: page.replace("- `order`", "`order`"), "other lines"),
        (lambda page: page.replace(": 3 von", ": 30 von"), "other numbers"),
        (lambda page: page.replace("(Folge)", ""), "no 'Folge'"),
        (lambda page: page.replace("*Maschine*", ""), "has to end with"),
    ],
)
def test_it_names_what_a_page_has_not_kept(folders, change, said):
    path = folders[1] / "LookaheadThing" / "de.md"
    path.write_text(change(TRANSLATED))
    found = faults(folders)
    assert found and all("LookaheadThing/de.md" in fault for fault in found) and any(said in fault for fault in found)


def test_it_names_a_page_whose_english_has_changed_but_not_one_with_other_line_breaks(folders):
    page = folders[1] / "LookaheadThing.md"
    page.write_text(PAGE.replace("\n\nSee ", "\n\nSee\n"))
    assert faults(folders) == []
    page.write_text(PAGE.replace("See", "Look at"))
    assert f"de: out of date: LookaheadThing/de.md; {page.name} has changed since it was translated" in faults(folders)


def test_it_names_a_page_that_is_missing_in_a_language_with_pages(folders):
    (folders[1] / "LookaheadThing" / "de.md").unlink()
    assert faults(folders) == ["de: missing: the page de.md of LookaheadThing"]
    assert faults(folders, pages={}) == []


def test_it_names_a_file_of_the_page_that_was_changed_by_hand(folders):
    path = folders[0] / "fr" / "nodeDefs.json"
    path.write_text(path.read_text().replace("Bild", "Image"))
    found = locales.Locales(OBJECT_INFO, *folders).faults()
    assert found == ["locales/fr/nodeDefs.json is not as nodes and catalogue have it: run tools.locales --write"]


def test_a_catalogue_that_is_no_json_is_named(folders):
    (folders[0] / "de.json").write_text("{")
    with pytest.raises(Problem, match="de.json is no JSON"):
        locales.Locales(OBJECT_INFO, *folders)


def test_the_table_of_languages_says_who_has_read_them():
    rows = (locales.LOCALES / "README.md").read_text(encoding="utf-8").splitlines()
    for code in locales.LANGUAGES:
        catalogue = locales.read(locales.LOCALES / f"{code}.json")
        read = ", ".join(catalogue["read_by"]) or "no, machine-made"
        pages = "yes" if catalogue["pages"] else "no"
        assert f"| {code} | {catalogue['language']} | yes | {pages} | {read} |" in rows
