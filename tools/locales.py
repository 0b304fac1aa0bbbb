"""The texts of the nodes and their help pages in the languages of ComfyUI's page.

python -m lcm_lookahead.tools.locales            what is missing, left over, out of date or at odds with the glossary
python -m lcm_lookahead.tools.locales --write    write locales/<code>/ anew from the nodes and the catalogues
python -m lcm_lookahead.tools.locales --take     note that the help pages are translations of the English ones of now

English stands in the nodes alone. A catalogue, `locales/<code>.json`, holds a translation beside each English text: a
text that is changed in a node has none until it is translated again, and the old one is named as left over. `<node>:
<text>` is for a text that has to be put differently in one node. Of each
translated help page it holds the fingerprint of the English page that it was made from. What ComfyUI reads, the folders
`locales/<code>/`, is written from the nodes and the catalogues, never by hand.
"""

from __future__ import annotations

import argparse
import collections
import difflib
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..host.server import Host
from .common import ROOT, Problem, run_main, say

LOCALES, HELP = ROOT / "locales", ROOT / "web" / "docs"
#: The languages, by the codes of ComfyUI's page (which offers no German yet).
LANGUAGES = ("zh", "ja", "ko", "de", "fr", "es", "pt-BR")
OURS = "Lookahead"  # how our node ids begin
INSTRUCTIONS = re.compile(r"[@{}|]")  # signs that the page does not show but obey
NUMBER = re.compile(r"(?<![\w.-])-?\d+(?:\.\d+)?", re.ASCII)
PATH = re.compile(r"[\w.-]+(?:/[\w.-]*\w)+|\.(?:safetensors|bin|onnx|pth?)\b|\w+\.(?:pth?|bin)\b", re.ASCII)
#: What English writes as words and other languages as digits: one, twice, two to five ...
COUNTING = collections.Counter({str(number): 99 for number in range(1, 6)})
CODE, LINK = re.compile(r"`[^`]+`"), re.compile(r"\]\(([^)]+)\)")
LINES = ("#", "##", "###", "-", "|", "!")  # first words of the lines that make up a page

Tree = dict[str, Any]


def inputs(node: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], list[str]]]:
    """Each input of a node definition that a user sees: its name, its options and the words to choose from."""
    for kind in ("required", "optional"):
        for name, (type_, *rest) in node["input"].get(kind, {}).items():
            options = rest[0] if rest else {}
            words = type_ if isinstance(type_, list) else options.get("options", []) if type_ == "COMBO" else []
            yield name, options, [word for word in words if isinstance(word, str)]


def english(object_info: Mapping[str, Mapping[str, Any]]) -> dict[str, Tree]:
    """The English texts, by the names of the files in which the page reads them.

    Args:
        object_info: the host's answer of GET /object_info. It has no model files: what lies in a user's folders are no
            words of ours; nor are the lists that the host's own nodes have too, such as samplers.
    """
    ours = {id: node for id, node in sorted(object_info.items()) if id.startswith(OURS)}
    others = [node for id, node in object_info.items() if id not in ours]
    of_host = {tuple(words) for node in others for _, _, words in inputs(node)}
    nodes: Tree = {}
    for id, node in ours.items():
        entry: Tree = {"display_name": node["display_name"], "description": node["description"], "inputs": {}}
        for name, options, words in inputs(node):
            entry["inputs"][name] = {"name": options.get("display_name") or name, "tooltip": options.get("tooltip", "")}
            if words and tuple(words) not in of_host:
                entry["inputs"][name]["options"] = {word: word for word in words}
        outputs = zip(node["output_name"], node["output_tooltips"], strict=True)
        entry["outputs"] = {str(i): {"name": name, "tooltip": tip or ""} for i, (name, tip) in enumerate(outputs)}
        nodes[id] = entry
    parts = [{part for node in some for part in node["category"].split("/")} for some in (ours.values(), others)]
    return {"nodeDefs": nodes, "main": {"nodeCategories": {part: part for part in sorted(parts[0] - parts[1])}}}


def texts(tree: Any) -> Iterator[str]:
    """Every text of a tree, in order."""
    for part in [tree] if isinstance(tree, str) else tree.values():
        yield from texts(part) if not isinstance(part, str) else [part] if part else []


def mapped(tree: Any, word: Callable[[str], str]) -> Any:
    """The tree with each text replaced; one that `word` answers with "" is left out, so that the page shows English."""
    if isinstance(tree, str):
        return word(tree) if tree else ""
    parts = {key: mapped(part, word) for key, part in tree.items()}
    return {key: part for key, part in parts.items() if part}


def numbers(text: str) -> collections.Counter[str]:
    """The numbers of a text that stand in digits, and how often."""
    return collections.Counter(NUMBER.findall(text))


def names(term: str, text: str) -> bool:
    """Says whether a text names a term, as a word of its own."""
    return bool(re.search(rf"(?<![A-Za-z0-9_/]){re.escape(term)}(?![A-Za-z0-9_/])", text))


