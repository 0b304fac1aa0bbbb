"""The mini world: a tiny SDXL family trained on procedurally drawn faces whose identity is known exactly."""
