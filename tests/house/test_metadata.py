"""pyproject.toml says what the registries and the tools need, and says it in valid values."""

import ast
import importlib.metadata
import re
import runpy
import tomllib
import urllib.parse
from pathlib import Path

import pytest
from lcm_lookahead.host.fetch import VERSIONS
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, COMFY, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["comfy"], PYPROJECT["tool"]["setuptools"]


def requirement_lines(name: str) -> list[str]:
    lines = ((ROOT / name).read_text(encoding="utf-8")).splitlines()
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


def test_the_registry_finds_every_field_it_reads():
    assert PROJECT["name"] == "lcm-lookahead"
    assert len(Version(PROJECT["version"]).release) == 3
    assert PROJECT["description"]
    assert PROJECT["license"] == {"file": "LICENSE"}
    assert PROJECT["urls"]["Repository"].startswith("https://github.com/")
    assert COMFY["PublisherId"] and COMFY["DisplayName"]
    assert {"Icon", "Banner", "includes"} <= set(COMFY)
    assert PROJECT["dynamic"] == ["dependencies", "readme", "scripts"]
    assert SETUPTOOLS["dynamic"]["dependencies"] == {"file": ["requirements.txt"]}


def test_the_repository_s_address_stands_in_one_field_and_what_needs_it_begins_with_it():
    address = PROJECT["urls"]["Repository"]
    assert all(url.startswith(address) for url in PROJECT["urls"].values())
    owner = re.fullmatch(r"https://github.com/([\w-]+)/[\w.-]+", address)[1]
    assert f"repository_owner == '{owner}'" in (ROOT / ".github/workflows/publish.yml").read_text()
    host = "/".join(address.split("/")[:4])
    for path in sorted((ROOT / "workflows").glob("*.json")):
        found = set(re.findall(rf"{host}/[\w.-]+", path.read_text(encoding="utf-8")))
        assert found == {address}, path.name
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(rf"{host}/[\w.-]+", readme)) == {address} and f"git clone {address} " in readme


def test_on_a_package_index_every_link_and_picture_of_the_readme_is_a_whole_address():
    build = runpy.run_path(str(ROOT / "setup.py"))
    text, address = build["readme"](), PROJECT["urls"]["Repository"]
    targets = re.findall(r"\]\(([^)\s]+)", text)
    assert len(targets) > 40 and all(target.startswith(("https://", "#")) for target in targets)
    ours = [target.removeprefix(address) for target in targets if target.startswith(address)]
    assert "/raw/HEAD/docs/demo.jpg" in ours and "/blob/HEAD/LICENSE" in ours
    for target in ours:
        kind, path = re.fullmatch(r"/(raw|blob)/HEAD/([^#]+).*", target).groups()
        assert (ROOT / urllib.parse.unquote(path)).exists() and (kind == "raw") == (
            Path(path).suffix in (".png", ".jpg", ".gif", ".webp")
        )
    assert "<img" not in text and "src=" not in text


def test_the_licence_is_the_whole_apache_2_text():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION" in text
    assert "APPENDIX: How to apply the Apache License to your work." in text


def test_the_supported_hosts_are_those_it_asks_for():
    wanted = SpecifierSet(COMFY["requires-comfyui"])
    oldest = min(VERSIONS, key=Version)
    assert all(Version(version) in wanted for version in VERSIONS)
    assert Version(oldest) == min(Version(spec.version) for spec in wanted)


def test_the_python_it_asks_for_is_the_one_the_setup_checks():
    from lcm_lookahead.tools.setup import OLDEST_PYTHON

    oldest = ".".join(map(str, OLDEST_PYTHON))
    wanted = SpecifierSet(PROJECT["requires-python"])
    assert oldest in wanted and f"{OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1] - 1}" not in wanted


