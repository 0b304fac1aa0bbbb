"""What `pip install` makes of the sources: a package that has all it reads, wherever it lies."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pathspec
import pytest
from lcm_lookahead.sdxl.configs import find_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
NOT_READ = ("README.md",)  # by the package; beside its modules for people


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def install(names, tmp_path) -> Path:
    """The folder in which pip has unpacked the wheel of an archive with these files, which is gone again."""
    archive, site = tmp_path / "archive", tmp_path / "site"
    for name in names:
        (archive / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, archive / name)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(archive)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    shutil.rmtree(archive)
    return site


def test_every_file_of_a_package_goes_along():
    """Files beside modules are read at run time: weights, templates, configurations, schemas."""
    folders = {
        package.removeprefix("lcm_lookahead").lstrip(".").replace(".", "/") for package in SETUPTOOLS["packages"]
    }
    taken = set()
    for package, patterns in SETUPTOOLS["package-data"].items():
        folder = ROOT / package.removeprefix("lcm_lookahead").lstrip(".").replace(".", "/")
        taken |= {path.relative_to(ROOT).as_posix() for pattern in patterns for path in folder.glob(pattern)}
    rooms = {folder.split("/")[0] for folder in folders} - {""}
    left = [
        name
        for name in tracked()
        if name.split("/")[0] in rooms
        and not (name.endswith(".py") and name.rpartition("/")[0] in folders)
        and name not in taken
        and name.rpartition("/")[2] not in NOT_READ
    ]
    assert not left


@pytest.mark.slow
def test_the_published_archive_of_the_pack_alone_installs_too(tmp_path):
    ignore = pathspec.GitIgnoreSpec.from_lines((ROOT / ".comfyignore").read_text().splitlines())
    site = install([name for name in tracked() if not ignore.match_file(name)], tmp_path)
    assert (site / "lcm_lookahead/nodes/extension.py").is_file() and not (site / "lcm_lookahead/trainer").exists()
    assert not list(site.glob("*.dist-info/entry_points.txt"))  # no command, since cli/ is not in it
    code = "from lcm_lookahead.lookahead.files import encoder_file, convert"
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(site)}, cwd=tmp_path, check=True)


@pytest.mark.slow
def test_an_installed_package_trains_converts_and_draws_by_the_readme_s_lines(tmp_path):
    """From an archive of the sources, without the checkout, in another folder."""
    site = install(tracked(), tmp_path)
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "PYTHONPATH": str(site),
        "COMFYUI_DIR": str(find_tokenizer().parents[1]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }

    def python(*arguments, cwd=tmp_path):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    for name in ("det_mini.onnx", "rec_mini.onnx", "LICENSE"):  # the mini world's face pack goes along
        assert (site / "lcm_lookahead/mini/weights/insightface/models/mini" / name).is_file()
    where = python("-c", "import lcm_lookahead; print(lcm_lookahead.__file__)")
    assert where.startswith(str(site))
    command = "from lcm_lookahead.cli.main import main; import sys; main(sys.argv[1:])"
    few = ["steps=1", "batch=2", "data.people=4", "validate_every=0", "out=run", "precision=fp32"]
    assert "Written: run/mini_encoder.safetensors" in python("-c", command, "train", "mini.yaml", *few)
    python("-c", command, "train", "trainer/configs/sdxl_24gb.yaml", "--dry-run")  # the documented name
    python("-c", command, "convert", "run/mini_encoder.safetensors", "adapter.safetensors", "--to", "ip-adapter")
    python("-c", command, "mini", "example", "try")
    (lines,) = re.findall(r"(?m)^(?:    (?:from|pipe).*\n){5}", (ROOT / "README.md").read_text(encoding="utf-8"))
    python("-c", re.sub("(?m)^    ", "", lines), cwd=tmp_path / "try")
    assert (tmp_path / "try/drawn.png").stat().st_size > 1000
    (commands,) = site.glob("*.dist-info/entry_points.txt")
    assert "lookahead = lcm_lookahead.cli.main:main" in commands.read_text()
    packages = {path.relative_to(site).parts[0] for path in site.rglob("*") if path.is_file()}
    assert {name.split("-")[0] for name in packages} == {"lcm_lookahead"}  # no cache, nothing written beside it
    assert not list((site / "lcm_lookahead").glob(".*"))
