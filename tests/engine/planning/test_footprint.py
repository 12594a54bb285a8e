"""The arithmetic of what a run takes besides weights."""

import pytest
from wan_sharded.engine.planning.footprint import VideoShape, host_bytes, transformer_activation_bytes, vae_bytes


def test_tokens() -> None:
    assert VideoShape(832, 480, 81).tokens == 32_760
    assert VideoShape(1280, 720, 81).tokens == 75_600
    assert VideoShape(16, 16, 1).tokens == 1


def test_names_for_people() -> None:
    assert str(VideoShape(832, 480, 81)) == "832x480x81"
    assert str(VideoShape(832, 480, 81, 2)) == "832x480x81 x2"


@pytest.mark.parametrize(
    "larger", [VideoShape(848, 480, 81), VideoShape(832, 496, 81), VideoShape(832, 480, 85), VideoShape(832, 480, 81, 2)]
)
def test_more_video_takes_more(larger: VideoShape) -> None:
    shape = VideoShape(832, 480, 81)
    assert transformer_activation_bytes(larger, 5120, 2) > transformer_activation_bytes(shape, 5120, 2)
    assert host_bytes(larger, vae_on_host=False) > host_bytes(shape, vae_on_host=False)


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("shape", [VideoShape(832, 480, 81), VideoShape(1280, 720, 81)], ids=str)
def test_what_was_measured_is_covered(shape: VideoShape, decode: bool) -> None:
    """DESIGN's table of the VAE's peaks (GiB): a plan below them would break a slider's promise."""
    measured = {
        (832, False, 4): 7.2, (832, True, 4): 9.2, (832, False, 2): 3.7, (832, True, 2): 4.8,
        (1280, False, 4): 16.1, (1280, True, 4): 20.7, (1280, False, 2): 8.1, (1280, True, 2): 10.8,
    }  # fmt: skip
    for element_bytes in (4, 2):
        planned = vae_bytes(shape, decode=decode, element_bytes=element_bytes, tiled=False) / 1024**3
        assert measured[shape.width, decode, element_bytes] <= planned <= 1.35 * measured[shape.width, decode, element_bytes]


def test_tiles_take_less() -> None:
    shape = VideoShape(1280, 720, 81)
    assert vae_bytes(shape, decode=True, element_bytes=2, tiled=True) < vae_bytes(shape, decode=True, element_bytes=2, tiled=False)
