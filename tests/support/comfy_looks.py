"""What a user may have on the screen, and what the tests do there with ComfyUI's page.

The GPUs are imitated in the page, by editing what the server says about the sliders; everything else is real.
"""

from dataclasses import dataclass
from typing import Any

from comfy_server import TINY_MODEL
from frontends import BUNDLED, NEW_FRONTEND

LOADER, SAMPLER, EXPORT = "WanShardedLoader", "WanShardedI2VSampler", "WanShardedVideoExport"
GPUS = {0: [], 1: ["RTX 5060 Ti 16 GB"], 2: ["RTX 5060 Ti 16 GB", "RTX 3060 12 GB"], 4: ["H200 141 GB"] * 4, 8: ["H200 141 GB"] * 8}


@dataclass(frozen=True)
class Look:
    """A frontend, in one of its two ways to draw nodes."""

    frontend: str
    nodes_2: bool

    def __str__(self) -> str:
        return f"{self.frontend}-{'nodes2' if self.nodes_2 else 'classic'}"


LOOKS = [Look(frontend, nodes_2) for frontend in (BUNDLED, NEW_FRONTEND) for nodes_2 in (False, True)]


def shown_sliders(page: Any) -> list[str]:
    """The GPU sliders that are not hidden, by their labels."""
    return page.on_node(LOADER, "node.widgets.filter((w) => /^gpu/.test(w.name) && !w.hidden).map((w) => w.label)")


def loader_of(workflow: dict[str, Any]) -> dict[str, Any]:
    """The loader node in a saved workflow."""
    (node,) = [node for node in workflow["nodes"] if node["type"] == LOADER]
    return node


def make_small(page: Any, seed: int) -> None:
    """The tiny checkpoint, and numbers small enough for a CPU. A seed of its own keeps ComfyUI's cache out of it."""
    page.set_values(LOADER, model=TINY_MODEL)
    page.set_values(SAMPLER, width=128, height=96, length=17, steps=4, seed=seed)


def watch_progress(page: Any) -> None:
    """Count what the server tells the page from now on, in ``window.seen``."""
    page.page.evaluate(
        """() => {
            window.seen = { progress: 0, preview: 0, moving: 0, status: [] };
            app.api.addEventListener("progress", () => window.seen.progress++);
            app.api.addEventListener("b_preview", async ({ detail: blob }) => {
                window.seen.preview++;
                const image = new ImageDecoder({ data: await blob.arrayBuffer(), type: blob.type });
                await image.tracks.ready;
                if (image.tracks.selectedTrack.animated && image.tracks.selectedTrack.frameCount > 1) window.seen.moving++;
            });
            app.api.addEventListener("wan_sharded.status", ({ detail }) => window.seen.status.push(detail.text));
            for (const end of ["execution_success", "execution_error", "execution_interrupted"])
                app.api.addEventListener(end, ({ detail }) => (window.seen.end = [end, detail]));
        }"""
    )


def press_run(page: Any) -> None:
    """Click "Run", as it is called in every look."""
    page.page.get_by_role("button", name="Run", exact=True).click()


def wait_for_success(page: Any) -> None:
    """Wait until the prompt that :func:`watch_progress` watches has ended well."""
    page.page.wait_for_function("() => window.seen.end", timeout=120_000)
    ended, detail = page.page.evaluate("() => window.seen.end")
    assert ended == "execution_success", detail


def wait_for_video(page: Any) -> list[int]:
    """Wait until a video can play; its width and height."""
    page.page.wait_for_function("() => [...document.querySelectorAll('video')].some((video) => video.readyState >= 2)", timeout=30_000)
    return page.page.evaluate("() => { const v = document.querySelector('video'); return [v.videoWidth, v.videoHeight]; }")
