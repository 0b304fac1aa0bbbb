"""A plugin of pytest: its process has neither insightface nor onnxruntime, as a fresh ComfyUI."""

import sys

NAMES = ("insightface", "onnxruntime")


class Without:
    """A finder of modules that does not find those: they are as if they had never been installed."""

    def __init__(self, finder):
        self._finder = finder

    def __getattr__(self, name):
        return getattr(self._finder, name)

    def find_spec(self, name, path=None, target=None):
        """What the finder finds, and None for the blocked."""
        return None if name.partition(".")[0] in NAMES else self._finder.find_spec(name, path, target)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
