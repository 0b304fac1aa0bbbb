"""Graphs in API format, put together by name: what the evaluations have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Graph(dict[str, Any]):
    """Nodes by name. A link is [name, number of the output]."""

    def add(self, name: str, class_type: str, **inputs: Any) -> list[Any]:
        """A node more, or the same again; the link of its first output."""
        self[name] = {"class_type": class_type, "inputs": inputs}
        return [name, 0]

    def pictures(self, files: Sequence[str]) -> list[Any]:
        """Files of the input folder, as one batch of pictures."""
        images = [self.add(f"image {file}", "LoadImage", image=file) for file in files]
        together = images[0]
        for number, image in enumerate(images[1:]):
            together = self.add(f"pictures {number}", "ImageBatch", image1=together, image2=image)
        return together
