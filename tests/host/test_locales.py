"""Every text of every node stands in every language, as this host would ask for it."""

from lcm_lookahead.tools import locales


def test_every_text_is_in_every_language_and_nothing_is_left_over(object_info):
    faults = locales.Locales(object_info).faults()
    assert not faults, "\n".join(["see locales/README.md:", *faults])


def test_every_input_and_output_has_a_name_and_a_tooltip_in_every_language(object_info):
    for code in ("en", *locales.LANGUAGES):
        nodes = locales.read(locales.LOCALES / code / "nodeDefs.json")
        for id, node in object_info.items():
            if id.startswith(locales.OURS):
                assert nodes[id]["display_name"] and nodes[id]["description"]
                sockets = [nodes[id]["inputs"][name] for name, _, _ in locales.inputs(node)]
                sockets += [nodes[id]["outputs"][str(i)] for i in range(len(node["output"]))]
                assert all(socket["name"] and socket["tooltip"] for socket in sockets), (code, id)
