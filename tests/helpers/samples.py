"""Verdicts over samples. One drawn picture's fate hangs on how the processor rounds; the mean of several does not."""

import torch


def standard_errors(gains: torch.Tensor) -> float:
    """The mean of paired gains [n], in standard errors of that mean: how clearly they lie above 0."""
    gains = gains.double()
    return float(gains.mean() / (gains.std() / len(gains) ** 0.5))
