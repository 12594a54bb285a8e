"""Video Export's bridge against a real ComfyUI's modules (no server). Skipped where ComfyUI cannot be imported."""

import json
import os
import threading
import time
from pathlib import Path

import av
import pytest
import torch
from PIL import Image

cli_args = pytest.importorskip("comfy.cli_args", reason="put a ComfyUI folder on PYTHONPATH to run this")
if not torch.cuda.is_available():
    cli_args.args.cpu = True  # before comfy.model_management looks for a GPU

import comfy.model_management  # noqa: E402
import comfy.utils  # noqa: E402
import folder_paths  # noqa: E402
from comfy_api.input_impl import VideoFromComponents  # noqa: E402
from comfy_api.latest import Input  # noqa: E402
from wan_sharded.bridge.exporting import checked_prefix, export  # noqa: E402
from wan_sharded.engine.errors import ExportError, InvalidRequestError  # noqa: E402
from wan_sharded.engine.video.formats import FORMATS  # noqa: E402


@pytest.fixture
def output(tmp_path):
    """ComfyUI's output folder, empty."""
    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(tmp_path))
    yield tmp_path
    folder_paths.set_output_directory(before)


@pytest.fixture
def hook():
    """Set what ComfyUI calls on progress (a server sets its own)."""
    before = comfy.utils.PROGRESS_BAR_HOOK
    yield comfy.utils.set_progress_bar_global_hook
    comfy.utils.set_progress_bar_global_hook(before)
    comfy.model_management.interrupt_current_processing(False)


def request(**change):
    frames = torch.linspace(0, 1, 6)[:, None, None, None].expand(6, 32, 48, 3)
    return {
        "images": frames,
        "fps": 16.0,
        "filename_prefix": "video/wan",
        "format": "mp4 (H.264)",
        "quality": 19,
        "audio": None,
        "prompt": {"1": {"class_type": "WanShardedVideoExport", "inputs": {}}},
        "extra_pnginfo": {"workflow": {"nodes": [], "extra": {"title": "漢"}}},
        **change,
    }


def tags(path) -> dict[str, str]:
    with av.open(str(path)) as container:
        return dict(container.metadata)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_file_preview_and_video(output):
    video, path, preview = export(**request())
    assert path == str(output / "video" / "wan_00001_.mp4")
    assert preview == {
        "images": [{"filename": "wan_00001_.mp4", "subfolder": "video", "type": "output"}],
        "animated": (True,),
        "text": ("wan_00001_.mp4",),
    }
    assert isinstance(video, Input.Video)
    assert (video.get_dimensions(), video.get_frame_count(), video.get_frame_rate()) == ((48, 32), 6, 16)
    assert files(output) == [os.path.join("video", "wan_00001_.mp4")]


