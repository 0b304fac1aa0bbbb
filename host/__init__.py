"""A real ComfyUI: fetched, started, driven over its API, looked at in its page."""
