"""The writer, checked by decoding what it wrote with PyAV."""

import os
import subprocess
import sys
import tempfile
import textwrap
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
import wan_sharded
from PIL import Image
from wan_sharded.engine.errors import Cancelled, ExportError, InvalidRequestError
from wan_sharded.engine.video import encoder as encoder_module
from wan_sharded.engine.video.encoder import VideoEncoder
from wan_sharded.engine.video.formats import DEFAULT_FORMAT, FORMATS
from wan_sharded.engine.video.writer import exact_frame_rate, export_to_video, write_video

# Luma weights of red and blue, from the standards themselves: the tests do not trust the library that converted.
BT709 = (0.2126, 0.0722)
BT601 = (0.299, 0.114)
PATCH = 32


@pytest.fixture
def frames() -> torch.Tensor:
    """[12, 48, 64, 3]: a gradient that moves, so that every frame differs."""
    x = torch.linspace(0, 1, 64)[None, None, :].expand(12, 48, 64)
    y = torch.linspace(0, 1, 48)[None, :, None].expand(12, 48, 64)
    t = torch.linspace(0, 1, 12)[:, None, None].expand(12, 48, 64)
    return torch.stack([x, y, t], dim=-1).contiguous()


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
    monkeypatch.setattr(encoder_module, "Colorspace", SimpleNamespace(ITU709=encoder_module.Colorspace.ITU601))
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
    for name, form in forms.items():
        seen = []
        # Compared before the encoder: x264's tree of macroblocks is not the same twice on CPUs with AVX-512.
        monkeypatch.setattr(VideoEncoder, "write", lambda self, rgb: (seen.append(rgb), write(self, rgb)))  # noqa: B023
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


# Sound