def test_core_video_nodes_take_the_output(output):
    audio = {"waveform": torch.rand(1, 2, 48_000) - 0.5, "sample_rate": 48_000}
    video, path, _ = export(**request(audio=audio))
    components = video.get_components()  # GetVideoComponents
    assert components.images.shape == (6, 32, 48, 3)
    assert (components.images - request()["images"]).abs().max() < 0.03
    assert components.frame_rate == 16
    assert components.audio["sample_rate"] == 48_000
    video.save_to(str(output / "saved.mp4"), metadata={"workflow": {"nodes": []}})  # SaveVideo with "auto"
    with av.open(str(output / "saved.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 6
        assert container.streams.video[0].codec_context.colorspace == 1
    assert tags(output / "saved.mp4")["prompt"] == tags(path)["prompt"]


def test_metadata_is_what_core_saves(output):
    wanted = request()
    _, path, _ = export(**wanted)
    assert json.loads(tags(path)["workflow"]) == wanted["extra_pnginfo"]["workflow"]
    assert json.loads(tags(path)["prompt"]) == wanted["prompt"]


def test_metadata_is_json_a_browser_reads(output):
    # Core itself puts NaN, and whatever a node's IS_CHANGED returned, into the prompt.
    prompt = {"1": {"is_changed": float("nan")}, "2": {"is_changed": [b"\x00", float("inf"), 0.5]}}
    _, path, _ = export(**request(prompt=prompt))
    assert json.loads(tags(path)["prompt"], parse_constant=pytest.fail) == {
        "1": {"is_changed": None},
        "2": {"is_changed": [str(b"\x00"), None, 0.5]},
    }


def test_disable_metadata_is_honoured(output, monkeypatch):
    monkeypatch.setattr(cli_args.args, "disable_metadata", True)
    _, path, _ = export(**request())
    assert not {"workflow", "prompt"} & set(tags(path))


def test_no_prompt_and_no_workflow(output):
    _, path, _ = export(**request(prompt=None, extra_pnginfo=None))
    assert not {"workflow", "prompt"} & set(tags(path))


# Names


def test_numbers_go_on(output):
    (output / "video").mkdir()
    (output / "video" / "wan_00041_.webm").write_bytes(b"")
    names = [Path(export(**request())[1]).name for _ in range(2)]
    assert names == ["wan_00042_.mp4", "wan_00043_.mp4"]


def test_writers_at_the_same_time_get_files_of_their_own(output):
    start, paths = threading.Barrier(8), []

    def write():
        start.wait()
        paths.append(export(**request())[1])

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 8
    for path in paths:
        with av.open(path) as container:
            assert sum(1 for _ in container.decode(video=0)) == 6
    assert len(files(output)) == 8


def test_core_fills_in_the_prefix(output):
    _, path, preview = export(**request(filename_prefix="%year%/wan %width%x%height%"))
    year = str(time.localtime().tm_year)
    assert path == str(output / year / "wan 48x32_00001_.mp4")
    assert preview["images"][0]["subfolder"] == year


@pytest.mark.parametrize("prefix", ["a/b/wan", "a\\b\\wan", "./a//b/wan"])
def test_folders_in_the_prefix_are_made(prefix, output):
    _, _, preview = export(**request(filename_prefix=prefix))
    assert files(output) == [os.path.join("a", "b", "wan_00001_.mp4")]
    assert preview["images"][0]["subfolder"].replace("\\", "/") == "a/b"


@pytest.mark.parametrize("prefix", ["../wan", "a/../../wan", "..\\wan", "..", "/tmp/wan", "\\\\server\\wan", "", "/", ".", "a\0b"])
def test_prefixes_that_leave_the_folder_or_name_nothing(prefix, output):
    with pytest.raises(InvalidRequestError, match="filename_prefix"):
        export(**request(filename_prefix=prefix))
    assert files(output) == []
    assert not (output.parent / "wan_00001_.mp4").exists()


@pytest.mark.parametrize("prefix", ["C:/wan", "C:wan", "wan:x", "video/%date:yyyy-MM-dd%", "what?", "a|b"])
def test_prefixes_that_windows_cannot_take(prefix):
    with pytest.raises(InvalidRequestError, match="filename_prefix"):
        checked_prefix(prefix, windows=True)
    assert checked_prefix(prefix, windows=False) == prefix


# Formats


@pytest.mark.parametrize("format", [label for label, row in FORMATS.items() if not row.needs])
def test_core_video_nodes_take_every_format(format, output):
    audio = {"waveform": torch.rand(1, 2, 48_000) - 0.5, "sample_rate": 48_000}
    video, path, shown = export(**request(images=request()["images"].repeat(1, 2, 2, 1), format=format, audio=audio, pingpong=True))
    row = FORMATS[format]
    assert Path(path).name == ("wan_00001_" if row.is_folder else f"wan_00001_.{row.extension}")
    components = video.get_components()
    assert components.images.shape == (10, 64, 96, 3)
    middle = components.images[:, 16, 24, 0]
    assert int(middle.argmax()) == 5 and torch.allclose(middle[1:5], middle[6:].flip(0), atol=0.03)
    video.save_to(str(output / "saved.mp4"))  # core's Save Video with "auto"
    with av.open(str(output / "saved.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 10
    text = shown["text"][0]
    assert ("images" in shown) == bool(row.preview) and ("No preview" in text) == (not row.preview)
    assert ("sound was left out" in text) == (not row.audio_codec)
    assert ("workflow was left out" in text) == (format == "gif")
    assert ("animated" in shown) == (bool(row.preview) and format not in ("gif", "png sequence"))


@pytest.mark.parametrize("format", [label for label, row in FORMATS.items() if not row.core_reads])
def test_newer_comfyui_may_trim_the_output(format, output, monkeypatch):
    """There every VIDEO must say how it is cut, and the cache asks what it holds."""
    monkeypatch.setattr(VideoFromComponents, "as_trimmed", lambda self, **how: (self.get_components(), how), raising=False)
    video, _, _ = export(**request(format=format))
    components, how = video.as_trimmed(start_time=1.0, duration=2.0)
    assert components.images.shape == (6, 32, 48, 3) and how == {"start_time": 1.0, "duration": 2.0}
    assert [tensor.shape for tensor in video._comfy_cache_tensors()] == [components.images.shape]


def test_png_sequence_is_a_numbered_folder(output):
    _, path, shown = export(**request(format="png sequence"))
    assert files(output) == [os.path.join("video", "wan_00001_", f"{number:05}.png") for number in range(1, 7)]
    assert shown["images"][0]["filename"] == "00001.png" and Path(shown["images"][0]["subfolder"]) == Path("video/wan_00001_")
    assert Path(export(**request(format="png sequence"))[1]).name == "wan_00002_"
    assert Path(path).is_dir()


def test_the_first_frame_beside_a_folder_has_its_whole_name(output):
    """A prefix may have a dot in it; what comes before that is another file's name."""
    (output / "v1.png").write_bytes(b"somebody's")
    export(**request(filename_prefix="v1.5", format="png sequence", first_frame_png=True))
    assert (output / "v1.5_00001_.png").is_file() and (output / "v1.png").read_bytes() == b"somebody's"


@pytest.mark.parametrize("format", ["gif", "mov (ProRes)"])
def test_forwards_and_backwards_copies_nothing_until_somebody_asks(format, output, monkeypatch):
    copied = []
    getitem = torch.Tensor.__getitem__
    monkeypatch.setattr(
        torch.Tensor, "__getitem__", lambda self, key: (isinstance(key, list) and copied.append(key), getitem(self, key))[1]
    )
    video, _, _ = export(**request(format=format, pingpong=True))
    assert copied == []
    assert len(video.get_components().images) == 10 and len(copied) == 1


def test_first_frame_beside_the_video(output):
    wanted = request(format="mov (ProRes)", first_frame_png=True)
    _, _, shown = export(**wanted)
    assert files(output) == [os.path.join("video", name) for name in ("wan_00001_.mov", "wan_00001_.png")]
    with Image.open(output / "video" / "wan_00001_.png") as image:
        assert image.size == (48, 32)
        assert json.loads(image.text["workflow"]) == wanted["extra_pnginfo"]["workflow"]
    assert shown["images"][0]["filename"] == "wan_00001_.png"


def test_temp_folder(output, tmp_path_factory, monkeypatch):
    temp = tmp_path_factory.mktemp("temp")
    monkeypatch.setattr(folder_paths, "temp_directory", str(temp))
    _, path, shown = export(**request(save_output=False))
    assert path == str(temp / "video" / "wan_00001_.mp4")
    assert shown["images"][0]["type"] == "temp"
    assert files(output) == []


# What goes wrong


class Interrupt(BaseException):
    """As newer ComfyUI's InterruptProcessingException: not an Exception."""


@pytest.mark.parametrize("at", [1, 3, 6])
def test_interrupt_at_any_frame_leaves_nothing(at, output, hook):
    seen = []

    def interrupt(value, total, preview, **_):
        seen.append((value, total))
        if value == at:
            comfy.model_management.interrupt_current_processing()
            comfy.model_management.throw_exception_if_processing_interrupted()

    hook(interrupt)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        export(**request())
    assert seen == [(value, 6) for value in range(1, at + 1)]
    assert files(output) == []


def test_interrupt_without_a_server(output, hook):
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        export(**request())
    assert files(output) == []


def test_interrupt_as_a_base_exception_leaves_nothing(output, hook):
    def interrupt(*_, **__):
        raise Interrupt

    hook(interrupt)
    with pytest.raises(Interrupt):
        export(**request())
    assert files(output) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": torch.full((2, 8, 8, 3), float("nan"))}, "NaN"),
        ({"images": torch.zeros(0, 8, 8, 3)}, "at least one frame"),
        ({"images": torch.zeros(8, 8, 3)}, r"\[8, 8, 3\]"),
        ({"fps": 0.0}, "fps"),
        ({"format": "gone (H.999)"}, "no video format"),
        ({"quality": 99, "first_frame_png": True}, "quality"),
        ({"quality": 99, "format": "png sequence"}, "quality"),
        ({"format": "gif", "bitrate_mbps": 3.0}, "no bit rate"),
        ({"audio": {"waveform": torch.zeros(3, 2, 9), "sample_rate": 48_000}}, "3 clips"),
    ],
)
def test_bad_requests_leave_nothing(change, words, output):
    with pytest.raises(InvalidRequestError, match=words):
        export(**request(**change))
    assert files(output) == []


def test_a_file_in_place_of_the_folder(output):
    (output / "video").write_bytes(b"")
    with pytest.raises(ExportError, match="A file stands"):
        export(**request())
    assert files(output) == ["video"]


def test_frames_are_never_copied_whole(output, hook):
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("reads Linux's /proc")

    def resident(*_, **__):
        sizes.append(int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))

    sizes = []
    export(**request())  # what is loaded once
    resident()
    hook(resident)
    # One picture seen 600 times: 0.4 MB. A copy would be 265 MB as float32 and 66 MB as uint8; x264 itself keeps about 15.
    export(**request(images=torch.rand(24, 24, 3).repeat(8, 8, 1).expand(600, 192, 192, 3), quality=40))
    assert max(sizes) - sizes[0] < 40e6
