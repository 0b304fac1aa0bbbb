"""Another pack's wrappers around the model (model_function_wrapper), which change what a call sees of the batch."""

import torch


def row_by_row(apply_model, args):
    """It runs each row alone, and says of each that it is the whole batch."""
    c, rows = args["c"], range(len(args["input"]))
    alone = [{k: v[n : n + 1] if isinstance(v, torch.Tensor) else v for k, v in c.items()} for n in rows]
    return torch.cat([apply_model(args["input"][n : n + 1], args["timestep"][n : n + 1], **alone[n]) for n in rows])


def in_tiles(apply_model, args):
    """It runs each half of the picture alone."""
    return torch.cat([apply_model(t, args["timestep"], **args["c"]) for t in args["input"].chunk(2, dim=-1)], dim=-1)


def in_one_batch(apply_model, args):
    """It runs two halves of the picture in one batch, tile after tile, as MultiDiffusion does."""
    tiles = torch.cat(args["input"].chunk(2, dim=-1))
    c = {k: torch.cat([v, v]) if isinstance(v, torch.Tensor) else v for k, v in args["c"].items()}
    return torch.cat(apply_model(tiles, args["timestep"].repeat(2), **c).chunk(2), dim=-1)
