"""No collection of garbage while ComfyUI imports: it makes nothing but what stays."""

import gc

gc.disable()
