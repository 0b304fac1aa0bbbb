"""Files as others write them."""

import torch


def halves(weights: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The nested dict of a stock IP-Adapter's .bin."""
    nested: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in weights.items():
        half, _, name = key.partition(".")
        nested[half][name] = value
    return nested
