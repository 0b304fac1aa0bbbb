"""LCM-Lookahead for ComfyUI: the door of the host.

The host calls `comfy_entrypoint`. Nothing of ours is imported before that, so that this file can also be imported
where there is no ComfyUI (tests, the trainer, `pip install`).
"""

# Here alone, and not as `web` in pyproject.toml: the host would serve the folder twice, under both names, and the page
# would run its script twice.
WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Return the extension that holds all nodes of this pack (called once by ComfyUI).

    Raises RuntimeError, one sentence, where the host is too old for it.
    """
    from .nodes.versions import needs_a_newer_host

    with needs_a_newer_host():
        from .nodes.extension import LookaheadExtension

    return LookaheadExtension()
