"""Studies of the method on the mini world, drawn by the real host."""
