"""The same weights, seed and inputs give the frames of diffusers' own ``WanImageToVideoPipeline``, wherever the weights live.

float32 on the CPU, compared before any rounding to 8 bits. Where a layout of devices is imagined, the test first checks that the experts
really were split as it says.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from diffusers_reference import HostVae, hand_written_frames, load_pipeline
from imagined_gpus import ImaginedGpus
from imagined_machine import TinyExpert, imagined_machine
from wan_sharded.engine import Callbacks, ImageToVideoRequest, ModelHandle, StepReport, open_model
from wan_sharded.engine.owner import ModelOwner
from wan_sharded.engine.pipeline.image_to_video import ImageToVideo
from wan_sharded.engine.planning.placement import HOST

TOLERANCE = 1e-5
# What a change of an input must move, for its test to mean anything.
VISIBLE = 1e-2
HIGH, LOW = "high noise expert", "low noise expert"
Request = Callable[..., ImageToVideoRequest]
Reference = Callable[..., torch.Tensor]


def furthest(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    assert torch.isfinite(one).all()
    return float((one - other).abs().max())


@pytest.fixture(scope="module")
def engine() -> ImageToVideo:
    """One for many runs, as in a server: what a run leaves behind must not show in the next."""
    return ImageToVideo(ModelOwner())


def experts_at_work(handle: ModelHandle, request: ImageToVideoRequest) -> tuple[torch.Tensor, list[str]]:
    """The frames, and who made each step."""
    reports: list[StepReport] = []
    result = ImageToVideo(ModelOwner())(handle, request, Callbacks(on_step=reports.append))
    return result.frames, [report.expert for report in reports]


# ---- on the CPU, every input


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="cfg 3.5"),
        pytest.param({"guidance_scale": 1.0}, id="cfg 1"),
        pytest.param({"guidance_scale": 4.0, "guidance_scale_2": 2.5}, id="a cfg for each expert"),
        pytest.param({"guidance_scale": 3.5, "guidance_scale_2": 1.0}, id="cfg off for the low noise expert"),
        pytest.param({"seed": 2**64 - 1}, id="largest seed"),
        pytest.param({"sampler_name": "dpm++"}, id="dpm++"),
        pytest.param({"flow_shift": 3.0}, id="shift 3"),
        pytest.param({"boundary_ratio": 0.7}, id="boundary 0.7"),
        pytest.param({"boundary_ratio": 0.0}, id="high noise expert only"),
        pytest.param({"boundary_ratio": 1.0}, id="low noise expert only"),
        pytest.param({"num_frames": 1}, id="one frame"),
        pytest.param({"num_frames": 13, "num_inference_steps": 2}, id="13 frames"),
        pytest.param({"num_inference_steps": 1}, id="one step"),
        pytest.param({"batch_size": 2}, id="batch of 2"),
        pytest.param({"prompt": "", "negative_prompt": ""}, id="no words"),
        pytest.param({"prompt": "猫 " * 600}, id="more words than the text encoder reads"),
    ],
)
def test_equals_diffusers(
    engine: ImageToVideo, tiny_checkpoint: Path, make_request: Request, diffusers_frames: Reference, changes: dict
) -> None:
    request = make_request(**changes)
    result = engine(open_model(tiny_checkpoint), request)
    assert result.frames.shape == (request.batch_size * request.num_frames, 48, 64, 3)
    assert furthest(result.frames, diffusers_frames(tiny_checkpoint, request)) <= TOLERANCE


def test_equals_diffusers_with_a_last_image(
    engine: ImageToVideo, tiny_checkpoint: Path, make_request: Request, diffusers_frames: Reference, last_picture: torch.Tensor
) -> None:
    request = make_request(last_image=last_picture)
    result = engine(open_model(tiny_checkpoint), request)
    assert furthest(result.frames, diffusers_frames(tiny_checkpoint, request)) <= TOLERANCE
    assert furthest(result.frames, diffusers_frames(tiny_checkpoint, make_request())) > VISIBLE


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 8},
        {"prompt": "A boat on a lake at sunset."},
        {"negative_prompt": "overexposed"},
        {"guidance_scale": 1.0},
        {"guidance_scale_2": 6.0},
        {"sampler_name": "euler"},
        {"flow_shift": 2.0},
        {"boundary_ratio": 0.0},
        {"switch_step": 1},
        {"num_inference_steps": 4},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_input_counts(
    engine: ImageToVideo, tiny_checkpoint: Path, make_request: Request, diffusers_frames: Reference, changes: dict
) -> None:
    """Else equality would prove little."""
    result = engine(open_model(tiny_checkpoint), make_request(**changes))
    assert furthest(result.frames, diffusers_frames(tiny_checkpoint, make_request())) > VISIBLE


@pytest.mark.parametrize(("num_blocks", "num_heads"), [(1, 1), (3, 7), (7, 5)])
def test_odd_numbers_of_blocks_and_heads(
    make_checkpoint: Callable[..., Path], make_request: Request, diffusers_frames: Reference, num_blocks: int, num_heads: int
) -> None:
    checkpoint = make_checkpoint(num_blocks=num_blocks, num_heads=num_heads)
    result = ImageToVideo(ModelOwner())(open_model(checkpoint), make_request())
    assert furthest(result.frames, diffusers_frames(checkpoint, make_request())) <= TOLERANCE


def test_a_checkpoint_in_several_files(make_checkpoint: Callable[..., Path], make_request: Request, diffusers_frames: Reference) -> None:
    checkpoint = make_checkpoint(sharded=True)
    assert len(list((checkpoint / "transformer").glob("*.safetensors"))) > 1
    result = ImageToVideo(ModelOwner())(open_model(checkpoint), make_request())
    assert furthest(result.frames, diffusers_frames(checkpoint, make_request())) <= TOLERANCE


def test_a_checkpoint_in_bf16(tiny_checkpoint_bf16: Path, make_request: Request, diffusers_frames: Reference) -> None:
    """As stored, so in bf16; the same operations in the same order are the same to the last bit."""
    result = ImageToVideo(ModelOwner())(open_model(tiny_checkpoint_bf16), make_request())
    assert "bf16, planned" in result.placement
    assert furthest(result.frames, diffusers_frames(tiny_checkpoint_bf16, make_request(), dtype=torch.bfloat16)) <= TOLERANCE


def test_the_latents_are_what_the_vae_decodes(tiny_checkpoint: Path, make_request: Request) -> None:
    """So that core's VAE Decode makes the same frames of the sampler's second output."""
    result = ImageToVideo(ModelOwner())(open_model(tiny_checkpoint), make_request())
    assert result.latents.shape == (1, 16, 2, 6, 8)
    with torch.inference_mode():
        video = HostVae(tiny_checkpoint).decode(result.latents)
    assert furthest((video[0].permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1), result.frames) <= TOLERANCE


def test_given_embeddings_replace_the_texts(tiny_checkpoint: Path, make_request: Request, diffusers_frames: Reference) -> None:
    pipeline = load_pipeline(tiny_checkpoint)
    words = make_request()
    with torch.inference_mode():
        positive, negative = pipeline.encode_prompt(words.prompt, words.negative_prompt, do_classifier_free_guidance=True, device="cpu")
    # Without the padding, as ComfyUI's text encoder node gives them: the engine pads again.
    length = 1 + int(positive.abs().sum(-1).nonzero()[-1, 1])
    assert length < positive.shape[1]
    request = make_request(
        prompt="never read", negative_prompt="never read", prompt_embeds=positive[:, :length], negative_prompt_embeds=negative
    )
    result = ImageToVideo(ModelOwner())(open_model(tiny_checkpoint), request)
    assert furthest(result.frames, diffusers_frames(tiny_checkpoint, words)) <= TOLERANCE


# ---- what diffusers' pipeline cannot be asked: compared with the loop written out


def loop_arguments(request: ImageToVideoRequest) -> dict:
    names = ("seed", "image", "prompt", "negative_prompt", "width", "height", "num_frames", "num_inference_steps")
    return {name: getattr(request, name) for name in names}


@pytest.mark.parametrize("scales", [(1.0, 3.5), (3.5, 1.0), (2.0, 5.0)], ids=str)
def test_guidance_per_expert(tiny_checkpoint: Path, make_request: Request, scales: tuple[float, float]) -> None:
    """diffusers asks the high noise expert's scale only, so cfg 1 with cfg_low_noise 3.5 would lose its guidance."""
    request = make_request(guidance_scale=scales[0], guidance_scale_2=scales[1])
    frames, experts = experts_at_work(open_model(tiny_checkpoint), request)
    assert set(experts) == {HIGH, LOW}
    expected = hand_written_frames(
        load_pipeline(tiny_checkpoint), guidance_scales=scales, high_noise_steps=experts.count(HIGH), **loop_arguments(request)
    )
    assert furthest(frames, expected) <= TOLERANCE


