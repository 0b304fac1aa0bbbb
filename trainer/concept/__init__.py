"""Concept encoders after DATE (arXiv 2307.06925), the second recipe of the training loop. All constants are ours."""
