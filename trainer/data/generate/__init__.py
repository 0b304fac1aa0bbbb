"""Consistent people by generation: who they are, what is drawn of them, what is kept, and how it is written."""