@pytest.mark.parametrize(("steps", "switch_step"), [(4, 2), (3, 1)])
def test_euler(tiny_checkpoint: Path, make_request: Request, steps: int, switch_step: int) -> None:
    """Wan's own noise levels: evenly spaced, shifted once, the last step from the last level to 0."""
    shift = 5.0
    evenly = [1 - step / steps for step in range(steps)]
    sigmas = [shift * sigma / (1 + (shift - 1) * sigma) for sigma in evenly]
    request = make_request(sampler_name="euler", flow_shift=shift, num_inference_steps=steps, switch_step=switch_step)
    frames, _ = experts_at_work(open_model(tiny_checkpoint), request)
    expected = hand_written_frames(
        load_pipeline(tiny_checkpoint),
        sigmas=sigmas,
        guidance_scales=(3.5, 3.5),
        high_noise_steps=switch_step,
        **loop_arguments(request),
    )
    # The noise levels here are rounded once, the scheduler's several times; random weights make 1e-5 of that.
    assert furthest(frames, expected) <= 10 * TOLERANCE


@pytest.mark.parametrize("sampler_name", ["unipc", "dpm++", "euler"])
@pytest.mark.parametrize("switch_step", [1, 3, 4, 9])
def test_switch_step_counts_steps(tiny_checkpoint: Path, make_request: Request, sampler_name: str, switch_step: int) -> None:
    request = make_request(sampler_name=sampler_name, num_inference_steps=4, switch_step=switch_step, boundary_ratio=0.3)
    _, experts = experts_at_work(open_model(tiny_checkpoint), request)
    assert experts == [HIGH] * min(switch_step, 4) + [LOW] * (4 - min(switch_step, 4))


