"""Noise guides (HyperNoise, arXiv 2508.09968, for likeness), the third recipe of the training loop."""
