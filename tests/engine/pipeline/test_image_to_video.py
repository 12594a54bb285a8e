"""One run from outside: reports, results, and that whatever stops a run leaves nothing behind that the next one could meet."""

import gc
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers_reference import HostVae
from imagined_gpus import ImaginedGpus
from imagined_machine import TinyExpert, imagined_machine
from PIL import Image
from safetensors.torch import load_file, save_file
from wan_sharded import engine as engine_package
from wan_sharded.engine import Callbacks, ImageToVideoRequest, ModelHandle, StepReport, as_picture, generate, open_model
from wan_sharded.engine.errors import (
    Cancelled,
    CheckpointError,
    ComputationError,
    InvalidRequestError,
    PlacementError,
    UnsupportedError,
    WanShardedError,
)  # fmt: skip
from wan_sharded.engine.owner import ModelOwner
from wan_sharded.engine.pipeline.image_to_video import ImageToVideo
from wan_sharded.engine.planning.placement import HOST

Request = Callable[..., ImageToVideoRequest]


@pytest.fixture
def quick(make_request: Request) -> Request:
    """Two steps, one by each expert, without guidance."""

    def make(**changes: object) -> ImageToVideoRequest:
        return make_request(**{"num_inference_steps": 2, "switch_step": 1, "guidance_scale": 1.0, **changes})

    return make


# ---- what a run gives and tells


def test_steps_are_reported(tiny_checkpoint: Path, make_request: Request) -> None:
    reports: list[StepReport] = []
    request = make_request(num_inference_steps=4, switch_step=2, batch_size=2, guidance_scale=3.0, guidance_scale_2=1.0)
    result = ImageToVideo(ModelOwner())(open_model(tiny_checkpoint), request, Callbacks(on_step=reports.append))
    assert [(report.step, report.steps) for report in reports] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [report.expert for report in reports] == ["high noise expert"] * 2 + ["low noise expert"] * 2
    assert [(report.forwards, report.forwards_left) for report in reports] == [(2, 4), (2, 2), (1, 1), (1, 0)]
    assert [report.expert_to_come for report in reports] == ["low noise expert"] * 2 + [""] * 2
    assert tuple(report.seconds for report in reports) == result.step_seconds
    assert all(0 <= report.loading_seconds < report.seconds for report in reports)
    # Each expert is loaded in its first step.
    assert min(reports[0].loading_seconds, reports[2].loading_seconds) > max(reports[1].loading_seconds, reports[3].loading_seconds)
    assert all(report.denoised.shape == (2, 16, 2, 6, 8) for report in reports)
    # After the last step no noise is left, so what is expected is what there is.
    config = HostVae(tiny_checkpoint).config
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    assert torch.allclose(reports[-1].denoised * std + mean, result.latents, atol=1e-5)


def test_what_a_run_gives(tiny_checkpoint: Path, quick: Request) -> None:
    result = ImageToVideo(ModelOwner())(open_model(tiny_checkpoint), quick(batch_size=2))
    assert result.frames.shape == (10, 48, 64, 3) and result.frames.dtype == torch.float32
    assert 0 <= float(result.frames.min()) < float(result.frames.max()) <= 1
    assert result.latents.shape == (2, 16, 2, 6, 8) and result.latents.dtype == torch.float32
    assert not result.frames.requires_grad
    assert result.placement.startswith("fp32, planned for 64x48x5 x2;")
    assert any("2 steps in" in note for note in result.notes)


def test_a_picture_of_another_shape_is_cut_and_said(tiny_checkpoint: Path, quick: Request) -> None:
    wide = torch.rand(48, 200, 3)
    result = ImageToVideo(ModelOwner())(open_model(tiny_checkpoint), quick(image=wide, last_image=wide))
    assert "image is 200x48; its edges were cut to the shape of 64x48." in result.notes
    assert "last_image is 200x48; its edges were cut to the shape of 64x48." in result.notes


def test_loading_is_told_once_for_each_expert(tiny_checkpoint: Path, quick: Request) -> None:
    told: list[tuple[int, int, str]] = []
    engine, handle = ImageToVideo(ModelOwner()), open_model(tiny_checkpoint)
    engine(handle, quick(), Callbacks(on_load=lambda *event: told.append(event)))
    for name in ("high noise expert", "low noise expert"):
        counts = [(done, total) for done, total, what in told if what == name]
        assert counts[0][0] == 0 and counts[-1][0] == counts[-1][1]
        assert counts == sorted(counts)
    told.clear()
    engine(handle, quick(), Callbacks(on_load=lambda *event: told.append(event)))
    assert not [event for event in told if event[0] < event[1]]


