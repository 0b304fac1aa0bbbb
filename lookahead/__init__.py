"""The method: pure functions and small modules over torch, used by the nodes and by the trainer alike."""
