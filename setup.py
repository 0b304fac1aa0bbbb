"""Builds what is there: an archive of the pack alone (.comfyignore) lacks some rooms that pyproject.toml names."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class Build(build_py):
    """Takes the packages whose folders exist."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.packages = [name for name in self.packages if Path(self.get_package_dir(name)).is_dir()]


setup(cmdclass={"build_py": Build})