def test_switch_step_equals_the_boundary_at_that_step(tiny_checkpoint: Path, make_request: Request, diffusers_frames: Reference) -> None:
    by_step, experts = experts_at_work(open_model(tiny_checkpoint), make_request(switch_step=2, boundary_ratio=0.99))
    assert experts == [HIGH, HIGH, LOW]
    timesteps = load_pipeline(tiny_checkpoint).scheduler
    timesteps.set_timesteps(3)
    boundary = float(timesteps.timesteps[1]) / 1000
    assert furthest(by_step, diffusers_frames(tiny_checkpoint, make_request(boundary_ratio=boundary))) <= TOLERANCE


# ---- several devices

# name -> (offload, device_map, bytes for weights on each GPU in blocks, homes that must be in use)
LAYOUTS = {
    "one GPU": ("auto", "balanced", [99], {0}),
    "two GPUs": ("auto", "balanced", [99, 99], {0, 1}),
    "two GPUs, none on the host": ("none", "balanced", [99, 99], {0, 1}),
    "filled one after another": ("auto", "auto", [4.8, 99], {0, 1}),
    "the first GPU too small for weights": ("auto", "balanced", [0, 99], {1}),
    "three GPUs": ("auto", "balanced", [99, 99, 99], {0, 1, 2}),
    "eight GPUs": ("auto", "balanced", [99] * 8, set(range(7))),
    "one GPU and the host": ("auto", "balanced", [5.2], {0, HOST}),
    "two GPUs and the host": ("auto", "balanced", [4.2, 1.2], {0, 1, HOST}),
    "everything on the host": ("cpu", "balanced", [99, 99], {HOST}),
}


