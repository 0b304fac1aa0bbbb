"""Every text of every node stands in every language, as this host would ask for it."""

from lcm_lookahead.tools import locales


def test_every_text_is_in_every_language_and_nothing_is_left_over(object_info):
    faults = locales.Locales(object_info).faults()
    assert not faults, "\n".join(["see locales/README.md:", *faults])


def test_every_input_and_output_has_a_name_and_a_tooltip_in_what_the_page_reads(object_info):
    for code in ("en", *locales.LANGUAGES):
        nodes = locales.read(locales.LOCALES / code / "nodeDefs.json")
        for id, node in nodes.items():
            assert node["display_name"] and node["description"], (code, id)
            sockets = [node["inputs"][name] for name, _, _ in locales.inputs(object_info[id])]
            sockets += [node["outputs"][str(i)] for i in range(len(object_info[id]["output"]))]
            assert all(socket["name"] and socket["tooltip"] for socket in sockets), (code, id)


def test_what_has_no_translation_yet_is_left_to_the_page_s_english(object_info):
    """A node that was made today, and an input of an older one, beside what is translated."""
    tool = locales.Locales(object_info)
    new, old = "LookaheadNewLoss", "LookaheadL1Loss"
    tool.trees["nodeDefs"][new] = {
        "display_name": "Lookahead New Loss",
        "description": "How far the new is.",
        "inputs": {"newness": {"name": "newness", "tooltip": "How new."}},
        "outputs": {"0": {"name": "newest", "tooltip": "What is new."}},
    }
    tool.trees["nodeDefs"][old]["inputs"]["newness"] = {"name": "newness", "tooltip": "How new."}
    written = {name: locales.json.loads(text) for name, text in tool.files().items()}
    assert written["en/nodeDefs.json"][new]["display_name"] == "Lookahead New Loss"
    for code in locales.LANGUAGES:
        nodes = written[f"{code}/nodeDefs.json"]
        assert new not in nodes and "newness" not in nodes[old]["inputs"] and nodes[old]["inputs"]["size"]["tooltip"]
