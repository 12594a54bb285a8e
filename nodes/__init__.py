"""The ComfyUI nodes: V3 schemas, one call each into the bridge, nothing else."""
