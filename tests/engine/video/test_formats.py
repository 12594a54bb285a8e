"""Every format, checked by decoding what was written with PyAV, or with Pillow where PyAV cannot."""

import os
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from wan_sharded.engine.errors import ExportError, InvalidRequestError
from wan_sharded.engine.video.formats import FORMATS, QUALITY_RANGE, left_out
from wan_sharded.engine.video.frames import PingPong
from wan_sharded.engine.video.writer import write_video

FRAMES, HEIGHT, WIDTH = 9, 64, 64
HARDWARE = [label for label, row in FORMATS.items() if row.needs]
PILLOW = ["gif", "webp", "png sequence"]
VIDEO = [label for label in FORMATS if label not in HARDWARE and label not in PILLOW]
SOFTWARE = VIDEO + PILLOW
# Codec, pixel format, largest mean error of a frame in steps of 255 at the default quality. Halved chroma and swscale's way back, without
# any codec, measure 2.8 of it (8 bit), 2.1 (10 bit) and 2.0 (4:2:2); 256 dithered colours 5.1.
FOUND = {
    "mp4 (H.264)": ("h264", "yuv420p", 4.2),
    "mp4 (H.265)": ("hevc", "yuv420p", 4.2),
    "mp4 (H.265, 10 bit)": ("hevc", "yuv420p10le", 3.6),
    "mp4 (AV1)": ("av1", "yuv420p", 4.2),
    "mp4 (AV1, 10 bit)": ("av1", "yuv420p10le", 3.6),
    "webm (VP9)": ("vp9", "yuv420p", 4.2),
    "mov (ProRes)": ("prores", "yuv422p10le", 2.2),
    "mkv (FFV1)": ("ffv1", "bgr0", 0),
    "gif": ("gif", "", 5.5),
    "webp": ("webp", "", 3),
    "png sequence": ("png", "", 0),
}


