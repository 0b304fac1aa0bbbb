"""The nodes of the lookahead losses."""
