"""A host extension for every host that is started here: no nodes, only time.

ComfyUI lets Python collect garbage after every prompt, at most once in ten seconds, and each time it goes through all
that was imported, a third of a second long. From here on it looks only at what came later.
"""

import gc

NODE_CLASS_MAPPINGS: dict = {}

gc.freeze()
gc.enable()