def smooth(channels: int = 3, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    """[9, height, width, channels]: random, smooth in space and time; alpha goes from clear to opaque, left to right."""
    coarse = torch.rand(1, 3, 3, 4, 4, generator=torch.Generator().manual_seed(7))
    frames = torch.nn.functional.interpolate(coarse, (FRAMES, height, width), mode="trilinear", align_corners=True)[0].permute(1, 2, 3, 0)
    if channels == 4:
        frames = torch.cat([frames, torch.linspace(0, 1, width)[None, None, :, None].expand(FRAMES, height, width, 1)], dim=-1)
    return frames.contiguous()


def name_of(label: str) -> str:
    extension = FORMATS[label].extension
    return f"a.{extension}" if extension else "a"


def decoded(path: Path, label: str) -> np.ndarray:
    """All frames as RGBA 0..255, [T, H, W, 4]."""
    if label == "png sequence":
        return np.stack([np.array(Image.open(path / name).convert("RGBA")) for name in sorted(os.listdir(path))]).astype(float)
    if label in PILLOW:
        found = []
        with Image.open(path) as image:
            for index in range(image.n_frames):
                image.seek(index)
                found.append(np.array(image.convert("RGBA")))
        return np.stack(found).astype(float)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        decoder = stream.codec_context
        if label == "webm (VP9)":  # FFmpeg's own decoder leaves alpha out
            decoder = av.CodecContext.create("libvpx-vp9", "r")
        pictures = [picture for packet in container.demux(stream) for picture in decoder.decode(packet if packet.size else None)]
        if label == "mkv (FFV1)":
            return np.stack([picture.to_ndarray(format="rgba") for picture in pictures]).astype(float)
        # BT.709 by hand would need one formula for each layout; swscale's is told what to do, not left to guess.
        return np.stack(
            [p.reformat(format="rgba", src_colorspace=1, src_color_range=1, dst_color_range=2).to_ndarray() for p in pictures]
        ).astype(float)


@pytest.mark.parametrize("label", SOFTWARE)
def test_pixels_count_and_size(label, tmp_path):
    frames = smooth()
    path = write_video(frames, tmp_path / name_of(label), fps=16, format=label)
    found = decoded(path, label)
    assert found.shape == (FRAMES, HEIGHT, WIDTH, 4)
    errors = np.abs(found[..., :3] - (frames.numpy() * 255).round()).mean(axis=(1, 2, 3))
    assert errors.max() <= FOUND[label][2]
    # The frames come in order: each is nearest to its own.
    distance = np.abs(found[:, None, ..., :3] - frames.numpy()[None] * 255).mean(axis=(2, 3, 4))
    assert distance.argmin(axis=1).tolist() == list(range(FRAMES))
    assert os.listdir(tmp_path) == [name_of(label)]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("label", SOFTWARE)
def test_few_frames(label, count, tmp_path):
    frames = smooth()[:count]
    found = decoded(write_video(frames, tmp_path / name_of(label), fps=16, format=label), label)
    assert found.shape == (count, HEIGHT, WIDTH, 4)
    if label in VIDEO:
        with av.open(str(tmp_path / name_of(label))) as container:
            assert abs(container.duration / av.time_base - count / 16) < 2e-3
            assert [round(float(picture.pts * picture.time_base) * 16) for picture in container.decode(video=0)] == list(range(count))


@pytest.mark.parametrize("label", VIDEO)
def test_stream_colours_duration_and_tags(label, tmp_path):
    metadata = {"workflow": '{"title": "größer 漢"}', "prompt": "{}"}
    path = write_video(smooth(), tmp_path / name_of(label), fps=16, format=label, metadata=metadata)
    row = FORMATS[label]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        pictures = list(container.decode(video=0))
        context = stream.codec_context
        assert FOUND[label][0] in stream.codec.name
        assert pictures[0].format.name == FOUND[label][1]
        assert stream.average_rate == 16
        assert abs(container.duration / av.time_base - FRAMES / 16) < 2e-3
        assert [round(float(picture.pts * stream.time_base) * 16) for picture in pictures] == list(range(FRAMES))
        tags = (context.color_primaries, context.color_trc, context.colorspace, context.color_range)
        assert tags == ((1, 13, 0, 2) if row.colours == "rgb" else (1, 1, 1, 1))
        found = {name.lower(): value for name, value in container.metadata.items()}  # Matroska's names are in capitals
        assert metadata.items() <= found.items()
        if row.codec_tag:
            assert context.codec_tag == row.codec_tag


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
@pytest.mark.parametrize("label", VIDEO)
def test_no_thread_becomes_a_real_time_one(label, tmp_path):
    """Run by root, SVT-AV1's and the caller's would, and everything else would wait for them."""
    before, during = os.sched_getscheduler(0), []

    def look(written: int, total: int | None) -> None:
        during.append({os.sched_getscheduler(int(task)) for task in os.listdir("/proc/self/task")})

    write_video(smooth(), tmp_path / name_of(label), fps=16, format=label, on_frame=look)
    assert os.sched_getscheduler(0) == before
    assert len(during) == FRAMES and not any({os.SCHED_FIFO, os.SCHED_RR} & found for found in during)


@pytest.mark.parametrize("label", [label for label in SOFTWARE if FORMATS[label].alpha_pix_fmt])
def test_alpha(label, tmp_path):
    frames = smooth(4)
    path = write_video(frames, tmp_path / name_of(label), fps=16, format=label)
    alpha = decoded(path, label)[..., 3]
    wanted = frames[..., 3].numpy() * 255
    if label == "gif":  # on or off
        assert ((alpha > 127) == (wanted > 127)).mean() > 0.97
    else:
        assert np.abs(alpha - wanted).mean() < (3 if label == "webm (VP9)" else 1)


# FFmpeg's decoder gives ProRes 4444 as 12 bits, whatever was encoded.
@pytest.mark.parametrize(("label", "layout"), [("webm (VP9)", "yuva420p"), ("mov (ProRes)", "yuva444p12le"), ("mkv (FFV1)", "bgra")])
def test_layout_with_alpha(label, layout, tmp_path):
    with av.open(str(write_video(smooth(4), tmp_path / name_of(label), fps=16, format=label))) as container:
        stream = container.streams.video[0]
        decoder = av.CodecContext.create("libvpx-vp9", "r") if label == "webm (VP9)" else stream.codec_context
        pictures = [picture for packet in container.demux(stream) for picture in decoder.decode(packet if packet.size else None)]
    assert {picture.format.name for picture in pictures} == {layout}


@pytest.mark.parametrize(("channels", "mode"), [(3, "RGB"), (4, "RGBA")])
def test_layout_of_pictures(channels, mode, tmp_path):
    for label in ("webp", "png sequence"):
        path = write_video(smooth(channels), tmp_path / name_of(label), fps=16, format=label)
        with Image.open(path / "00001.png" if path.is_dir() else path) as image:
            assert image.mode == mode
    header = (tmp_path / "a" / "00001.png").read_bytes()[:26]
    assert header[24:26] == bytes([8, {3: 2, 4: 6}[channels]]), "8 bits a channel, without or with alpha"


@pytest.mark.parametrize("label", [label for label in SOFTWARE if not FORMATS[label].alpha_pix_fmt])
def test_alpha_is_dropped_where_there_is_none(label, tmp_path):
    assert (decoded(write_video(smooth(4), tmp_path / name_of(label), fps=16, format=label), label)[..., 3] == 255).all()


@pytest.mark.parametrize("label", ["mp4 (H.265, 10 bit)", "mp4 (AV1, 10 bit)", "mov (ProRes)"])
def test_ten_bits_are_ten_bits(label, tmp_path):
    # Grey steps finer than 8 bits have: at least twice as many levels come back.
    ramp = torch.linspace(0.4, 0.5, 128)[None, None, :, None].expand(4, 64, 128, 3)
    with av.open(str(write_video(ramp, tmp_path / name_of(label), fps=16, format=label, quality=2))) as container:
        luma = next(container.decode(video=0)).to_ndarray(format="gray10le")
    assert len(np.unique(luma)) > 50


@pytest.mark.parametrize("label", SOFTWARE)
def test_odd_sizes(label, tmp_path):
    path = write_video(smooth(3, 67, 65), tmp_path / name_of(label), fps=16, format=label)
    multiple = FORMATS[label].size_multiple
    assert decoded(path, label).shape == (FRAMES, 67 + 67 % multiple, 65 + 65 % multiple, 4)


@pytest.mark.parametrize("label", [label for label in VIDEO if FORMATS[label].audio_codec])
def test_sound_is_in_step_and_ends_with_the_video(label, tmp_path, clip):
    path = write_video(smooth(), tmp_path / name_of(label), fps=8, format=label, audio=clip(5))
    with av.open(str(path)) as container:
        sound = container.streams.audio[0]
        assert sound.codec_context.name in ("aac", "opus", "libopus")
        decoded_sound = list(container.decode(audio=0))
        start = float(decoded_sound[0].pts * decoded_sound[0].time_base)
        samples = np.concatenate([frame.to_ndarray()[:1] for frame in decoded_sound], axis=1)[0]
        rate = decoded_sound[0].sample_rate
    assert abs(start) < 0.01
    # Opus loses the edges of a click of 32 samples, hence the larger bound.
    assert abs(np.abs(samples).argmax() / rate + start - 0.5) < 5e-3
    assert abs(len(samples) / rate - FRAMES / 8) < 0.025


@pytest.mark.parametrize("label", PILLOW)
def test_sound_is_left_out_with_a_word(label, tmp_path, clip, caplog):
    write_video(smooth(), tmp_path / name_of(label), fps=16, format=label, audio=clip(1))
    assert "sound was left out" in caplog.text
    assert left_out(FORMATS[label], audio=True, alpha=False, metadata=False, loop_count=0)


@pytest.mark.parametrize(("loop_count", "gif"), [(0, 0), (1, None), (5, 4)])
def test_loop_count(loop_count, gif, tmp_path):
    for label, wanted in (("gif", gif), ("webp", loop_count)):
        with Image.open(write_video(smooth(), tmp_path / name_of(label), fps=16, format=label, loop_count=loop_count)) as image:
            assert image.info.get("loop") == wanted


@pytest.mark.parametrize("label", ["gif", "webp"])
def test_durations_of_pictures(label, tmp_path):
    with Image.open(write_video(smooth(), tmp_path / name_of(label), fps=16, format=label)) as image:
        durations = []
        for index in range(image.n_frames):
            image.seek(index)
            image.load()
            durations.append(image.info["duration"])
    assert abs(sum(durations) - 1000 * FRAMES / 16) <= 10


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("count", [1, 5])
def test_webp_of_a_picture_that_stands_still(channels, count, tmp_path):
    """The encoder makes a plain picture of it, which has no place for EXIF by itself."""
    frames = smooth(channels)[:1].expand(count, -1, -1, -1)
    path = write_video(frames, tmp_path / "a.webp", fps=16, format="webp", metadata={"workflow": "{}"})
    with Image.open(path) as image:
        image.load()
        assert (image.size, image.mode) == ((WIDTH, HEIGHT), "RGB" if channels == 3 else "RGBA")
        assert image.getexif()[0x010F] == "workflow:{}"
    assert np.abs(decoded(path, "webp")[0] - decoded(write_video(frames, tmp_path / "b.webp", fps=16, format="webp"), "webp")[0]).max() == 0


def test_workflow_in_webp_and_png(tmp_path):
    metadata = {"workflow": '{"title": "\\u6f22"}', "prompt": '{"1": {}}', "more": "[]"}
    path = write_video(smooth(), tmp_path / "a.webp", fps=16, format="webp", metadata=metadata)
    with Image.open(path) as image:
        exif = image.getexif()
        assert image.n_frames == FRAMES
    assert (exif[0x0110], exif[0x010F], exif[0x010E]) == ('prompt:{"1": {}}', 'workflow:{"title": "\\u6f22"}', "more:[]")
    data = path.read_bytes()
    assert int.from_bytes(data[4:8], "little") == len(data) - 8
    folder = write_video(smooth(), tmp_path / "a", fps=16, format="png sequence", metadata=metadata)
    assert sorted(os.listdir(folder)) == [f"{number:05}.png" for number in range(1, FRAMES + 1)]
    with Image.open(folder / "00009.png") as image:
        assert image.text == metadata


@pytest.mark.parametrize("label", [label for label in SOFTWARE if FORMATS[label].quality_option])
def test_quality_and_bit_rate_change_the_size(label, tmp_path):
    noise = torch.rand(8, 64, 64, 3, generator=torch.Generator().manual_seed(3))
    row = FORMATS[label]
    scale = [row.encoder_quality(quality) for quality in (QUALITY_RANGE[0], 19, QUALITY_RANGE[1])]
    assert tuple(scale) == row.quality_scale
    requests = [{"quality": 5}, {"quality": 45}] + ([{"bitrate_mbps": 4.0}, {"bitrate_mbps": 0.2}] if row.takes_bitrate else [])
    sizes = [write_video(noise, tmp_path / name_of(label), fps=16, format=label, **request).stat().st_size for request in requests]
    assert sizes[0] > 1.5 * sizes[1]
    assert not row.takes_bitrate or sizes[2] > 1.2 * sizes[3]  # in 8 frames rate control cannot do much


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "gif", "fps": 60}, "fps is 60"),
        ({"format": "gif", "bitrate_mbps": 2}, "takes no bit rate"),
        ({"format": "mov (ProRes)", "bitrate_mbps": 2}, "takes no bit rate"),
        ({"format": "webm (VP9)", "bitrate_mbps": -1}, "bitrate_mbps is -1"),
        ({"format": "webp", "loop_count": 70_000}, "loop_count is 70000"),
    ],
)
def test_requests_a_format_cannot_meet(change, words, tmp_path):
    with pytest.raises(InvalidRequestError, match=words):
        write_video(smooth(), tmp_path / name_of(change["format"]), **{"fps": 16, **change})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("label", HARDWARE)
