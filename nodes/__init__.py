"""The nodes: everything that knows ComfyUI. Imported only by the host, through `comfy_entrypoint`."""
