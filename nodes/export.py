"""The "Video Export" node."""

from typing import Any

from comfy_api.latest import io

from ..bridge import exporting
from ..engine.video.formats import DEFAULT_FORMAT, FORMATS
from .schema import CATEGORY, schema


class WanShardedVideoExport(io.ComfyNode):
    """Write frames to a video file in ComfyUI's output folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WanShardedVideoExport",
            display_name="Video Export",
            category=CATEGORY,
            description="Writes frames to a video file that carries this workflow, and shows it.",
            search_aliases=["save video", "video combine", "export_to_video", "mp4", "h264"],
            inputs=[
                io.Image.Input("images", tooltip="The frames, from Wan I2V Sampler or any node that gives images."),
                io.Float.Input("fps", default=16.0, min=0.01, max=1000.0, step=0.01, tooltip="Frames per second. Wan 2.2 14B makes 16."),
                io.String.Input(
                    "filename_prefix",
                    default="video/wan",
                    tooltip="Folder and beginning of the file name inside ComfyUI's output folder. %year%, %month%, %day%, %width% and %height% are filled in; %date:yyyy-MM-dd% only by ComfyUI's page, not in prompts sent to the API.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    default=DEFAULT_FORMAT,
                    tooltip="Container and codec. This version writes mp4 (H.264) only.",
                ),
                io.Int.Input(
                    "quality",
                    default=19,
                    min=0,
                    max=51,
                    tooltip="Constant rate factor (CRF): lower is better and larger. 17 to 23 is usual. 0 makes a special kind of H.264 that many players cannot show; use 1 or more for files to share.",
                ),
                io.Audio.Input("audio", optional=True, tooltip="Sound to put under the video, cut to its length."),
            ],
            outputs=[
                io.Video.Output(display_name="video", tooltip="The written file, for core's video nodes."),
                io.String.Output(display_name="path", tooltip="Where the file was written."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        images: Any,
        fps: float = 16.0,
        filename_prefix: str = "video/wan",
        format: str = DEFAULT_FORMAT,
        quality: int = 19,
        audio: Any = None,
    ) -> io.NodeOutput:
        video, path, ui = exporting.export(
            images=images,
            fps=fps,
            filename_prefix=filename_prefix,
            format=format,
            quality=quality,
            audio=audio,
            prompt=cls.hidden.prompt,
            extra_pnginfo=cls.hidden.extra_pnginfo,
        )
        return io.NodeOutput(video, path, ui=ui)