def clip(seconds: float, rate: int = 44_100, channels: int = 2) -> dict:
    """A clip that is silent but for one click at 0.5 s."""
    waveform = torch.zeros(1, channels, int(seconds * rate))
    waveform[..., rate // 2 : rate // 2 + 32] = 0.9
    return {"waveform": waveform, "sample_rate": rate}


def decoded_sound(path: Path) -> tuple[np.ndarray, int]:
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        decoded = list(container.decode(audio=0))
        assert decoded[0].pts == 0
        return np.concatenate([frame.to_ndarray() for frame in decoded], axis=1), stream.rate


@pytest.mark.parametrize(
    ("rate", "channels", "written_rate"),
    [(44_100, 2, 44_100), (48_000, 1, 48_000), (16_000, 1, 16_000), (22_050, 6, 22_050), (37_800, 2, 48_000), (192_000, 2, 48_000)],
)
def test_sound_is_in_step_and_ends_with_the_video(rate, channels, written_rate, frames, tmp_path):
    path = write_video(frames, tmp_path / "a.mp4", fps=8, audio=clip(10, rate, channels))
    with av.open(str(path)) as container:
        sound, video = container.streams.audio[0], container.streams.video[0]
        assert (sound.codec_context.name, sound.channels) == ("aac", channels)
        assert video.duration * video.time_base == Fraction(12, 8)
        assert abs(sound.duration * sound.time_base - Fraction(12, 8)) < Fraction(2, 1000)
    samples, decoded_rate = decoded_sound(path)
    assert decoded_rate == written_rate
    # The click is where it was put, within a millisecond and a half.
    assert abs(np.abs(samples[0]).argmax() / decoded_rate - 0.5) < 1.5e-3


def test_short_sound_is_kept_whole(frames, tmp_path):
    path = write_video(frames, tmp_path / "a.mp4", fps=8, audio=clip(0.75))
    with av.open(str(path)) as container:
        sound, video = container.streams.audio[0], container.streams.video[0]
        assert abs(float(sound.duration * sound.time_base) - 0.75) < 2e-3
        assert video.duration * video.time_base == Fraction(12, 8)


def test_sound_follows_a_generator_of_unknown_length(frames, tmp_path):
    path = write_video(iter(frames), tmp_path / "a.mp4", fps=Fraction(24000, 1001), audio=clip(10))
    with av.open(str(path)) as container:
        sound = container.streams.audio[0]
        assert abs(float(sound.duration * sound.time_base) - 12 * 1001 / 24000) < 2e-3


def test_empty_sound_is_no_sound(frames, tmp_path):
    path = write_video(frames, tmp_path / "a.mp4", fps=8, audio={"waveform": torch.zeros(1, 2, 0), "sample_rate": 48_000})
    with av.open(str(path)) as container:
        assert not container.streams.audio


# Requests that cannot be


def bad_pixels(value: float) -> torch.Tensor:
    frames = torch.zeros(3, 8, 8, 3)
    frames[2, 4, 4, 1] = value
    return frames


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"frames": bad_pixels(float("nan"))}, "Frame 2 has NaN"),
        ({"frames": bad_pixels(float("inf"))}, "Frame 2 has NaN or infinite"),
        ({"frames": torch.zeros(0, 8, 8, 3)}, "at least one frame"),
        ({"frames": []}, "no frames"),
        ({"frames": iter(())}, "no frames"),
        ({"frames": torch.zeros(2, 0, 8, 3)}, "no pixels"),
        ({"frames": torch.zeros(8, 8, 3)}, r"\[8, 8, 3\]"),
        ({"frames": torch.zeros(2, 8, 8, 1)}, "3 or 4 channels"),
        ({"frames": torch.zeros(1, 2, 8, 8, 3)}, r"frames\[0\]"),
        ({"frames": [torch.zeros(8, 8)]}, r"Frame 0 has the shape \[8, 8\]"),
        ({"frames": [torch.zeros(8, 8, 3), torch.zeros(8, 10, 3)]}, "Frame 1 is 10×8"),
        ({"frames": torch.zeros(2, 8, 8, 3, dtype=torch.int64)}, "int64"),
        ({"frames": np.zeros((2, 8, 8, 3), dtype=np.int32)}, "int32"),
        ({"frames": ["a.png"]}, "Frame 0 is of type str"),
        ({"fps": 0}, "fps is 0"),
        ({"fps": -16}, "fps is -16"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"fps": float("inf")}, "fps is inf"),
        ({"fps": 1e-9}, "fps is 1e-09"),
        ({"fps": "fast"}, "fps is 'fast'"),
        ({"format": "avi"}, "no video format 'avi'"),
        ({"quality": -1}, "quality is -1"),
        ({"quality": 52}, "quality is 52"),
        ({"quality": float("nan")}, "quality is nan"),
        ({"quality": "good"}, "quality is 'good'"),
        ({"metadata": {"workflow": {}}}, "'workflow' is a dict"),
        ({"path": "a.avi"}, r"end in \.mp4"),
        ({"path": "a"}, r"end in \.mp4"),
        ({"audio": {"waveform": torch.zeros(2, 2, 100), "sample_rate": 48_000}}, "2 clips"),
        ({"audio": {"waveform": torch.zeros(1, 7, 100), "sample_rate": 48_000}}, "7 channels"),
        ({"audio": {"waveform": torch.zeros(2, 100), "sample_rate": 48_000}}, r"\[2, 100\]"),
        ({"audio": {"waveform": torch.full((1, 2, 9), float("nan")), "sample_rate": 48_000}}, "audio has NaN"),
        ({"audio": {"waveform": torch.zeros(1, 2, 100), "sample_rate": 0}}, "sample rate is 0"),
        ({"audio": {"waveform": torch.zeros(1, 2, 100)}}, "sample rate is None"),
        ({"audio": "song.mp3"}, "audio is str"),
    ],
)
def test_bad_requests_are_named_and_leave_nothing(change, words, tmp_path):
    request = {"frames": torch.zeros(2, 8, 8, 3), "path": "a.mp4", "fps": 16, **change}
    with pytest.raises(InvalidRequestError, match=words) as caught:
        write_video(request.pop("frames"), tmp_path / request.pop("path"), **request)
    assert isinstance(caught.value, ValueError)
    assert os.listdir(tmp_path) == []


# What stops half-way


class Interrupt(BaseException):
    """As newer ComfyUI's InterruptProcessingException: not an Exception."""


@pytest.mark.parametrize("error", [Cancelled("stop"), Interrupt(), KeyboardInterrupt(), RuntimeError("x")])
@pytest.mark.parametrize("at", [1, 7, 12])
def test_cancel_leaves_nothing(error, at, frames, tmp_path):
    def on_frame(written, total):
        assert total == 12
        assert [name.endswith(".part") for name in os.listdir(tmp_path)] == [True]
        if written == at:
            raise error

    with pytest.raises(type(error)):
        write_video(frames, tmp_path / "a.mp4", fps=16, on_frame=on_frame)
    assert os.listdir(tmp_path) == []


