"""The writer, checked by decoding what it wrote with PyAV."""

import os
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from wan_sharded.engine.video import pictures as pictures_module
from wan_sharded.engine.video import writer
from wan_sharded.engine.video.encoder import VideoEncoder
from wan_sharded.engine.video.writer import exact_frame_rate, export_to_video, write_video

# Luma weights of red and blue, from the standards themselves: the tests do not trust the library that converted.
BT709 = (0.2126, 0.0722)
BT601 = (0.299, 0.114)
PATCH = 32


def saturated() -> np.ndarray:
    """[1, 96, 128, 3] uint8: flat patches of the colours on which BT.709 and BT.601 differ most."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255)]
    colours += [(0, 0, 0), (255, 255, 255), (128, 128, 128), (200, 30, 90), (20, 160, 60), (250, 128, 10)]
    return np.array(colours, dtype=np.uint8).reshape(1, 3, 4, 3).repeat(PATCH, 1).repeat(PATCH, 2)


def decoded_rgb(path: Path, weights: tuple[float, float]) -> np.ndarray:
    """All frames in RGB 0..255, [T, H, W, 3], from their planes by the standard's formula (limited range)."""
    with av.open(str(path)) as container:
        width, height = container.streams.video[0].width, container.streams.video[0].height
        planes = np.stack([frame.to_ndarray(format="yuv420p").ravel() for frame in container.decode(video=0)]).astype(float)
    luma, blue_difference, red_difference = np.split(planes, [height * width, height * width * 5 // 4], axis=1)
    luma = (luma.reshape(-1, height, width) - 16) / 219
    blue_difference, red_difference = (
        (plane.reshape(-1, height // 2, width // 2).repeat(2, 1).repeat(2, 2) - 128) / 224 for plane in (blue_difference, red_difference)
    )
    red_weight, blue_weight = weights
    red = luma + 2 * (1 - red_weight) * red_difference
    blue = luma + 2 * (1 - blue_weight) * blue_difference
    green = (luma - red_weight * red - blue_weight * blue) / (1 - red_weight - blue_weight)
    return np.stack([red, green, blue], axis=-1) * 255


def mean_errors(path: Path, frames: torch.Tensor) -> np.ndarray:
    """Mean absolute error of each frame in steps of 255, [T]. The gradient's own halved chroma makes about 1.6 of it."""
    return np.abs(decoded_rgb(path, BT709) - frames.numpy() * 255).mean(axis=(1, 2, 3))


def patch_error(path: Path, weights: tuple[float, float]) -> float:
    """Largest error, in steps of 255, at the middle of the :func:`saturated` patches."""
    middle = slice(PATCH // 2, None, PATCH)
    return float(np.abs(decoded_rgb(path, weights)[0, middle, middle] - saturated()[0, middle, middle]).max())


def count_frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


# What is in the file


def test_stream_is_what_was_asked_for(frames, tmp_path):
    path = write_video(frames, tmp_path / "a.mp4", fps=16)
    assert path == tmp_path / "a.mp4"
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert (stream.width, stream.height, stream.pix_fmt) == (64, 48, "yuv420p")
        assert stream.average_rate == 16
        assert stream.duration * stream.time_base == Fraction(12, 16)
        assert not container.streams.audio
        assert [frame.pts * frame.time_base for frame in container.decode(video=0)] == [Fraction(i, 16) for i in range(12)]
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_pixels_come_back(frames, tmp_path):
    # The frames differ from their neighbours by 7: order and number are checked with the pixels.
    errors = mean_errors(write_video(frames, tmp_path / "a.mp4", fps=16, quality=10), frames)
    assert errors.shape == (12,) and errors.max() < 2.5


def test_index_comes_before_the_pictures(frames, tmp_path):
    data = write_video(frames, tmp_path / "a.mp4", fps=16).read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


# Colours


def test_colours_are_tagged_bt709_limited(frames, tmp_path):
    path = write_video(frames, tmp_path / "a.mp4", fps=16)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.color_primaries, context.color_trc, context.colorspace, context.color_range) == (1, 1, 1, 1)
        assert int(next(container.decode(video=0)).colorspace) == 1
    # In the container too, where browsers look: a "colr" box, kind "nclx", primaries, transfer, matrix, full range off.
    assert b"colrnclx" + bytes([0, 1, 0, 1, 0, 1, 0]) in path.read_bytes()


def test_saturated_colours_are_bt709(tmp_path):
    path = write_video(saturated(), tmp_path / "a.mp4", fps=16, quality=1)
    assert patch_error(path, BT709) < 4
    assert patch_error(path, BT601) > 30


def test_the_colour_test_would_catch_bt601(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures_module, "Colorspace", SimpleNamespace(ITU709=pictures_module.Colorspace.ITU601))
    path = write_video(saturated(), tmp_path / "a.mp4", fps=16, quality=1)
    assert patch_error(path, BT709) > 30
    assert patch_error(path, BT601) < 4


# Forms of input


def test_every_form_of_frames_gives_the_same_video(frames, tmp_path, monkeypatch):
    write = VideoEncoder.write
    rounded = (frames * 255).round() / 255  # what an 8-bit picture can hold
    bytes_ = (frames * 255).round().to(torch.uint8)
    forms = {
        "tensor": rounded,
        "array": rounded.numpy(),
        "double": rounded.double().numpy(),
        "bytes": bytes_.numpy(),
        "byte tensor": bytes_,
        "pil": [Image.fromarray(frame) for frame in bytes_.numpy()],
        "generator": (frame for frame in rounded),
        "arrays": list(rounded.numpy()),
        "rgba": torch.cat([rounded, torch.zeros_like(rounded[..., :1])], dim=-1),
        "rgba pil": [Image.fromarray(frame).convert("RGBA") for frame in bytes_.numpy()],
        "backwards twice": rounded.numpy()[::-1].copy()[::-1],
        "outside 0..1": torch.where(rounded == 1, 1.3, torch.where(rounded == 0, -0.2, rounded)),
        "inference mode": None,
    }
    with torch.inference_mode():
        forms["inference mode"] = rounded.clone()
    # Compared as they enter the encoder: x264 does not give the same bytes twice on CPUs with AVX-512.
    seen = []
    monkeypatch.setattr(VideoEncoder, "write", lambda self, rgb: (seen.append(rgb), write(self, rgb)))
    for name, form in forms.items():
        seen.clear()
        assert count_frames(write_video(form, tmp_path / "a.mp4", fps=16)) == 12
        assert np.array_equal(np.stack(seen), bytes_), name


def test_half_precision_is_rounded_in_float32(frames, tmp_path):
    assert mean_errors(write_video(frames.half(), tmp_path / "a.mp4", fps=16, quality=10), frames).max() < 2.5


@pytest.mark.parametrize(("height", "width"), [(47, 64), (48, 63), (47, 63), (1, 1), (3, 2)])
def test_odd_sizes_are_padded_with_the_edge(height, width, tmp_path, caplog):
    frames = torch.rand(1, 1, 1, 3).expand(2, height, width, 3).clone()
    frames[:, -1:], frames[:, :, -1:] = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    path = write_video(frames, tmp_path / "a.mp4", fps=16, quality=1)
    rgb = decoded_rgb(path, BT709)[0]
    assert rgb.shape[:2] == (height + height % 2, width + width % 2)
    assert f"{width}×{height}" in caplog.text
    assert np.abs(rgb[-1, -1] - (0, 255, 0)).max() < 8


def test_even_sizes_are_not_padded(frames, tmp_path, caplog):
    write_video(frames, tmp_path / "a.mp4", fps=16)
    assert caplog.text == ""


def test_export_to_video_takes_what_diffusers_takes(frames, tmp_path):
    path = export_to_video([Image.fromarray(frame) for frame in (frames * 255).byte().numpy()], str(tmp_path / "a.mp4"), fps=8)
    assert path == str(tmp_path / "a.mp4")
    with av.open(path) as container:
        assert container.streams.video[0].average_rate == 8
    with av.open(export_to_video(frames, tmp_path / "b.mp4")) as container:
        assert container.streams.video[0].average_rate == 16


# Frame rate


@pytest.mark.parametrize(
    ("fps", "rate"),
    [
        (16, Fraction(16)),
        (16.0, Fraction(16)),
        (23.976, Fraction(24000, 1001)),
        (23.98, Fraction(24000, 1001)),
        (29.97, Fraction(30000, 1001)),
        (59.94, Fraction(60000, 1001)),
        (119.88, Fraction(120000, 1001)),
        (24.0, Fraction(24)),
        (12.5, Fraction(25, 2)),
        (0.01, Fraction(1, 100)),
        (16.67, Fraction(1667, 100)),
        (1000, Fraction(1000)),
        (Fraction(24000, 1001), Fraction(24000, 1001)),
        (np.float32(16), Fraction(16)),
    ],
)
def test_frame_rate_is_exact(fps, rate, frames, tmp_path):
    assert exact_frame_rate(fps) == rate
    path = write_video(frames, tmp_path / "a.mp4", fps=fps)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == rate
        assert stream.frames == 12
        assert abs(stream.duration * stream.time_base - 12 / rate) < Fraction(1, 1000)  # mp4 keeps a movie's length in milliseconds


# Metadata


def test_metadata_round_trip(frames, tmp_path):
    metadata = {"workflow": '{"title": "größer, 漢字 \\" = ; # 😀"}', "prompt": "x" * 300_000, "an odd name": ""}
    path = write_video(frames, tmp_path / "a.mp4", fps=16, metadata=metadata)
    with av.open(str(path)) as container:
        assert metadata.items() <= container.metadata.items()


# The file


def test_an_older_file_is_replaced(frames, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"older")
    assert count_frames(write_video(frames, tmp_path / "a.mp4", fps=16)) == 12


def test_on_frame_counts(frames, tmp_path):
    seen = []
    write_video(frames, tmp_path / "a.mp4", fps=16, on_frame=lambda *args: seen.append(args))
    assert seen == [(i, 12) for i in range(1, 13)]
    seen.clear()
    write_video(iter(frames), tmp_path / "a.mp4", fps=16, on_frame=lambda *args: seen.append(args))
    assert seen == [(i, None) for i in range(1, 13)]


def test_names_that_ffmpeg_would_misread(frames, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["%03d.mp4", "größer 漢字 😀.mp4", "-y.mp4"] + ([] if os.name == "nt" else ["file:a.mp4", "http:b.mp4", "a|b?.mp4"])
    for name in names:
        assert count_frames(write_video(frames, name, fps=16)) == 12
    assert sorted(os.listdir(tmp_path)) == sorted(names)


@pytest.mark.parametrize(("windows", "held", "works"), [(True, 3, True), (True, 10_000, False), (False, 1, False)])
def test_a_finished_file_that_a_scanner_holds(windows, held, works):
    """On Windows for a moment; elsewhere the permission is missing for good."""
    asked = []

    def rename():
        asked.append(1)
        if len(asked) <= held:
            raise PermissionError(13, "[WinError 32]")

    if works:
        writer._patiently(rename, windows=windows)
        assert len(asked) == held + 1
    else:
        with pytest.raises(PermissionError):
            writer._patiently(rename, windows=windows, seconds=0.3)
        assert len(asked) >= (2 if windows else 1)
