"""What the engine's tests share: pictures, requests, and diffusers' frames to compare with."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_reference import load_pipeline, reference_frames
from engine_bench import Bench, benches
from imagined_machine import TinyExpert
from wan_sharded.engine import ImageToVideoRequest
from wan_sharded.engine.parallel import forward as forward_module

SIZE = {"width": 64, "height": 48, "num_frames": 5, "num_inference_steps": 3}
TEXTS = {"prompt": "A white cat sits on a surfboard.", "negative_prompt": "blurred details"}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are computed faster by one thread, and always in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what is imported by now needs no looking through each time the engine collects garbage
    yield
    gc.unfreeze()
    torch.set_num_threads(before)


@pytest.fixture
def steady_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares stay what they are planned to be, however long a device takes: other ones round otherwise."""
    monkeypatch.setattr(forward_module, "better_speeds", lambda *args: None)


@pytest.fixture(scope="session")
def picture() -> torch.Tensor:
    """Float32 [48, 64, 3] in 0..1."""
    return torch.rand(48, 64, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def last_picture() -> torch.Tensor:
    return torch.rand(48, 64, 3, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="session")
def make_request(picture: torch.Tensor) -> Callable[..., ImageToVideoRequest]:
    """A request for 5 frames of 64x48 in 3 steps, with changes: ``make_request(seed=3, guidance_scale=1.0)``."""

    def make(**changes: Any) -> ImageToVideoRequest:
        return ImageToVideoRequest(**{"image": picture, "seed": 7, **SIZE, **TEXTS, **changes})

    return make


@pytest.fixture(scope="session")
def diffusers_frames() -> Callable[..., torch.Tensor]:
    """The frames diffusers makes for a request; computed once for each."""
    pipelines: dict[tuple, Any] = {}
    known: dict[tuple, tuple[ImageToVideoRequest, torch.Tensor]] = {}

    def make(checkpoint: Path, request: ImageToVideoRequest, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        fields = {name: getattr(request, name) for name in request.__dataclass_fields__}
        key = (checkpoint, dtype, *((id(value) if isinstance(value, torch.Tensor) else value) for value in fields.values()))
        if key not in known:
            which = (checkpoint, dtype, request.sampler_name, request.flow_shift)
            if which not in pipelines:
                pipelines.clear()
                pipelines[which] = load_pipeline(checkpoint, dtype=dtype, solver=request.sampler_name, shift=request.flow_shift)
            pipeline = pipelines[which]
            pipeline.register_to_config(boundary_ratio=request.boundary_ratio)
            frames = reference_frames(
                pipeline,
                seed=request.seed,
                image=request.image,
                last_image=request.last_image,
                prompt=request.prompt,
                negative_prompt=request.negative_prompt,
                width=request.width,
                height=request.height,
                num_frames=request.num_frames,
                num_inference_steps=request.num_inference_steps,
                num_videos_per_prompt=request.batch_size,
                guidance_scale=request.guidance_scale,
                guidance_scale_2=request.guidance_scale_2,
            )
            known[key] = (request, frames)  # the request, so that no other tensor gets the identity of its pictures
        return known[key][1]

    return make


@pytest.fixture
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    """8 blocks of 3 MiB in float32: large beside the activations."""
    return make_checkpoint(num_blocks=8, num_heads=16)


@pytest.fixture
def expert(checkpoint: Path) -> TinyExpert:
    return TinyExpert(checkpoint)


@pytest.fixture
def bench(
    checkpoint: Path, make_request: Callable[..., ImageToVideoRequest], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Bench]]:
    """``bench(2)``: an engine on two imagined GPUs, for ``checkpoint``, which a test file may have its own of."""
    with benches(checkpoint, make_request, monkeypatch) as make:
        yield make