def test_from_python(tiny_checkpoint: Path, quick: Request) -> None:
    """The front door of the README, with the process's one owner."""
    photo = Image.new("RGB", (64, 48), (200, 100, 50))
    small = {"width": 64, "height": 48, "num_frames": 5, "num_inference_steps": 2, "seed": 3}
    try:
        result = generate(open_model(tiny_checkpoint), photo, "a boat", **small)
        again = generate(
            open_model(str(tiny_checkpoint)), torch.tensor([200, 100, 50], dtype=torch.uint8).expand(48, 64, 3), "a boat", **small
        )
        assert torch.equal(result.frames, again.frames)
        assert engine_package.OWNER.loaded is not None
        with pytest.raises(InvalidRequestError, match="steps is 0"):
            generate(open_model(tiny_checkpoint), photo, "a boat", **{**small, "num_inference_steps": 0})
    finally:
        engine_package.OWNER.release()


def test_in_any_thread_and_mode(tiny_checkpoint: Path, quick: Request) -> None:
    """ComfyUI runs prompts in a worker thread under inference mode; Python users run them anywhere. Two at once take turns."""
    engine, handle = ImageToVideo(ModelOwner()), open_model(tiny_checkpoint)
    expected = {seed: engine(handle, quick(seed=seed)).frames for seed in (1, 2)}
    found: dict[int, torch.Tensor] = {}

    def work(seed: int) -> None:
        with torch.inference_mode(seed == 1):
            found[seed] = engine(handle, quick(seed=seed)).frames

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], expected[seed]) for seed in (1, 2))


# ---- stopped at any moment


class Stop(Exception):
    """What ComfyUI 0.3 to 0.8 raises when the user cancels."""


class StopNow(BaseException):
    """What newer ones raise."""


class StopAfter:
    """``check_cancelled`` that raises at its nth call."""

    def __init__(self, calls: int | None = None, error: type[BaseException] = Stop):
        self.left, self.error, self.calls = calls, error, 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == self.left:
            raise self.error


def cancel_everywhere(engine: ImageToVideo, handle: ModelHandle, request: ImageToVideoRequest, stops: int, **run: object) -> None:
    """Stop runs at moments spread over their whole length; each time, the next run must be as if nothing had been."""
    engine.owner.release()
    engine._embeddings.__init__()
    counter = StopAfter()
    expected = engine(handle, request, Callbacks(check_cancelled=counter), **run).frames
    moments = sorted({1 + round(i * (counter.calls - 1) / (stops - 1)) for i in range(stops)})
    assert len(moments) == stops, f"only {counter.calls} moments"
    for number, moment in enumerate(moments):
        if number % 3 == 0:  # every third time, the weights have to be loaded first
            engine.owner.release()
        if number % 4 == 0:  # and the prompt to be encoded
            engine._embeddings.__init__()
        error = (Stop, StopNow)[number % 2]
        stop = StopAfter(moment, error)
        try:
            engine(handle, request, Callbacks(check_cancelled=stop), **run)
        except error:
            assert stop.calls == moment
        else:
            assert stop.calls < moment, "the stop was lost"
        again = engine(handle, request, Callbacks(), **run).frames
        assert torch.equal(again, expected), f"after a stop at {moment} of {counter.calls}"


def test_cancel_at_any_moment(tiny_checkpoint: Path, quick: Request) -> None:
    cancel_everywhere(ImageToVideo(ModelOwner()), open_model(tiny_checkpoint), quick(), stops=15)


