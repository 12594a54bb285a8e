"""The live picture with ComfyUI's own previewers: what is sent, how large it is, what happens when it fails."""

import asyncio
import io
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file

cli_args = pytest.importorskip("comfy.cli_args", reason="put a ComfyUI folder on PYTHONPATH to run this")
if not torch.cuda.is_available():
    cli_args.args.cpu = True  # before comfy.model_management looks for a GPU

import comfy.model_management as management  # noqa: E402
import comfy.utils  # noqa: E402
import folder_paths  # noqa: E402
import latent_preview  # noqa: E402
from comfy.cli_args import LatentPreviewMethod, args  # noqa: E402
from comfy.latent_formats import Wan21  # noqa: E402
from comfy.taesd.taehv import TAEHV  # noqa: E402
from server import PromptServer  # noqa: E402
from wan_sharded.bridge import progress as progress_module  # noqa: E402
from wan_sharded.bridge.preview import MOST_FRAMES, LivePreview  # noqa: E402
from wan_sharded.engine import StepReport  # noqa: E402

CPU = torch.device("cpu")
WORST_BYTES = 300_000


def report(latents: torch.Tensor, seconds: float = 10.0) -> StepReport:
    return StepReport(3, 20, "high noise expert", seconds, 0.0, 1, 17, "", latents)


def noise(frames: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(1, 16, frames, height, width, generator=torch.Generator().manual_seed(0))


def sent(picture: Any) -> bytes:
    """What ComfyUI's server sends of it."""
    messages: list[bytes] = []

    async def send_bytes(event: int, data: bytes, sid: Any = None) -> None:
        messages.append(bytes(data))

    asyncio.run(PromptServer.send_image(SimpleNamespace(send_bytes=send_bytes), picture))  # type: ignore[arg-type]
    return messages[0][4:]


@pytest.mark.parametrize("size", [(21, 60, 104), (21, 90, 160), (41, 60, 104), (5, 6, 8)])
def test_the_whole_video_moves_at_its_speed_and_stays_small(size: tuple[int, int, int]) -> None:
    frames, height, width = size
    preview = LivePreview(CPU)
    png = sent(preview.picture(report(noise(*size))))
    assert len(png) < WORST_BYTES
    animation = Image.open(io.BytesIO(png))
    assert animation.format == "PNG" and animation.is_animated and 2 <= animation.n_frames <= MOST_FRAMES
    assert animation.width / animation.height == pytest.approx(width / height, rel=0.05)
    total_ms = 0.0
    for index in range(animation.n_frames):
        animation.seek(index)
        total_ms += animation.info["duration"]
    assert total_ms / 1000 == pytest.approx((4 * (frames - 1) + 1) / 16, abs=0.05)


def test_frames_are_those_of_the_latents_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    latents = torch.zeros(1, 16, 5, 6, 8) + torch.linspace(-2, 2, 5).view(1, 1, 5, 1, 1)
    preview = LivePreview(CPU)
    monkeypatch.setattr(preview, "_elapsed_ms", lambda: 0.0)
    animation = Image.open(io.BytesIO(sent(preview.picture(report(latents, 1000.0)))))
    assert animation.n_frames == 5
    previewer = latent_preview.Latent2RGBPreviewer(Wan21.latent_rgb_factors, Wan21.latent_rgb_factors_bias)
    for index in range(5):
        animation.seek(index)
        wanted = previewer.decode_latent_to_preview(latents[:, :, index : index + 1]).getpixel((0, 0))
        assert max(abs(a - b) for a, b in zip(animation.convert("RGB").getpixel((0, 0)), wanted, strict=True)) < 4


def test_it_goes_on_where_the_last_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    latents = torch.zeros(1, 16, 5, 6, 8) + torch.linspace(-2, 2, 5).view(1, 1, 5, 1, 1)
    preview = LivePreview(CPU)
    firsts = []
    for elapsed_ms in (0.0, 400.0, 1062.0 + 400.0):
        monkeypatch.setattr(preview, "_elapsed_ms", lambda elapsed_ms=elapsed_ms: elapsed_ms)
        firsts.append(sent(preview.picture(report(latents, 1000.0))))
    pixels = [[pixel_of(png, index) for index in range(5)] for png in firsts]
    assert pixels[1] == pixels[2] == [*pixels[0][2:], *pixels[0][:2]]


def pixel_of(png: bytes, index: int) -> Any:
    animation = Image.open(io.BytesIO(png))
    animation.seek(index)
    return animation.convert("RGB").getpixel((0, 0))


def test_one_frame_is_a_still() -> None:
    kind, picture, largest = LivePreview(CPU).picture(report(noise(1, 6, 8)))
    assert (kind, largest) == ("JPEG", latent_preview.MAX_PREVIEW_RESOLUTION)
    assert picture.size == (8, 6)


def test_who_resizes_it_has_a_picture() -> None:
    _, picture, _ = LivePreview(CPU).picture(report(noise(5, 6, 8), 1000.0))
    resized = ImageOps.contain(picture, (32, 32))
    assert resized.size == (32, 24)
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG")
    assert Image.open(jpeg).size == (8, 6)


@pytest.mark.parametrize("words", [["--preview-method", "none"], ["--preview-method=none"]])
def test_none_is_honoured(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["main.py", *words])
    assert LivePreview(CPU).picture(report(noise(5, 6, 8))) is None


@pytest.mark.parametrize(("asked", "shown"), [("none", False), ("default", True), (None, True)])
def test_the_setting_that_comes_with_a_prompt_is_honoured(monkeypatch: pytest.MonkeyPatch, asked: str | None, shown: bool) -> None:
    item = (0, "id", {}, {"preview_method": asked} if asked else {}, [])
    queue = SimpleNamespace(currently_running={0: item})
    monkeypatch.setattr(PromptServer, "instance", SimpleNamespace(prompt_queue=queue), raising=False)
    assert (LivePreview(CPU).picture(report(noise(5, 6, 8))) is not None) is shown


def test_another_packs_previewer_may_refuse(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """VideoHelperSuite's hook raises for kinds it does not know."""

    def refuse(*_: object) -> None:
        raise Exception("Unsupported preview type for VHS animated previews")

    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.TAESD)
    monkeypatch.setattr(latent_preview, "get_previewer", refuse)
    assert LivePreview(CPU).picture(report(noise(5, 6, 8))) is None
    assert "no live picture" in caplog.text


def test_a_failure_ends_the_preview_and_nothing_else(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    preview = LivePreview(CPU)
    assert preview.picture(report(torch.zeros(1, 3, 5, 6, 8))) is None  # RGB factors are for 16 channels
    assert "live picture failed" in caplog.text
    assert preview.picture(report(noise(5, 6, 8))) is None


class Interrupted(latent_preview.LatentPreviewer):
    def decode_latent_to_preview(self, x0: torch.Tensor) -> Any:
        raise management.InterruptProcessingException


Interrupted.__module__ = latent_preview.__name__


def test_cancel_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Auto)
    monkeypatch.setattr(latent_preview, "get_previewer", lambda *_: Interrupted())
    with pytest.raises(management.InterruptProcessingException):
        LivePreview(CPU).picture(report(noise(5, 6, 8)))


def test_another_packs_previewer_has_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Theirs(latent_preview.LatentPreviewer):
        def decode_latent_to_preview_image(self, preview_format: str, x0: torch.Tensor) -> None:
            seen.append(tuple(x0.shape))

    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Auto)
    monkeypatch.setattr(latent_preview, "get_previewer", lambda *_: Theirs())
    assert LivePreview(CPU).picture(report(noise(5, 6, 8))) is None
    assert seen == [(1, 16, 5, 6, 8)]