@pytest.fixture(params=["all the CPU", "told apart"])
def told_apart(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Imagined GPUs that torch knows as the CPU, and ones where mixing devices is an error as on real ones."""
    with ImaginedGpus() if request.param == "told apart" else nullcontext():
        yield request.param == "told apart"


def homes_in_use(engine: ImageToVideo) -> set:
    plan = engine.owner.loaded.plan
    return {home for placement in plan.placements.values() for part, home in placement.homes.items() if placement.sizes[part]}


@pytest.mark.parametrize("execution", ["sequential", "parallel"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_diffusers_on_several_devices(
    tiny_checkpoint: Path, make_request: Request, diffusers_frames: Reference, told_apart: bool, layout: str, execution: str
) -> None:
    offload, device_map, rooms, expected_homes = LAYOUTS[layout]
    request = make_request()
    expert = TinyExpert(tiny_checkpoint)
    # All at once, each GPU also needs room for two blocks on their way.
    fetched = 2 if execution == "parallel" and len(rooms) > 1 else 0
    sliders = expert.sliders(request.shape, [(room + fetched) * expert.block_bytes for room in rooms])
    options = {"offload": offload, "device_map": device_map, "execution": execution}
    handle = open_model(tiny_checkpoint, weight_dtype="fp32", max_memory_gib=sliders, **options)
    engine = ImageToVideo(ModelOwner(), lambda: imagined_machine(len(rooms), all_cpu=not told_apart))
    result = engine(handle, request, vae=HostVae(tiny_checkpoint))
    if execution == "sequential":
        assert homes_in_use(engine) == expected_homes, result.placement
    else:
        assert engine.owner.loaded.plan.parallel
        assert (HOST in homes_in_use(engine)) == (HOST in expected_homes), result.placement
        if len(rooms) > 1:
            assert "All GPUs compute every block" in result.placement
            assert "Shares by measured speed" in result.placement
    # Eight shares of a dozen tokens each: matrix products of a dozen rows add up in another order than those of a hundred.
    tolerance = 3 * TOLERANCE if len(rooms) == 8 else TOLERANCE
    assert furthest(result.frames, diffusers_frames(tiny_checkpoint, request)) <= tolerance


@pytest.mark.parametrize("execution", ["sequential", "parallel"])
def test_every_input_on_several_devices(
    tiny_checkpoint: Path, make_request: Request, diffusers_frames: Reference, last_picture: torch.Tensor, execution: str
) -> None:
    """One engine, one run after another: batch, last image, no guidance, and back."""
    expert = TinyExpert(tiny_checkpoint)
    rooms = [4.2, 1.2] if execution == "sequential" else [5.2, 3.2]
    sliders = expert.sliders(make_request(batch_size=2).shape, [room * expert.block_bytes for room in rooms])
    handle = open_model(tiny_checkpoint, weight_dtype="fp32", execution=execution, max_memory_gib=sliders)
    with ImaginedGpus():
        engine = ImageToVideo(ModelOwner(), lambda: imagined_machine(2))
        for changes in ({"batch_size": 2}, {"last_image": last_picture}, {"guidance_scale": 1.0}, {"num_frames": 1}, {}):
            request = make_request(**changes)
            result = engine(handle, request, vae=HostVae(tiny_checkpoint))
            assert homes_in_use(engine) == {0, 1, HOST}, result.placement
            assert furthest(result.frames, diffusers_frames(tiny_checkpoint, request)) <= TOLERANCE


def test_the_models_own_vae_on_a_gpu(tiny_checkpoint: Path, make_request: Request, diffusers_frames: Reference) -> None:
    with ImaginedGpus():
        engine = ImageToVideo(ModelOwner(), lambda: imagined_machine(2))
        result = engine(open_model(tiny_checkpoint, weight_dtype="fp32"), make_request())
    assert furthest(result.frames, diffusers_frames(tiny_checkpoint, make_request())) <= TOLERANCE


def test_bf16_on_several_devices(tiny_checkpoint_bf16: Path, make_request: Request, diffusers_frames: Reference) -> None:
    request = make_request()
    expert = TinyExpert(tiny_checkpoint_bf16, "default")
    sliders = expert.sliders(request.shape, [4.2 * expert.block_bytes, 1.2 * expert.block_bytes])
    with ImaginedGpus():
        engine = ImageToVideo(ModelOwner(), lambda: imagined_machine(2))
        result = engine(open_model(tiny_checkpoint_bf16, max_memory_gib=sliders), request, vae=HostVae(tiny_checkpoint_bf16))
        assert homes_in_use(engine) == {0, 1, HOST}, result.placement
    assert furthest(result.frames, diffusers_frames(tiny_checkpoint_bf16, request, dtype=torch.bfloat16)) <= TOLERANCE


def test_fp32_checkpoints_become_bf16_on_gpus(tiny_checkpoint: Path, make_request: Request, diffusers_frames: Reference) -> None:
    with ImaginedGpus():
        engine = ImageToVideo(ModelOwner(), lambda: imagined_machine(2))
        result = engine(open_model(tiny_checkpoint), make_request(), vae=HostVae(tiny_checkpoint))
    assert "Note: Weights stored in fp32 are kept in bf16, as Wan was trained." in result.placement
    assert furthest(result.frames, diffusers_frames(tiny_checkpoint, make_request(), dtype=torch.bfloat16)) <= TOLERANCE
