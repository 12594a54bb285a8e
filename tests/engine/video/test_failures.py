"""What stops the writer: requests that cannot be, cancel, disks and folders. Nothing may be left behind, and memory must not grow."""

import os
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import wan_sharded
from wan_sharded.engine.errors import Cancelled, ExportError, InvalidRequestError
from wan_sharded.engine.video.formats import DEFAULT_FORMAT, FORMATS
from wan_sharded.engine.video.writer import write_video

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


def test_a_failing_generator_leaves_the_older_file_alone(frames, tmp_path, clip):
    def source():
        yield from frames[:5]
        raise OSError("the source's own error")

    (tmp_path / "a.mp4").write_bytes(b"older")
    with pytest.raises(OSError, match="the source's own error"):
        write_video(source(), tmp_path / "a.mp4", fps=16, audio=clip(3))
    assert (tmp_path / "a.mp4").read_bytes() == b"older"
    assert os.listdir(tmp_path) == ["a.mp4"]


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


def test_memory_does_not_grow_with_the_video(tmp_path, clip):
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("reads Linux's /proc")
    sizes = []

    def resident(*_):
        sizes.append(int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))

    def source(count):
        frame = torch.rand(144, 192, 3)
        for i in range(count):
            resident()
            yield frame.roll(i, dims=1)

    sound = clip(80, 16_000, 1)
    write_video(source(20), tmp_path / "a.mp4", fps=16, quality=45, audio=sound)  # what is loaded once
    sizes.clear()
    resident()
    # 800 frames are 265 MB as float32 and 66 MB as uint8; x264 itself keeps about 12.
    write_video(source(800), tmp_path / "a.mp4", fps=16, quality=45, audio=sound, on_frame=resident)
    assert max(sizes) - sizes[0] < 40e6
