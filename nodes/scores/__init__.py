"""Scores of pictures that are drawn already: the person, the prompt, and which is best."""
