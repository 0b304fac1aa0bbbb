"""Concepts from one picture, after DATE (arXiv 2307.06925): nodes, and the effect that they put on a MODEL."""