def test_a_tiny_autoencoder_is_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """With random weights, read by core's own code from where users put it."""
    torch.manual_seed(0)
    save_file(
        {key: value.contiguous() for key, value in TAEHV(latent_channels=16).state_dict().items()}, tmp_path / "lighttaew2_1.safetensors"
    )
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "vae_approx", ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.TAESD)
    with torch.inference_mode():
        preview = LivePreview(management.get_torch_device())
        kind, picture, _ = preview.picture(report(noise(3, 6, 8), 1000.0))
        frames, durations_ms = preview._frames(noise(3, 6, 8), 30.0)
    assert isinstance(preview._previewer, latent_preview.TAEHVPreviewerImpl)
    assert (kind, picture.size) == ("PNG", (64, 48))
    assert [frame.size for frame in frames] == [(64, 48)] * 3 and durations_ms == [63, 250, 250]


def test_fast_steps_do_not_flood_the_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step every 0.1 s: the bar counts all, pictures and words come twice a second, and at the end."""
    bar: list[tuple[int, bool]] = []
    words: list[str] = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, **_: bar.append((value, preview is not None)))
    monkeypatch.setattr(progress_module, "show_on_node", lambda node_id, text: words.append(text))
    clock = iter(index / 10 for index in range(13))
    shown = progress_module.RunProgress("1", 13, now=lambda: next(clock))
    for step in range(1, 14):
        shown.callbacks.on_step(replace(report(noise(2, 6, 8), 0.1), step=step, steps=13, forwards_left=13 - step))
    assert [value for value, _ in bar] == list(range(1, 14))
    assert [value for value, picture in bar if picture] == [1, 6, 11, 13]
    assert len(words) == 4 and words[-1].startswith("Step 13 of 13")
