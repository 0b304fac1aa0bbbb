"""The lookahead losses: one file a loss."""