@pytest.mark.usefixtures("steady_shares")
@pytest.mark.parametrize("offload", ["auto", "cpu"])
def test_cancel_at_any_moment_on_several_devices(tiny_checkpoint: Path, quick: Request, offload: str) -> None:
    """With weights on their way between devices, and blocks half fetched."""
    expert = TinyExpert(tiny_checkpoint)
    sliders = expert.sliders(quick().shape, [4.2 * expert.block_bytes, 1.2 * expert.block_bytes] if offload == "auto" else [10**7] * 2)
    handle = open_model(tiny_checkpoint, weight_dtype="fp32", offload=offload, max_memory_gib=sliders)
    with ImaginedGpus() as gpus:
        engine = ImageToVideo(ModelOwner(), lambda: imagined_machine(2))
        vae = HostVae(tiny_checkpoint)
        cancel_everywhere(engine, handle, quick(), stops=10, vae=vae)
        assert HOST in engine.owner.loaded.plan.placements["transformer"].homes.values()
        live = {index: gpus.live_bytes(index) for index in range(2)}
        for moment in (2, 5, 9):
            with pytest.raises(Stop):
                engine(handle, quick(), Callbacks(check_cancelled=StopAfter(moment)), vae=vae)
            engine(handle, quick(), vae=vae)
        gc.collect()
        assert {index: gpus.live_bytes(index) for index in range(2)} == live, "nothing piles up"
        engine.owner.release()
        gc.collect()
        assert gpus.live_bytes(0) == gpus.live_bytes(1) == 0


def test_the_callback_of_an_earlier_run_is_never_asked(tiny_checkpoint: Path, quick: Request) -> None:
    """The weights stay dispatched between runs; the hooks on them must ask whoever runs now."""
    engine, handle = ImageToVideo(ModelOwner()), open_model(tiny_checkpoint)
    first, second = StopAfter(), StopAfter()
    engine(handle, quick(), Callbacks(check_cancelled=first))
    before = first.calls
    engine(handle, quick(), Callbacks(check_cancelled=second))
    assert first.calls == before
    assert second.calls >= 2 * 5, "once for each block and step"


@pytest.mark.parametrize("name", ["on_stage", "on_load", "on_step"])
@pytest.mark.parametrize("error", [RuntimeError, OSError, StopNow, Cancelled])
def test_an_error_in_a_callback(tiny_checkpoint: Path, quick: Request, name: str, error: type[BaseException]) -> None:
    """It arrives as it is, and the next run works."""
    engine, handle = ImageToVideo(ModelOwner()), open_model(tiny_checkpoint)
    expected = ImageToVideo(ModelOwner())(handle, quick()).frames

    def fail(*_: object) -> None:
        raise error("the page is gone")

    with pytest.raises(error, match="the page is gone"):
        engine(handle, quick(), Callbacks(**{name: fail}))
    assert torch.equal(engine(handle, quick()).frames, expected)


# ---- bad input, then good


def truncate_expert(model: Path) -> None:
    file = model / "transformer_2" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def test_a_bad_model_does_not_disturb_a_good_one(tiny_checkpoint: Path, tmp_path: Path, quick: Request) -> None:
    engine, handle = ImageToVideo(ModelOwner()), open_model(tiny_checkpoint)
    expected = engine(handle, quick()).frames
    loaded = engine.owner.loaded
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    (copy / "transformer" / "config.json").write_text(
        (copy / "transformer" / "config.json").read_text().replace('"ffn_dim": 96', '"ffn_dim": 80')
    )
    with pytest.raises(CheckpointError, match=r"\(config.json\) wants"):
        engine(open_model(copy), quick())
    assert engine.owner.loaded is loaded, "still there"
    assert torch.equal(engine(handle, quick()).frames, expected)


def test_a_file_that_breaks_after_the_loader_node(tiny_checkpoint: Path, tmp_path: Path, quick: Request) -> None:
    """Handles live in ComfyUI's cache for hours."""
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    handle = open_model(copy)
    truncate_expert(copy)
    engine = ImageToVideo(ModelOwner())
    with pytest.raises(CheckpointError, match="could not be read .* Download it again"):
        engine(handle, quick())
    shutil.rmtree(copy)
    with pytest.raises(CheckpointError):
        engine(handle, quick())
    assert torch.isfinite(engine(open_model(tiny_checkpoint), quick()).frames).all()