def read(path: Path) -> Tree:
    """A JSON file of ours; a Problem that names it where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Problem(f"{path} is missing: a glossary and a catalogue a language are needed.") from None
    except ValueError as error:
        raise Problem(f"{path} is no JSON ({error}): mend that place.") from None


def written(tree: Tree) -> str:
    """A tree as the text of a JSON file."""
    return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


def fingerprint(page: Path) -> str:
    """Sums up what a page says in few letters; how its lines are broken does not matter."""
    return hashlib.sha256(" ".join(page.read_text(encoding="utf-8").split()).encode()).hexdigest()[:12]


class Locales:
    """The English texts, their catalogues and the glossary.

    Args:
        object_info: as for `english`.
        folder, pages: where catalogues and folders of the languages lie, and the help pages.
    """

    def __init__(self, object_info: Mapping[str, Any], folder: Path = LOCALES, pages: Path = HELP) -> None:
        self.folder, self.pages = folder, pages
        self.trees = english(object_info)
        self.glossary = read(folder / "glossary.json")
        self.catalogues = {code: read(folder / f"{code}.json") for code in LANGUAGES}
        nodes, stays = self.trees["nodeDefs"], set(self.glossary["stays"])
        self.texts = [text for text in dict.fromkeys(texts(self.trees)) if text not in stays]  # in the nodes' order
        self.texts_in = [f"{id}: {text}" for id, node in nodes.items() for text in texts(node)]
        self.titles = [node["display_name"] for node in nodes.values()]
        self.ids = {name for node in nodes.values() for name in node["inputs"] if "_" in name}

    def files(self) -> dict[str, str]:
        """Makes what the folders of the languages hold: the text of each file by its path."""
        found = {f"en/{name}.json": written(tree) for name, tree in self.trees.items()}
        for code in LANGUAGES:
            word = functools.partial(self.translation, code)
            nodes = self.trees["nodeDefs"].items()
            tree = {id: mapped(node, functools.partial(word, id=id)) for id, node in nodes}
            found[f"{code}/nodeDefs.json"] = written({id: node for id, node in tree.items() if node})
            found[f"{code}/main.json"] = written(mapped(self.trees["main"], word))
        return found

    def translation(self, code: str, text: str, id: str = "") -> str:
        """A text (of a node) in a language: itself where it stays as it is, "" where it has no translation."""
        known = self.catalogues[code]["texts"]
        return text if text in self.glossary["stays"] else known.get(f"{id}: {text}", known.get(text, ""))

    def titles_in(self, text: str) -> Iterator[str]:
        """The titles of nodes that a text names; one that is a part of a longer one there does not count."""
        for title in sorted(self.titles, key=len, reverse=True):
            if names(title, text):
                text = text.replace(title, "")
                yield title

    def faults(self) -> list[str]:
        """All that is wrong, a line each."""
        found = [f"en: the page shows no @ {{ }} | as in {text!r}" for text in self.texts if INSTRUCTIONS.search(text)]
        codes: dict[str, list[str]] = {}  # what is missing, is so mostly in all languages, and then is one line
        for code in LANGUAGES:
            for fault in (*self._text_faults(code), *self._page_faults(code)):
                codes.setdefault(fault, []).append(code)
        found += [f"{', '.join(those)}: {fault}" for fault, those in codes.items()]
        for name, text in self.files().items():
            if not (path := self.folder / name).is_file() or path.read_text(encoding="utf-8") != text:
                found.append(f"locales/{name} is not as nodes and catalogue have it: run tools.locales --write")
        return found

    def _text_faults(self, code: str) -> Iterator[str]:
        known = self.catalogues[code]["texts"]
        left = {text: None for text in known if text not in self.texts and text not in self.texts_in}
        for text in self.texts:
            if text not in known:
                old = difflib.get_close_matches(text, left, 1, 0.7)
                yield f"missing: {text!r}" + (f", which was {old[0]!r} when it was translated" if old else "")
                for one in old:
                    del left[one]
            else:
                odds = self.at_odds(code, text, known[text])
                yield from (f"{fault}, in the translation of {text!r}" for fault in odds)
        yield from (f"left over: {text!r}" for text in left)
        for special in (text for text in self.texts_in if text in known):
            odds = self.at_odds(code, special.partition(": ")[2], known[special])
            yield from (f"{fault}, in the translation of {special!r}" for fault in odds)

    def at_odds(self, code: str, text: str, translation: str) -> Iterator[str]:
        """Yields what a translation has not kept of an English text."""
        if not translation.strip() or translation != translation.strip():
            yield "nothing, or blanks at an end"
        if INSTRUCTIONS.search(translation):
            yield "one of the signs @ { } |, which the page does not show"
        if numbers(text) - numbers(translation) or numbers(translation) - numbers(text) - COUNTING:
            yield f"numbers {list(numbers(translation).elements())} instead of {list(numbers(text).elements())}"
        if (there := sorted(PATH.findall(text))) != (here := sorted(PATH.findall(translation))):
            yield f"files and folders {here} instead of {there}"
        for term in self.glossary["stays"]:
            if names(term, text) and not names(term, translation):
                yield f"no {term!r}"
        for called in (*self.titles_in(text), *(id for id in self.ids if names(id, text))):
            if called != text and (name := self.translation(code, called)) not in translation:
                yield f"no {name!r}, as {called!r} is called"
        for word, forms in self.glossary["words"].items():
            if re.search(rf"\b{word}(?:s|es)?\b", CODE.sub("", text), re.IGNORECASE):
                wanted = forms[code].split("|")
                if not any(form.casefold() in translation.casefold() for form in wanted):
                    yield f"none of {wanted}, as the glossary has {word!r}"

    def _page_faults(self, code: str) -> Iterator[str]:
        taken = self.catalogues[code]["pages"]
        for id, node in self.trees["nodeDefs"].items() if taken else ():
            original, page = self.pages / f"{id}.md", self.pages / id / f"{code}.md"
            if not page.is_file():
                yield f"missing: the page {page.name} of {id}"
                continue
            if taken.get(id) != fingerprint(original):
                yield f"out of date: {id}/{page.name}; {original.name} has changed since it was translated"
            here, there = page.read_text(encoding="utf-8"), original.read_text(encoding="utf-8")
            title = f"# {self.translation(code, node['display_name'])}"
            if here.splitlines()[0] != title:
                yield f"{id}/{page.name} does not begin with {title!r}"
            for what, of in (("lines", shape), ("code", CODE.findall), ("links", LINK.findall)):
                if more := difference(of(here), of(there)):
                    yield f"{id}/{page.name} has other {what} than {original.name}: {more}"
            if numbers(there) - numbers(here) or numbers(here) - numbers(there) - COUNTING:
                yield f"{id}/{page.name} has other numbers: {difference(NUMBER.findall(here), NUMBER.findall(there))}"
            sockets = (name for name in texts(sockets_of(node)) if f"`{name}`" in there)
            for other in (*self.titles_in(there), *sockets):
                if (name := self.translation(code, other, id)) not in here:
                    yield f"{id}/{page.name} has no {name!r}, as {other!r} is called"
            catalogue = self.catalogues[code]
            if here.rstrip().endswith(catalogue["notice"]) == bool(catalogue["read_by"]):
                yield f"{id}/{page.name} has to end with {catalogue['notice']!r} as long as nobody is in read_by"
        for id in taken.keys() - self.trees["nodeDefs"].keys():
            yield f"left over: the page of {id}, which is no node"

    def write(self) -> None:
        """Write what ComfyUI reads."""
        for name, text in self.files().items():
            path = self.folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")

    def take(self) -> None:
        """Note of every translated page which English page it is a translation of: the one that is there now."""
        for code, catalogue in self.catalogues.items():
            pages = [id for id in self.trees["nodeDefs"] if (self.pages / id / f"{code}.md").is_file()]
            catalogue["pages"] = {id: fingerprint(self.pages / f"{id}.md") for id in pages}
            (self.folder / f"{code}.json").write_text(written(catalogue), encoding="utf-8")


def sockets_of(node: Tree) -> Tree:
    """The names of a node's inputs and outputs."""
    return {kind: {key: part["name"] for key, part in node[kind].items()} for kind in ("inputs", "outputs")}


