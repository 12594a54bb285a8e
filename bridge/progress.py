"""Progress bars, the live picture and cancel, through ComfyUI."""

import time
from collections.abc import Callable

import comfy.model_management as management
import comfy.utils
import torch

from ..engine import Callbacks, StepReport
from ..engine.planning.devices import gib
from .pace import Pace
from .preview import LivePreview
from .status import show_on_node

# Steps faster than this don't each bring a picture: decoding more moving pictures than anybody can see keeps the browser from everything
# else, its Cancel button included.
PICTURE_EVERY_S = 0.5


class DownloadProgress:
    """Shows a download on the loader node."""

    def __init__(self, node_id: str | None):
        self._node_id = node_id
        self._bar: comfy.utils.ProgressBar | None = None
        self._shown = -1

    def __call__(self, done: int, total: int) -> None:
        management.throw_exception_if_processing_interrupted()
        percent = 100 * done // max(total, 1)
        if percent != self._shown:
            self._shown = percent
            self._bar = self._bar or comfy.utils.ProgressBar(100)
            self._bar.update_absolute(percent, 100)
            show_on_node(self._node_id, f"Downloading: {gib(done)} of {gib(total)}")


class RunProgress:
    """Shows a run on the sampler node: the bar counts denoising steps, the text says what else is going on."""

    def __init__(self, node_id: str | None, steps: int, now: Callable[[], float] = time.monotonic):
        self._node_id = node_id
        self._now, self._shown_at = now, float("-inf")
        self._bar = comfy.utils.ProgressBar(steps)
        self._preview: LivePreview | None = None
        self._pace = Pace()

    @property
    def callbacks(self) -> Callbacks:
        return Callbacks(
            check_cancelled=management.throw_exception_if_processing_interrupted,
            on_stage=lambda words: show_on_node(self._node_id, f"{words} ..."),
            on_load=self._on_load,
            on_step=self._on_step,
        )

    def _on_load(self, done: int, total: int, what: str) -> None:
        show_on_node(self._node_id, f"Loading the {what}: {done} of {total} parts")

    def _on_step(self, report: StepReport) -> None:
        words, now = self._pace.words(report), self._now()
        if now - self._shown_at < PICTURE_EVERY_S and report.step < report.steps:
            self._bar.update_absolute(report.step, report.steps)
            return
        self._shown_at = now
        show_on_node(self._node_id, words)
        device: torch.device = report.denoised.device
        self._preview = self._preview or LivePreview(device)
        self._bar.update_absolute(report.step, report.steps, self._preview.picture(report))
