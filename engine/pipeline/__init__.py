"""From prompt and photo to frames, around diffusers' own Wan pipeline."""
