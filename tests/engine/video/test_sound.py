"""Sound under the video, checked by decoding it again."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from wan_sharded.engine.video.writer import write_video


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
def test_sound_is_in_step_and_ends_with_the_video(rate, channels, written_rate, frames, tmp_path, clip):
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


def test_short_sound_is_kept_whole(frames, tmp_path, clip):
    path = write_video(frames, tmp_path / "a.mp4", fps=8, audio=clip(0.75))
    with av.open(str(path)) as container:
        sound, video = container.streams.audio[0], container.streams.video[0]
        assert abs(float(sound.duration * sound.time_base) - 0.75) < 2e-3
        assert video.duration * video.time_base == Fraction(12, 8)


def test_sound_follows_a_generator_of_unknown_length(frames, tmp_path, clip):
    path = write_video(iter(frames), tmp_path / "a.mp4", fps=Fraction(24000, 1001), audio=clip(10))
    with av.open(str(path)) as container:
        sound = container.streams.audio[0]
        assert abs(float(sound.duration * sound.time_base) - 12 * 1001 / 24000) < 2e-3


def test_empty_sound_is_no_sound(frames, tmp_path):
    path = write_video(frames, tmp_path / "a.mp4", fps=8, audio={"waveform": torch.zeros(1, 2, 0), "sample_rate": 48_000})
    with av.open(str(path)) as container:
        assert not container.streams.audio
