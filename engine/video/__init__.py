"""Frames to a video file: formats as data, pixels, sound, and the writer that streams them through PyAV."""
