"""Between ComfyUI and the engine: model paths, memory, progress, pictures, outputs. With nodes/, all that imports ComfyUI."""
