"""Look at a video: decode its frames, and lay them out on one labelled picture.

python scripts/contact_sheet.py VIDEO [PICTURE.png]
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import av
from PIL import Image, ImageDraw

LABEL_HEIGHT = 14
GAP = 4


@dataclass(frozen=True)
class Video:
    """A decoded video: its frames, and what its file says about it."""

    frames: list[Image.Image]
    width: int
    height: int
    fps: float
    codec: str
    tags: dict[str, str]


def read_video(file: Path) -> Video:
    """Decode every frame of a video file's first video stream."""
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_image() for frame in container.decode(stream)]
        rate = float(stream.average_rate or 0)
        return Video(frames, stream.width, stream.height, rate, stream.codec_context.name, dict(container.metadata))


def contact_sheet(frames: list[Image.Image], *, columns: int = 0, frame_width: int = 192) -> Image.Image:
    """All frames in reading order, each under its number."""
    columns = columns or min(len(frames), max(1, round(math.sqrt(len(frames) * 1.2))))
    rows = math.ceil(len(frames) / columns)
    frame_height = round(frame_width * frames[0].height / frames[0].width)
    sheet = Image.new("RGB", (columns * (frame_width + GAP) + GAP, rows * (frame_height + LABEL_HEIGHT + GAP) + GAP), (24, 24, 24))
    draw = ImageDraw.Draw(sheet)
    for number, frame in enumerate(frames):
        x = GAP + number % columns * (frame_width + GAP)
        y = GAP + number // columns * (frame_height + LABEL_HEIGHT + GAP)
        draw.text((x, y), f"frame {number}", fill=(230, 230, 230))
        sheet.paste(frame.resize((frame_width, frame_height), Image.Resampling.BILINEAR), (x, y + LABEL_HEIGHT))
    return sheet


def main() -> None:
    file = Path(sys.argv[1])
    picture = Path(sys.argv[2]) if len(sys.argv) > 2 else file.with_suffix(".png")
    video = read_video(file)
    contact_sheet(video.frames).save(picture)
    print(f"{file}: {video.width} x {video.height}, {len(video.frames)} frames, {video.fps:g} fps, {video.codec}")
    print(f"{picture}: all frames")


if __name__ == "__main__":
    main()