def test_every_classifier_is_known_to_python_s_tools_and_to_the_comfy_registry():
    import trove_classifiers

    assert set(PROJECT["classifiers"]) <= trove_classifiers.classifiers
    accelerators = {c for c in PROJECT["classifiers"] if c.startswith("Environment :: ")}
    # The registry drops all when one is not of its list.
    known = {"GPU :: NVIDIA CUDA", "GPU :: AMD ROCm", "GPU :: Intel Arc", "GPU :: Apple Metal", "NPU :: Huawei Ascend"}
    assert accelerators and accelerators <= {f"Environment :: {name}" for name in known}
    systems = [c for c in PROJECT["classifiers"] if c.startswith("Operating System :: ")]
    assert systems


def test_the_pack_needs_nothing_beyond_what_comfyui_installs():
    installed_by_comfyui = {"torch", "numpy", "safetensors", "pillow", "transformers", "einops", "psutil", "tqdm"}
    needed = {Requirement(line).name.lower() for line in requirement_lines("requirements.txt")}
    assert needed <= installed_by_comfyui


@pytest.mark.parametrize("extra", ["faces", "losses", "trainer", "dev"])
def test_every_extra_is_a_list_of_valid_requirements(extra):
    requirements = [Requirement(line) for line in PROJECT["optional-dependencies"][extra]]
    assert requirements
    names = {r.name.lower() for r in requirements}
    assert not {"onnxruntime", "onnxruntime-gpu"} <= names, "the two onnxruntimes exclude each other"


def test_the_pins_satisfy_what_the_extras_ask_for():
    lines = requirement_lines("tools/pins.txt") + requirement_lines("tools/pins_alone.txt")
    pins = {Requirement(line).name.lower(): line.split("==")[1] for line in lines}
    for extra in ("faces", "losses", "trainer", "dev"):
        for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
            assert requirement.name.lower() in pins, f"{requirement} has no pin"
            assert Version(pins[requirement.name.lower()]) in requirement.specifier, requirement


def test_every_pin_is_exact_and_stands_once():
    lines = requirement_lines("tools/pins.txt") + requirement_lines("tools/pins_alone.txt")
    names = [Requirement(line).name.lower() for line in lines]
    assert all(line.count("==") == 1 for line in lines)
    assert len(names) == len(set(names))


def test_every_package_of_ours_is_listed_and_exists():
    listed = set(SETUPTOOLS["packages"])
    found = {"lcm_lookahead"}
    for part in ("lookahead", "nodes", "sdxl", "evaluation", "trainer", "mini", "host", "cli", "tools"):
        for init in (ROOT / part).rglob("__init__.py"):
            if not {"custom_nodes", "host_extension"} & set(init.parts):  # host extensions, loaded by the host alone
                found.add("lcm_lookahead." + ".".join(init.parent.relative_to(ROOT).parts))
    assert listed == found
    assert SETUPTOOLS["package-dir"] == {"lcm_lookahead": "."}


def test_the_command_it_installs_exists():
    (command,) = runpy.run_path(str(ROOT / "setup.py"))["commands"]()
    name, module, function = re.fullmatch(r"(\w+) = ([\w.]+):(\w+)", command).groups()
    assert name == "lookahead"
    path = ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
    functions = [n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)]
    assert function in functions


def test_the_package_is_installed_from_this_very_folder():
    import lcm_lookahead

    assert Path(lcm_lookahead.__file__).resolve().parent == ROOT
    assert importlib.metadata.version("lcm-lookahead") == PROJECT["version"]


def test_the_page_s_script_is_served_once_and_says_this_name_and_version():
    """A web folder that pyproject names as well would be served under both names, and its script run twice."""
    assert "web" not in COMFY and 'WEB_DIRECTORY = "./web"' in (ROOT / "__init__.py").read_text()
    registry = f'{{ cnr_id: "{PROJECT["name"]}", ver: "{PROJECT["version"]}" }}'
    assert registry in (ROOT / "web" / "lookahead.js").read_text()


def test_the_changelog_knows_this_version_or_what_is_unreleased():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{PROJECT['version']}]" in text or "## [Unreleased]" in text
