"""fanal's nodes for ComfyUI; the README beside this file says how to install them."""

try:
    from fanal.adapters.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
except ModuleNotFoundError as error:
    if error.name != "fanal":
        raise
    raise ModuleNotFoundError("install fanal for ComfyUI's Python: python -m pip install fanal", name="fanal") from None

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
