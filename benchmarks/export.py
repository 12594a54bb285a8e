"""Frames to a file: this pack's writer and raw frames piped to an ffmpeg program, with the same encoder settings.

    python benchmarks/export.py --ffmpeg /usr/bin/ffmpeg

The second way is that of VideoHelperSuite: each frame rounded to 8 bits by NumPy and written to ffmpeg's standard input as rgb24.
Each measurement is a process of its own; both take turns. The frames are views of a short clip, as ComfyUI hands them over (float32),
so that making them costs nothing. Memory is what the process, and ffmpeg beside it, held more than before the first frame.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import av
import numpy as np
import torch
from record import Row, record

ROOT = Path(__file__).resolve().parent.parent
CLIP_FRAMES = 48
MEMORY_EVERY = 100  # frames
QUALITY = 19
# As engine/video/formats.py has them.
ENCODERS = {
    "mp4 (H.264)": ["-c:v", "libx264", "-preset", "medium", "-crf", "19"],
    "mp4 (H.265)": ["-c:v", "libx265", "-preset", "medium", "-crf", "22", "-tag:v", "hvc1", "-x265-params", "log-level=error"],
}
WAYS = ("wan-sharded", "ffmpeg pipe")


def clip(width: int, height: int) -> torch.Tensor:
    """[48, height, width, 3] float32 0..1: soft shapes that move, with grain."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, CLIP_FRAMES // 8, 9, 16, generator=draw)
    grain = torch.randn(height, width, 3, generator=draw) * 0.01
    frames = torch.empty(CLIP_FRAMES, height, width, 3)
    times = torch.nn.functional.interpolate(coarse, (CLIP_FRAMES, 9, 16), mode="trilinear")
    for index in range(CLIP_FRAMES):
        picture = torch.nn.functional.interpolate(times[:, :, index], (height, width), mode="bicubic")[0].permute(1, 2, 0)
        frames[index] = (picture + grain.roll(index * 7, 0)).clamp(0, 1)
    return frames


def forth_and_back(frames: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
    period = 2 * len(frames) - 2
    for index in range(count):
        at = index % period
        yield frames[at if at < len(frames) else period - at]


def status_bytes(name: str, process: int | str = "self") -> int:
    """``VmRSS`` or ``VmHWM`` of a process."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def by_the_pack(frames: Iterator[torch.Tensor], path: Path, format: str, on_frame: Any) -> None:
    sys.modules["wan_sharded"] = pack = ModuleType("wan_sharded")
    pack.__path__ = [str(ROOT)]
    from wan_sharded.engine.video.writer import write_video

    write_video(frames, path, fps=16, format=format, quality=QUALITY, on_frame=lambda written, _: on_frame(written, 0))


def by_a_pipe(frames: Iterator[torch.Tensor], path: Path, format: str, on_frame: Any, ffmpeg: str, size: tuple[int, int]) -> None:
    colours = ["-vf", "scale=out_color_matrix=bt709", "-color_range", "tv", "-colorspace", "bt709", "-color_primaries", "bt709"]
    command = [ffmpeg, "-y", "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size[0]}x{size[1]}", "-r", "16", "-i", "-"]
    command += [*ENCODERS[format], "-pix_fmt", "yuv420p", *colours, "-color_trc", "bt709", "-movflags", "+faststart", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        for written, frame in enumerate(frames, start=1):
            process.stdin.write(np.clip(frame.numpy() * 255 + 0.5, 0, 255).astype(np.uint8).tobytes())
            on_frame(written, process.pid)
        process.stdin.close()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")


def measure(way: str, format: str, count: int, size: tuple[int, int], ffmpeg: str) -> dict[str, float]:
    """Seconds and bytes of one export, in this process."""
    shown = clip(*size)
    before = status_bytes("VmRSS")
    held: list[int] = []

    def on_frame(written: int, other: int) -> None:
        if written % MEMORY_EVERY == 0:
            held.append(status_bytes("VmRSS") + (status_bytes("VmRSS", other) if other else 0) - before)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.mp4")
        begin = time.perf_counter()
        if way == "wan-sharded":
            by_the_pack(forth_and_back(shown, count), path, format, on_frame)
        else:
            by_a_pipe(forth_and_back(shown, count), path, format, on_frame, ffmpeg, size)
        seconds = time.perf_counter() - begin
        with av.open(str(path)) as container:
            written = sum(packet.size > 0 for packet in container.demux(video=0))
        if written != count:
            raise RuntimeError(f"{way} wrote {written} of {count} frames")
        used = os.times()
        return {
            "seconds": seconds,
            "peak": max(held),
            "later": max(held[len(held) // 2 :]) - max(held[: len(held) // 2]),
            "file": path.stat().st_size,
            "cpu": used.user + used.system + used.children_user + used.children_system,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ffmpeg", default="ffmpeg", help="the program")
    parser.add_argument("--frames", type=int, default=2000)
    parser.add_argument("--size", default="1280x720")
    parser.add_argument("--format", choices=ENCODERS, default="mp4 (H.264)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="write nothing to RESULTS.md")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.frames < 2 * MEMORY_EVERY:
        parser.error(f"--frames is {options.frames}; give {2 * MEMORY_EVERY} or more, because memory is read every {MEMORY_EVERY}")
    width, height = map(int, options.size.split("x"))
    if options.one:
        print(json.dumps(measure(options.one, options.format, options.frames, (width, height), options.ffmpeg)))
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for turn in range(options.rounds):
        for way in WAYS if turn % 2 == 0 else WAYS[::-1]:
            command = [sys.executable, *sys.argv, "--one", way]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            found[way].append(json.loads(result.stdout.splitlines()[-1]))
            print(way, {name: round(value, 2) for name, value in found[way][-1].items()}, file=sys.stderr, flush=True)
    rows = []
    for way, runs in found.items():
        of = {name: median(run[name] for run in runs) for name in runs[0]}
        spread = f"{min(run['seconds'] for run in runs):.1f} to {max(run['seconds'] for run in runs):.1f} s"
        note = f"{options.frames / of['seconds']:.1f} frames/s; {spread}; {of['later'] / 2**20:+.0f} MiB in the second half; file {of['file'] / 1e6:.1f} MB"
        rows.append(Row(f"{options.size}x{options.frames}", way, 0, "", of["seconds"], host_gib=of["peak"] / 2**30, note=note))
    version = subprocess.run([options.ffmpeg, "-version"], check=True, capture_output=True, text=True).stdout.split()[2]
    title = f"Export to {options.format}: seconds, and memory taken (PyAV {av.__version__}, ffmpeg {version})"
    record("export", title, rows, append=not options.dry)


if __name__ == "__main__":
    main()