@pytest.mark.usefixtures("steady_shares")
def test_sizes_and_sliders_that_cannot_be(tiny_checkpoint: Path, quick: Request) -> None:
    with ImaginedGpus():
        engine = ImageToVideo(ModelOwner(), lambda: imagined_machine(2))
        vae = HostVae(tiny_checkpoint)
        handle = open_model(tiny_checkpoint, weight_dtype="fp32")
        expected = engine(handle, quick(), vae=vae).frames
        bad: list[tuple[dict, dict, str]] = [
            ({}, {"width": 16384, "height": 16384, "num_frames": 4093}, "of system memory for its frames"),
            ({0: -1, 1: -1}, {}, "Every GPU is left out"),
            ({0: 0.5, 1: 0.5}, {}, "It fits with the slider of GPU"),
            ({0: 2, 1: 2}, {"width": 1280, "height": 720, "num_frames": 4001}, "length "),
        ]
        for sliders, size, words in bad:
            with pytest.raises(PlacementError) as caught:
                engine(open_model(tiny_checkpoint, weight_dtype="fp32", max_memory_gib=sliders), quick(**size), vae=vae)
            assert words in str(caught.value)
            assert torch.equal(engine(handle, quick(), vae=vae).frames, expected)


def test_an_absurd_size_on_the_cpu(tiny_checkpoint: Path, quick: Request) -> None:
    """Without the check, the operating system would end the process."""
    engine = ImageToVideo(ModelOwner())
    with pytest.raises(PlacementError, match="are free"):
        engine(open_model(tiny_checkpoint), quick(width=16384, height=16384, num_frames=401))


def test_every_error_of_ours_is_one_family() -> None:
    assert all(issubclass(kind, WanShardedError) for kind in (Cancelled, CheckpointError, InvalidRequestError, PlacementError))
    assert issubclass(InvalidRequestError, ValueError)
    with pytest.raises(ValueError, match="empty batch"):
        as_picture(torch.zeros(0, 4, 4, 3))


def test_values_that_are_no_numbers_stop_the_run(tmp_path: Path, tiny_checkpoint: Path, quick: Request) -> None:
    """At the step that gave them, not with a black video at the end."""
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_checkpoint, folder)
    (file,) = (folder / "transformer_2").glob("*.safetensors")
    tensors = load_file(file)
    tensors["proj_out.bias"][0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    reports: list[StepReport] = []
    with pytest.raises(ComputationError, match=r"Step 2 \(low noise expert\) gave values that are no numbers.*download it again"):
        ImageToVideo(ModelOwner())(open_model(folder), quick(), Callbacks(on_step=reports.append))
    assert len(reports) == 1


def test_a_file_that_is_written_to_while_the_cpu_computes_from_it(tmp_path: Path, tiny_checkpoint: Path, make_request: Request) -> None:
    """A download that begins again under its name: the run ends, rather than going on with another model's weights."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, folder)
    (file,) = (folder / "transformer").glob("*.safetensors")
    engine, handle = ImageToVideo(ModelOwner()), open_model(folder, weight_dtype="fp32")
    before = file.stat()

    def write(_: StepReport) -> None:
        with file.open("r+b") as opened:
            opened.seek(before.st_size - 64)
            opened.write(bytes(64))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))

    request = make_request(num_inference_steps=3, switch_step=2, guidance_scale=1.0)
    with pytest.raises(CheckpointError, match=r"was changed after it was chosen. Run again"):
        engine(handle, request, Callbacks(on_step=write))
    again = engine(open_model(folder, weight_dtype="fp32"), request)
    assert torch.isfinite(again.frames).all()


def test_a_gpu_without_bf16_has_the_model_compute_in_fp16(tiny_checkpoint: Path, quick: Request) -> None:
    machine = imagined_machine(2)
    old = replace(machine, devices=(replace(machine.devices[0], compute_capability=(7, 5)), machine.devices[1]))
    handle = open_model(tiny_checkpoint)
    plan = ModelOwner().dry_plan(handle, old, quick().shape)
    assert plan.precision.dtype == torch.float16
    assert any(note.startswith(old.devices[0].label) and "computes in fp16" in note for note in plan.notes)
    without = ModelOwner().dry_plan(replace(handle, max_memory_gib={0: -1}), old, quick().shape)
    assert without.precision.dtype == torch.bfloat16 and not any("fp16" in note for note in without.notes)
    with pytest.raises(UnsupportedError, match=r"weight_dtype is bf16, which .* cannot compute in. Choose default, fp16"):
        ModelOwner().dry_plan(replace(handle, weight_dtype="bf16"), old, quick().shape)
