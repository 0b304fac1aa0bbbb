"""Graphs in the API format of ComfyUI, put together by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: An output of a node: its name and the number of the output
Link = list[str | int]


class Graph(dict[str, dict[str, Any]]):
    """A graph holds nodes by name: class_type and inputs, of which each is a value or a Link."""

    def add(self, name: str, class_type: str, **inputs: Any) -> Link:
        """A node more, or the same again; the link of its first output. Raises ValueError for another of that name."""
        node = {"class_type": class_type, "inputs": inputs}
        if self.setdefault(name, node) != node:
            raise ValueError(f"the graph has another node {name!r} already: give this one a name of its own")
        return [name, 0]

    def pictures(self, files: Sequence[str]) -> Link:
        """Files of the input folder, as one batch of pictures."""
        images = [self.add(f"image {file}", "LoadImage", image=file) for file in files]
        together = images[0]
        for number, image in enumerate(images[1:], 2):
            name = f"pictures {' '.join(files[:number])}"
            together = self.add(name, "ImageBatch", image1=together, image2=image)
        return together