def test_a_failing_generator_leaves_the_older_file_alone(frames, tmp_path):
    def source():
        yield from frames[:5]
        raise OSError("the source's own error")

    (tmp_path / "a.mp4").write_bytes(b"older")
    with pytest.raises(OSError, match="the source's own error"):
        write_video(source(), tmp_path / "a.mp4", fps=16, audio=clip(3))
    assert (tmp_path / "a.mp4").read_bytes() == b"older"
    assert os.listdir(tmp_path) == ["a.mp4"]


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


# Disk and folders


def test_missing_folder(frames, tmp_path):
    with pytest.raises(ExportError, match=r"nowhere.*does not exist.*Create it"):
        write_video(frames, tmp_path / "nowhere" / "a.mp4", fps=16)


def test_a_file_in_place_of_the_folder(frames, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ExportError, match="Create it|A file stands"):  # Windows does not tell the two apart
        write_video(frames, tmp_path / "file" / "a.mp4", fps=16)


def test_a_folder_in_place_of_the_file(frames, tmp_path):
    (tmp_path / "a.mp4").mkdir()
    with pytest.raises(ExportError, match="folder of that name"):
        write_video(frames, tmp_path / "a.mp4", fps=16)


def test_missing_encoder(frames, tmp_path, monkeypatch):
    from dataclasses import replace

    monkeypatch.setitem(FORMATS, DEFAULT_FORMAT, replace(FORMATS[DEFAULT_FORMAT], codec="libnothing"))
    with pytest.raises(ExportError, match=r"libnothing.*install PyAV"):
        write_video(frames, tmp_path / "a.mp4", fps=16)
    assert os.listdir(tmp_path) == []


def test_a_size_the_encoder_refuses(tmp_path):
    with pytest.raises(ExportError, match="another format, size"):
        write_video(torch.zeros(1, 2, 40_000, 3), tmp_path / "a.mp4", fps=16)
    assert os.listdir(tmp_path) == []


def write_in_a_process(folder: Path, before: str) -> str:
    """Write noise (which does not compress) in a new process after ``before``; return the error and what is in the folder."""
    code = f"""
        import os, sys
        from types import ModuleType
        for name, folder in (("wan_sharded", ""), ("wan_sharded.engine", "engine")):  # the engine's own __init__ would load diffusers
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__path__ = [os.path.join({str(wan_sharded.__path__[0])!r}, folder)]
        import torch
        from wan_sharded.engine.errors import ExportError
        from wan_sharded.engine.video.writer import write_video
        torch.manual_seed(0)
        frames = torch.rand(40, 96, 128, 3)
        {before}
        try:
            print("wrote", write_video(frames, {str(folder / "a.mp4")!r}, fps=16, metadata={{"workflow": "x" * 300_000}}))
        except ExportError as error:
            print("ExportError", error)
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


# 0 and 4 kB stop it at once, 100 kB in the pictures; the last in the index with its 300 kB of tags, when all else is written.
@pytest.mark.parametrize("room", [0, 4_000, 100_000, "all but the index"])
def test_file_size_limit(room, tmp_path):
    pytest.importorskip("resource")
    if room == "all but the index":
        assert write_in_a_process(tmp_path, "").startswith("wrote")
        room = (tmp_path / "a.mp4").stat().st_size - 150_000
        (tmp_path / "a.mp4").unlink()
    said = write_in_a_process(tmp_path, f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))")
    assert said.startswith("ExportError") and "a.mp4" in said and "larger than this disk" in said
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("room", ["8k", "200k"])
def test_full_disk(room, frames, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(disk)], capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("a small disk can be mounted only as root on Linux")
    try:
        said = write_in_a_process(disk, "")
        assert said.startswith("ExportError") and "The disk is full" in said
        assert os.listdir(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(os.name == "nt", reason="permissions of folders are another matter on Windows")
def test_no_permission():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        # Root may write anywhere, so it becomes "nobody" first.
        said = write_in_a_process(Path(folder), "os.geteuid() == 0 and os.setuid(65534)")
        assert said.startswith("ExportError") and "No permission" in said
        assert os.listdir(folder) == []


# Memory


def test_memory_does_not_grow_with_the_video(tmp_path):
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("reads Linux's /proc")
    resident = []

    def source():
        frame = torch.rand(144, 192, 3)
        for i in range(1200):
            yield frame.roll(i, dims=1)

    def on_frame(written, total):
        resident.append(int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))

    # 1200 frames are 400 MB as float32 and 100 MB as uint8. x264's own look-ahead is full by frame 200.
    write_video(source(), tmp_path / "a.mp4", fps=16, quality=45, audio=clip(80), on_frame=on_frame)
    assert max(resident[200:]) - resident[200] < 20e6
