"""Lookahead guidance: preview, loss, gradient, moved noise."""
