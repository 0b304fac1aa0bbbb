"""Frozen networks and formulas that look at images: faces, recognisers, CLIP, perceptual distances."""