def shape(page: str) -> list[str]:
    """Lists how the lines of a page begin that make up its form."""
    return [first for line in page.splitlines() if (first := line.partition(" ")[0][:3]) in LINES]


def difference(here: list[str], there: list[str]) -> str:
    """Says what one list has more often than the other; "" where they hold the same."""
    mine, theirs = collections.Counter(here), collections.Counter(there)
    return " ".join([*(f"+{item}" for item in mine - theirs), *(f"-{item}" for item in theirs - mine)])


def main(arguments: list[str]) -> int:
    """Entry point of `python -m lcm_lookahead.tools.locales`."""
    parser = argparse.ArgumentParser(prog="tools.locales", description="Checks the translations of the nodes' texts.")
    parser.add_argument("--write", action="store_true", help="write the folders locales/<code>/ anew")
    parser.add_argument("--take", action="store_true", help="note that the help pages are translated as they are now")
    chosen = parser.parse_args(arguments)
    with Host() as host:
        locales = Locales(host.object_info())
    if chosen.take:
        locales.take()
    if chosen.write:
        locales.write()
    faults = locales.faults()
    print("\n".join(faults) or f"{len(locales.texts)} texts are translated into {len(LANGUAGES)} languages.")
    if faults:
        say("Translate in locales/<code>.json, as locales/README.md says.")
    return 1 if faults else 0


if __name__ == "__main__":
    run_main(main)
