"""Paint the example workflows' input pictures: a lake at sunset with a sailing boat, and the same a moment later.

    python scripts/example_photo.py [FOLDER]

They are computed, so they belong to this project and are free of anyone else's rights. 832 x 480, the default size of the sampler.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

WIDTH, HEIGHT = 832, 480
HORIZON = 268
SCALE = 2  # painted larger, then reduced, for smooth edges
FOLDER = Path(__file__).resolve().parent.parent / "example_workflows" / "input"

Array = np.ndarray
Point = tuple[float, float]

# Name of the picture: where the sun stands, and how far the boat has sailed, in pixels.
MOMENTS: dict[str, tuple[Point, int]] = {
    "wan_sharded_example.jpg": ((560, 215), 0),
    "wan_sharded_example_last.jpg": ((566, 232), 170),
}


def smooth_noise(shape: tuple[int, int], cells: tuple[int, int], random: np.random.Generator, octaves: int = 5) -> Array:
    """Clouds of values around 0.5: several layers of random grids, each finer and fainter than the one before."""
    height, width = shape
    total = np.zeros(shape)
    for octave in range(octaves):
        grid = random.random((cells[0] * 2**octave + 1, cells[1] * 2**octave + 1))
        layer = Image.fromarray((grid * 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(layer) / 255.0 / 2**octave
    return total / total.mean() * 0.5


def gradient(stops: list[tuple[float, tuple[int, int, int]]], rows: int) -> Array:
    """Colours from top to bottom, ``[rows, 1, 3]`` in 0..1."""
    positions = np.linspace(0.0, 1.0, rows)
    places, colours = [place for place, _ in stops], np.array([colour for _, colour in stops]) / 255.0
    return np.stack([np.interp(positions, places, colours[:, channel]) for channel in range(3)], axis=-1)[:, None, :]


def paint_sky(sun: Point, random: np.random.Generator) -> Array:
    """Sky of the evening with the sun, its glow and lit clouds, ``[HORIZON, WIDTH, 3]``."""
    rows, columns = np.mgrid[0:HORIZON, 0:WIDTH]
    sky = gradient([(0.0, (58, 92, 150)), (0.45, (128, 146, 182)), (0.75, (236, 176, 130)), (1.0, (255, 206, 138))], HORIZON)
    sky = np.repeat(sky, WIDTH, axis=1)
    distance = np.hypot(columns - sun[0], (rows - sun[1]) * 1.15)[..., None]
    sky += np.array([0.55, 0.34, 0.10]) * np.exp(-distance / 130.0) + np.array([0.25, 0.2, 0.12]) * np.exp(-distance / 40.0)

    density = np.clip((smooth_noise((HORIZON, WIDTH), (5, 4), random, 6) - 0.5) * 4.2, 0, 1)[..., None]
    density *= np.linspace(1.0, 0.35, HORIZON)[:, None, None]
    lit = np.clip(1.15 - distance / 520.0, 0.25, 1.0)
    cloud = np.array([0.93, 0.72, 0.62]) * lit + np.array([0.30, 0.34, 0.46]) * (1 - lit)
    sky = sky * (1 - 0.75 * density) + cloud * 0.75 * density
    disc = np.clip(24.5 - np.hypot(columns - sun[0], rows - sun[1]), 0, 1)[..., None]
    return np.clip(sky * (1 - disc) + np.array([1.0, 1.0, 0.93]) * disc, 0, 1)


def paint_hills(picture: Array, sun: Point, random: np.random.Generator) -> None:
    """Three ridges in front of the sky, the nearer the darker, in place."""
    columns = np.arange(WIDTH)
    layers = [(62, (146, 118, 134), 1.0), (44, (92, 86, 104), 2.1), (24, (44, 56, 58), 3.7)]
    for height, colour, phase in layers:
        ridge = height * (0.55 + 0.25 * np.sin(columns / 118.0 + phase) + 0.12 * np.sin(columns / 43.0 + 2.3 * phase))
        ridge += 0.30 * height * (smooth_noise((1, WIDTH), (1, 8), random, 6)[0] - 0.5)
        texture = 0.85 + 0.3 * smooth_noise((HORIZON, WIDTH), (24, 60), random, 4)
        for column in columns:
            top = int(HORIZON - max(ridge[column], 2))
            warm = np.exp(-abs(column - sun[0]) / 190.0)
            base = np.array(colour) / 255.0 + np.array([0.22, 0.11, 0.02]) * warm * (height / 62)
            picture[top:HORIZON, column] = base * texture[top:HORIZON, column, None]


def paint_water(land: Array, sun: Point, random: np.random.Generator) -> Array:
    """The lake: the land mirrored, broken up by ripples that grow towards the viewer, ``[HEIGHT - HORIZON, WIDTH, 3]``."""
    rows_below = HEIGHT - HORIZON
    depth = np.linspace(0.0, 1.0, rows_below)[:, None]
    rows, columns = np.mgrid[0:rows_below, 0:WIDTH]
    ripples = np.zeros((rows_below, WIDTH))
    for scale in (1.0, 0.55, 0.3):
        phase = 260.0 * scale / (0.045 + depth)
        ripples += np.sin(phase + 9.0 * smooth_noise((rows_below, WIDTH), (10, 7), random, 4)) * scale
    source_rows = np.clip(HORIZON - 2 - rows * 1.2 + ripples * (2 + 16 * depth), 0, HORIZON - 1).astype(int)
    source_columns = np.clip(columns + ripples * (1 + 5 * depth), 0, WIDTH - 1).astype(int)
    water = land[source_rows, source_columns] * np.array([0.72, 0.76, 0.82]) * (1 - 0.35 * depth[..., None])
    water += np.array([0.02, 0.05, 0.08]) + 0.035 * ripples[..., None] * (0.3 + depth[..., None])

    path = np.exp(-(((columns - sun[0]) / (16 + 95 * depth)) ** 2)) * np.clip(0.15 + ripples, 0, 1.4)
    return np.clip(water + path[..., None] * np.array([0.60, 0.42, 0.20]), 0, 1)


def paint_boat(picture: Image.Image, sailed: int) -> Image.Image:
    """A small sailing boat, its reflection, and reeds at the shore."""
    size = (WIDTH * SCALE, HEIGHT * SCALE)

    def scaled(points: list[Point]) -> list[Point]:
        return [((x + sailed) * SCALE, y * SCALE) for x, y in points]

    layer = Image.new("RGBA", size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    draw.polygon(scaled([(262, 318), (266, 176), (332, 309)]), fill=(238, 222, 200, 255))
    draw.polygon(scaled([(266, 176), (288, 222), (300, 309), (332, 309)]), fill=(255, 240, 214, 255))
    draw.polygon(scaled([(256, 312), (258, 196), (216, 308)]), fill=(206, 188, 178, 255))
    draw.line(scaled([(260, 170), (260, 322)]), fill=(58, 40, 34, 255), width=3 * SCALE)
    draw.polygon(scaled([(204, 318), (342, 316), (322, 340), (226, 341)]), fill=(86, 44, 36, 255))
    draw.polygon(scaled([(204, 318), (342, 316), (339, 321), (207, 323)]), fill=(226, 206, 178, 255))
    draw.ellipse(scaled([(296, 296), (308, 308)]), fill=(70, 48, 44, 255))
    draw.polygon(scaled([(293, 318), (296, 307), (309, 307), (313, 317)]), fill=(150, 52, 44, 255))

    mirrored = np.asarray(layer.transpose(Image.Transpose.FLIP_TOP_BOTTOM)).copy()
    shift = int((2 * 339 - HEIGHT) * SCALE)
    mirrored = np.roll(mirrored, shift, axis=0)
    for row in range(340 * SCALE, size[1]):
        sway = 3.5 * SCALE * np.sin(row / (2.2 * SCALE)) + 2.0 * SCALE * np.sin(row / (0.9 * SCALE) + 1.0)
        mirrored[row] = np.roll(mirrored[row], int(sway * min(1.0, (row / SCALE - 338) / 40)), axis=0)
    mirrored[: 340 * SCALE] = 0
    mirrored[..., 3] = mirrored[..., 3] * 0.42
    reflection = Image.fromarray(mirrored).filter(ImageFilter.GaussianBlur(1.6 * SCALE))

    large = picture.resize(size, Image.Resampling.BICUBIC).convert("RGBA")
    large = Image.alpha_composite(Image.alpha_composite(large, reflection), layer)
    paint_reeds(large)
    return large.convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def paint_reeds(picture: Image.Image) -> None:
    """Dark blades of grass at the lower corners, in place."""
    random = np.random.default_rng(7)
    draw = ImageDraw.Draw(picture)
    for corner, count in ((-10, 90), (WIDTH - 170, 130)):
        for _ in range(count):
            x = corner + random.random() * 180
            length = 40 + random.random() * 95 * (1 - abs(x - corner - 90) / 140)
            lean = (random.random() - 0.5) * 50
            curve = [(x + lean * t**2, HEIGHT - length * t) for t in np.linspace(0, 1, 9)]
            shade = int(18 + 26 * random.random())
            draw.line(
                [(px * SCALE, py * SCALE) for px, py in curve],
                fill=(shade + 8, shade + 10, shade, 255),
                width=int(SCALE * (1 + random.random())),
            )


def paint(sun: Point, sailed: int) -> Image.Image:
    """The whole picture."""
    random = np.random.default_rng(22)
    land = paint_sky(sun, random)
    paint_hills(land, sun, random)
    whole = np.concatenate([land, paint_water(land, sun, random)])
    whole = np.asarray(paint_boat(Image.fromarray((whole * 255).astype(np.uint8)), sailed)) / 255.0

    rows, columns = np.mgrid[-1 : 1 : HEIGHT * 1j, -1 : 1 : WIDTH * 1j]
    whole = whole * (1 - 0.22 * (rows**2 + columns**2) / 2)[..., None]
    whole = whole + random.normal(0, 0.010, whole.shape)  # the grain of a camera
    return Image.fromarray((np.clip(whole, 0, 1) * 255).astype(np.uint8))


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name, (sun, sailed) in MOMENTS.items():
        paint(sun, sailed).save(folder / name, quality=88, optimize=True)
        print(f"{folder / name}: {(folder / name).stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
