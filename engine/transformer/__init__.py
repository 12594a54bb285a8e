"""The arithmetic of a Wan block, written for memory. Knows no devices, no weights' homes, no pipeline."""