def test_hardware_writes_or_says_what_to_do(label, tmp_path):
    try:
        path = write_video(smooth(3, 256, 256), tmp_path / "a.mp4", fps=16, format=label)
    except ExportError as error:
        assert "NVIDIA GPU" in str(error) and "else choose" in str(error)
        assert os.listdir(tmp_path) == []
    else:
        assert decoded(path, label).shape == (FRAMES, 256, 256, 4)


def test_a_png_sequence_leaves_nothing_and_replaces_nothing(tmp_path):
    def stop(written, _):
        if written == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(smooth(), tmp_path / "a", fps=16, format="png sequence", on_frame=stop)
    assert os.listdir(tmp_path) == []
    write_video(smooth(), tmp_path / "a", fps=16, format="png sequence")
    with pytest.raises(ExportError, match="holds files"):
        write_video(smooth(), tmp_path / "a", fps=16, format="png sequence")
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(("count", "order"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2, 1]), (5, [0, 1, 2, 3, 4, 3, 2, 1])])
def test_ping_pong(count, order, tmp_path):
    frames = smooth()[:count]
    view = PingPong(frames)
    assert view.order() == order and len(view) == len(order)
    found = decoded(write_video(view, tmp_path / "a.mkv", fps=Fraction(16), format="mkv (FFV1)"), "mkv (FFV1)")
    assert np.array_equal(found[..., :3], (frames.numpy() * 255).round()[order])


def test_sizes_at_which_x265_aborted_are_refused(tmp_path):
    with pytest.raises(InvalidRequestError, match="64×48.*64 or more"):
        write_video(smooth(3, 48, 64), tmp_path / "a.mp4", fps=16, format="mp4 (H.265)")
    assert os.listdir(tmp_path) == []


def test_frames_with_and_without_alpha_do_not_mix(tmp_path):
    with pytest.raises(InvalidRequestError, match="Frame 1 has 3 channels"):
        write_video([torch.zeros(8, 8, 4), torch.zeros(8, 8, 3)], tmp_path / "a.webp", fps=16, format="webp")
