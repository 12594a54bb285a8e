"""Lets the bridge's tests import ComfyUI's modules, if `make test` has put a ComfyUI there.

At the end of the path, because ComfyUI has top-level modules with everyday names (``utils``, ``nodes``, ``server``).
"""

import sys

from setup_env import comfyui_folder

if (comfyui_folder() / "main.py").is_file() and str(comfyui_folder()) not in sys.path:
    sys.path.append(str(comfyui_folder()))
