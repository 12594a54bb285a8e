"""ComfyUI-Wan-Sharded: one Wan 2.2 video made by all of a person's GPUs.

ComfyUI imports this file under a mangled path name, finds :func:`comfy_entrypoint` and serves ``WEB_DIRECTORY``.
Nothing else is imported here, so that ``pip`` users and the tests can import the engine without ComfyUI.
"""

WEB_DIRECTORY = "./js"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


async def comfy_entrypoint():
    """Return the pack's ``ComfyExtension``; ComfyUI awaits this once at start.

    Raises:
        Exception: whatever kept the pack from importing, after logging its traceback (ComfyUI itself logs one line).
    """
    import logging

    try:
        from .bridge import routes
        from .nodes.extension import WanShardedExtension

        routes.register()
        return WanShardedExtension()
    except Exception:
        logging.getLogger(__name__).exception("ComfyUI-Wan-Sharded could not be loaded")
        raise
