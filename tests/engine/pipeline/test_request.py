"""What a video may be asked to be: every value outside its range is refused with its name, sizes nearby are corrected with a note."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from wan_sharded.engine import ImageToVideoRequest, as_picture, fit_size
from wan_sharded.engine.errors import InvalidRequestError
from wan_sharded.engine.pipeline.request import fill_frame

PICTURE = torch.full((48, 64, 3), 0.5)
SIZE = {"width": 64, "height": 48, "num_frames": 5}


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("width", 60, "use 48x48"),
        ("width", 0, "width is 0; Wan takes 16 to 16384"),
        ("width", -16, "width is -16"),
        ("width", 1_000_000, "width is 1000000"),
        ("height", 8, "height is 8; Wan takes 16"),
        ("height", 16400, "height is 16400"),
        ("num_frames", 7, "length 7 is not 4n+1; use 5 frames instead"),
        ("num_frames", 0, "length is 0; Wan takes 1 to 4093"),
        ("num_frames", 10**9, "length is 1000000000"),
        ("batch_size", 0, "batch_size is 0; it must be between 1 and 1024"),
        ("batch_size", 5000, "batch_size is 5000"),
        ("seed", -1, "seed is -1"),
        ("seed", 2**64, "seed is 18446744073709551616"),
        ("num_inference_steps", 0, "steps is 0; it must be between 1 and 1000"),
        ("num_inference_steps", 1001, "steps is 1001"),
        ("guidance_scale", 0.5, "cfg is 0.5; it must be between 1 and 1000"),
        ("guidance_scale", math.nan, "cfg is nan"),
        ("guidance_scale", math.inf, "cfg is inf"),
        ("guidance_scale_2", 0.5, "cfg_low_noise is 0.5"),
        ("guidance_scale_2", math.nan, "cfg_low_noise is nan"),
        ("flow_shift", 0.0, "shift is 0"),
        ("flow_shift", -5.0, "shift is -5"),
        ("flow_shift", math.nan, "shift is nan"),
        ("boundary_ratio", 1.5, "boundary is 1.5; it must be between 0 and 1"),
        ("boundary_ratio", -0.1, "boundary is -0.1"),
        ("boundary_ratio", math.nan, "boundary is nan"),
        ("switch_step", -1, "switch_step is -1"),
        ("switch_step", 5000, "switch_step is 5000"),
        ("sampler_name", "heun", "sampler_name is 'heun'; choose one of unipc, euler, dpm++"),
    ],
)
def test_values_out_of_range(field: str, value: Any, words: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ImageToVideoRequest(**{"image": PICTURE, **SIZE, field: value})
    assert words in str(caught.value)


def test_a_first_and_a_last_frame_need_frames_between() -> None:
    with pytest.raises(InvalidRequestError, match="length is 1; a first and a last frame need at least 5 frames"):
        ImageToVideoRequest(image=PICTURE, last_image=PICTURE, width=64, height=48, num_frames=1)


def test_defaults_are_wans() -> None:
    request = ImageToVideoRequest(image=PICTURE)
    assert (request.width, request.height, request.num_frames) == (832, 480, 81)
    assert request.low_noise_guidance_scale == request.guidance_scale == 3.5
    assert request.needs_negative


@pytest.mark.parametrize(("high", "low", "needed"), [(1, None, False), (1, 1, False), (1, 2, True), (2, 1, True), (3.5, None, True)])
def test_when_the_negative_prompt_is_needed(high: float, low: float | None, needed: bool) -> None:
    assert ImageToVideoRequest(image=PICTURE, guidance_scale=high, guidance_scale_2=low).needs_negative == needed


@pytest.mark.parametrize(
    ("given", "made", "notes"),
    [
        ((832, 480, 81), (832, 480, 81), 0),
        ((833, 495, 81), (832, 480, 81), 1),
        ((832, 480, 84), (832, 480, 81), 1),
        ((831, 480, 80), (816, 480, 77), 2),
        ((16, 16, 1), (16, 16, 1), 0),
        ((31, 16, 4), (16, 16, 1), 2),
    ],
)
def test_sizes_nearby(given: tuple, made: tuple, notes: int) -> None:
    *fitted, said = fit_size(*given)
    assert tuple(fitted) == made
    assert len(said) == notes
    if notes:
        assert f"{given[0]}x{given[1]} is no multiple of 16" in said[0] or f"length {given[2]} is not 4n+1" in said[-1]
    ImageToVideoRequest(image=PICTURE, width=made[0], height=made[1], num_frames=made[2])


# ---- pictures


@pytest.mark.parametrize(
    "picture",
    [
        Image.new("RGB", (64, 48), (255, 128, 0)),
        Image.new("RGBA", (64, 48), (255, 128, 0, 7)),
        np.full((48, 64, 3), (255, 128, 0), np.uint8),
        np.full((48, 64, 3), (1.0, 128 / 255, 0.0), np.float64),
        torch.tensor([1.0, 128 / 255, 0.0]).expand(48, 64, 3),
        torch.tensor([255, 128, 0], dtype=torch.uint8).expand(2, 48, 64, 3),
        torch.tensor([1.0, 128 / 255, 0.0, 0.3]).expand(1, 48, 64, 4),
        torch.tensor([1.5, 128 / 255, -0.2]).expand(48, 64, 3),
        torch.tensor([1.0, 128 / 255, 0.0], requires_grad=True).expand(48, 64, 3),
    ],
    ids=[
        "PIL",
        "PIL with alpha",
        "uint8 array",
        "float64 array",
        "tensor",
        "batch of uint8",
        "batch with alpha",
        "beyond 0..1",
        "with a gradient",
    ],
)
def test_pictures_of_every_kind(picture: Any) -> None:
    tensor = as_picture(picture)
    assert tensor.shape == (48, 64, 3) and tensor.dtype == torch.float32 and tensor.device.type == "cpu"
    assert torch.allclose(tensor[3, 5], torch.tensor([1.0, 128 / 255, 0.0]), atol=1e-6)


def test_grey_pictures_become_coloured() -> None:
    assert as_picture(torch.full((48, 64, 1), 0.25)).shape == (48, 64, 3)
    assert as_picture(Image.new("L", (64, 48), 10)).shape == (48, 64, 3)


def test_of_a_batch_the_first() -> None:
    batch = torch.stack([torch.full((4, 4, 3), 0.25), torch.full((4, 4, 3), 0.75)])
    assert float(as_picture(batch).mean()) == 0.25


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (torch.zeros(0, 48, 64, 3), "an empty batch (0 pictures). Connect at least one picture"),
        (torch.zeros(48, 64), "has the shape [48, 64]; a picture is [height, width, 3]"),
        (torch.zeros(48, 64, 2), "has the shape [48, 64, 2]"),
        (torch.zeros(3, 48, 64), "has the shape [3, 48, 64]"),
        (torch.zeros(0, 64, 3), "has the shape [0, 64, 3]"),
        (torch.zeros(1, 1, 48, 64, 3), "has the shape [1, 1, 48, 64, 3]"),
        (torch.full((4, 4, 3), math.nan), "pixels that are no numbers (NaN or infinite). Check the node that made it"),
        (torch.full((4, 4, 3), math.inf), "pixels that are no numbers"),
        (np.array(["a", "b"]), "no picture"),
        (None, "no picture"),
        ("photo.jpg", "no picture"),
        (torch.zeros(4, 4, 3, dtype=torch.int64), "torch.int64"),
        (torch.zeros(4, 4, 3, dtype=torch.complex64), "torch.complex64"),
    ],
    ids=[
        "empty batch",
        "no channels",
        "two channels",
        "channels first",
        "no rows",
        "five axes",
        "NaN",
        "infinite",
        "words",
        "nothing",
        "a path",
        "int64",
        "complex",
    ],
)
def test_what_is_no_picture(picture: Any, words: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        as_picture(picture, "last_image")
    assert "last_image" in str(caught.value) and words in str(caught.value)


# ---- filling the frame


def test_the_same_size_is_left_alone() -> None:
    picture = torch.rand(48, 64, 3)
    frame, cut = fill_frame(picture, 64, 48)
    assert not cut
    assert torch.equal(frame, picture.permute(2, 0, 1)[None])


def test_the_middle_is_kept() -> None:
    """A wide picture with a white middle fills a square frame with white."""
    picture = torch.zeros(100, 300, 3)
    picture[:, 100:200] = 1
    frame, cut = fill_frame(picture, 96, 96)
    assert cut and frame.shape == (1, 3, 96, 96)
    assert float(frame[:, :, :, 4:-4].min()) > 0.98


def test_scaling_alone_cuts_nothing() -> None:
    frame, cut = fill_frame(torch.rand(96, 128, 3), 64, 48)
    assert not cut and frame.shape == (1, 3, 48, 64)


def test_any_shape_of_picture() -> None:
    """Rounding must not put the cut outside the picture."""
    for w in (1, 2, 3, 7, 63, 64, 65, 100, 639, 833, 1023):
        for h in (1, 2, 47, 49, 479, 481, 1021):
            for width, height in ((64, 48), (832, 480), (480, 832), (16, 16), (112, 16)):
                frame, _ = fill_frame(torch.full((h, w, 3), 0.5), width, height)
                assert frame.shape == (1, 3, height, width)
