"""Pure planning: values in, plans out. Knows no GPU, no file and no ComfyUI; tested for any imagined machine."""
