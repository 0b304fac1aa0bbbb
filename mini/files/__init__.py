"""The mini world's files in the public formats: written, recorded, read back."""
