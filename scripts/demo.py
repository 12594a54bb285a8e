"""One video through a real ComfyUI server, on any machine, without a GPU and without downloading a model: ``make demo``.

Starts ComfyUI with this pack in it, gives it a tiny random Wan 2.2 checkpoint, queues the example workflow (API format) made small, follows
it over the websocket, and checks the file that comes out. The weights are random, so the video is coloured noise: what is shown is that the
whole path works, from a queued prompt to an mp4. Needs what scripts/setup_env.py installs.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from comfy_client import Event, PromptFailed, PromptRejected
from comfy_server import TINY_MODEL, ComfyServer, ServerError, prepare_base
from contact_sheet import contact_sheet, read_video
from setup_env import ROOT, WORK

WORKFLOW = ROOT / "example_workflows" / "api" / "wan_i2v.json"
# Small enough for any CPU; the example itself is 832 x 480, 81 frames, 20 steps.
WIDTH, HEIGHT, LENGTH, STEPS, FPS = 128, 96, 17, 4, 16


class DemoError(Exception):
    """The demo did not do what it promises."""


def say(message: str) -> None:
    print(f"[demo] {message}", flush=True)


def node_of(prompt: dict[str, Any], class_type: str) -> dict[str, Any]:
    """The inputs of the one node of this type."""
    (node,) = [node for node in prompt.values() if node["class_type"] == class_type]
    return node["inputs"]


def combo_choices(server: ComfyServer, node_id: str, input_name: str) -> list[str]:
    """What a combo offers, according to ``/object_info``."""
    info = server.object_info(node_id)
    if node_id not in info:
        raise DemoError(f"ComfyUI has no node {node_id}: the pack did not load.")
    kind, *options = info[node_id]["input"]["required"][input_name]
    return kind if isinstance(kind, list) else options[0]["options"]


def make_prompt(server: ComfyServer) -> dict[str, Any]:
    """The example workflow with the tiny model and small numbers; everything else as it is in the file."""
    prompt = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    choices = combo_choices(server, "WanShardedLoader", "model")
    tiny = [choice for choice in choices if TINY_MODEL in choice]
    if not tiny:
        raise DemoError(f"the loader does not offer the model folder {TINY_MODEL}; it offers {choices}")
    node_of(prompt, "WanShardedLoader")["model"] = tiny[0]
    node_of(prompt, "WanShardedI2VSampler").update(width=WIDTH, height=HEIGHT, length=LENGTH, steps=STEPS)
    node_of(prompt, "WanShardedVideoExport").update(fps=FPS)
    return prompt


def progress_printer(prompt: dict[str, Any]):
    """A listener that prints what the server reports: the node at work, its steps, previews."""
    titles = {node_id: node.get("_meta", {}).get("title", node["class_type"]) for node_id, node in prompt.items()}
    shown: set[tuple[str, object]] = set()

    def show(event: Event) -> None:
        if event.kind == "executing" and event.data.get("node"):
            say(f"  {titles.get(event.data['node'], event.data['node'])}")
        elif event.kind == "progress":
            step = (str(event.data.get("node")), event.data["value"])
            if step not in shown:
                shown.add(step)
                say(f"    {event.data['value']} of {event.data['max']}")
        elif event.kind == "preview":
            say(f"    preview picture, {len(event.image)} bytes")

    return show


def check_video(file: Path) -> Path:
    """Check size, frame count and rate of the written file by decoding it; returns the contact sheet's path.

    Raises:
        DemoError: the file is not what was asked for.
    """
    video = read_video(file)
    wanted = (WIDTH, HEIGHT, LENGTH, float(FPS))
    found = (video.width, video.height, len(video.frames), video.fps)
    if found != wanted:
        raise DemoError(f"{file} has (width, height, frames, fps) {found}, asked for {wanted}")
    if all(frame.tobytes() == video.frames[0].tobytes() for frame in video.frames):
        raise DemoError(f"all frames of {file} are the same")
    say(f"{file.name}: {video.width} x {video.height}, {len(video.frames)} frames, {video.fps:g} fps, {video.codec}: as asked")
    sheet = file.with_name(f"{file.stem.rstrip('_')}_frames.png")
    contact_sheet(video.frames).save(sheet)
    return sheet


def tiny_checkpoint(folder: Path) -> Path:
    """The tiny checkpoint, made in a process of its own unless an earlier run left the same.

    Raises:
        DemoError: it could not be made.
    """
    script = ROOT / "scripts" / "tiny_checkpoint.py"
    stamp = folder / "made_by.sha256"
    digest = hashlib.sha256(script.read_bytes()).hexdigest()
    if stamp.is_file() and stamp.read_text() == digest:
        return folder
    say("making a tiny Wan 2.2 checkpoint with random weights")
    # Its output is held back: importing the libraries prints warnings that don't matter here.
    result = subprocess.run([sys.executable, str(script), str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise DemoError(f"the checkpoint could not be made:\n{result.stdout[-4000:]}")
    stamp.write_text(digest)
    return folder


def run_demo(base_dir: Path) -> tuple[Path, Path]:
    """Make the video; returns its path and the contact sheet's.

    Raises:
        DemoError, ServerError, PromptRejected, PromptFailed: something did not work; the message says what.
    """
    prepare_base(base_dir, tiny_checkpoint(base_dir / "tiny_checkpoint"))
    server = ComfyServer(base_dir)
    say(f"starting ComfyUI, log in {server.log_path}")
    try:
        with server:
            say(f"ComfyUI runs at {server.url}")
            prompt = make_prompt(server)
            say(f"queueing {WORKFLOW.relative_to(ROOT)} with {TINY_MODEL}, {WIDTH} x {HEIGHT}, {LENGTH} frames, {STEPS} steps")
            with server.listen(progress_printer(prompt)):
                started = time.monotonic()
                entry = server.run(prompt, timeout_s=600)
                say(f"done in {time.monotonic() - started:.1f} s")
            videos = [file for file in server.outputs(entry) if file.suffix == ".mp4"]
            if len(videos) != 1 or not videos[0].is_file():
                raise DemoError(f"expected one mp4 among the outputs, got {entry['outputs']}")
            return videos[0], check_video(videos[0])
    except (DemoError, PromptFailed, PromptRejected, TimeoutError):
        say(f"the end of {server.log_path}:\n{server.log_tail()}")
        raise


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-dir", type=Path, default=WORK / "demo", help="the server's models, input and output folders")
    arguments = parser.parse_args()
    try:
        video, sheet = run_demo(arguments.base_dir)
    except (DemoError, ServerError, PromptFailed, PromptRejected, TimeoutError) as error:
        say(f"FAILED: {error}")
        return 1
    say("The weights are random, so the video shows coloured noise.")
    say(f"video:         {video}")
    say(f"contact sheet: {sheet}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
