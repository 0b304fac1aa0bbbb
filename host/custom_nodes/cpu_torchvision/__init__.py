"""A host extension for tests and the demo: no nodes, only the cure in prestartup_script.py."""

NODE_CLASS_MAPPINGS: dict = {}
