"""What a build of the mini world reports of itself."""
