"""The `lookahead` command, which alone puts the rooms together."""
