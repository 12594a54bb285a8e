"""An animation that passes for a picture: ComfyUI's preview messages carry pictures only, and a PNG may be animated (APNG)."""

import io
from collections.abc import Sequence

from PIL import Image


class MovingPicture(Image.Image):
    """A picture that saves itself as an animated PNG.

    To whoever looks at it, resizes it or saves it as anything else, it is its first frame.

    Args:
        frames: of one size.
        durations_ms: how long each is shown.
    """

    def __init__(self, frames: Sequence[Image.Image], durations_ms: Sequence[int]):
        super().__init__()
        self.__dict__.update(frames[0].__dict__)
        content = io.BytesIO()
        frames[0].save(content, "PNG", save_all=True, append_images=frames[1:], duration=list(durations_ms), loop=0)
        self._png = content.getvalue()

    def save(self, fp, format=None, **params) -> None:
        """As any picture, but the whole animation where it becomes a PNG. ``fp`` is then something to write bytes to."""
        if format == "PNG":
            fp.write(self._png)
        else:
            super().save(fp, format, **params)
