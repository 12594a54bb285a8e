"""The "Video Export" node."""

from typing import Any

from comfy_api.latest import io

from ..bridge import exporting
from ..engine.video.formats import DEFAULT_FORMAT, FORMATS
from .schema import CATEGORY, schema


class WanShardedVideoExport(io.ComfyNode):
    """Write frames to a video file, or to a folder of pictures, in ComfyUI's output folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WanShardedVideoExport",
            display_name="Video Export",
            category=CATEGORY,
            description="Writes frames to a video file that carries this workflow, and shows it.",
            search_aliases=[
                "save video",
                "video combine",
                "export_to_video",
                "mp4",
                "h264",
                "h265",
                "av1",
                "webm",
                "prores",
                "gif",
                "webp",
                "png sequence",
            ],
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
                    tooltip="Container and codec. mp4 (H.264) plays everywhere; webm, ProRes, FFV1, gif, webp and PNG keep transparency; ProRes and FFV1 are for editing. NVENC encodes on an NVIDIA GPU.",
                ),
                io.Int.Input(
                    "quality",
                    default=19,
                    min=0,
                    max=51,
                    tooltip="Lower is better and larger; 17 to 23 is usual. H.264's CRF; other formats get their number that looks alike. Without effect on ProRes, FFV1, gif and PNG. 0 makes a special kind of H.264 that many players cannot show; use 1 or more for files to share.",
                ),
                io.Audio.Input(
                    "audio", optional=True, tooltip="Sound to put under the video, cut to its length. gif, webp and PNG have none."
                ),
                io.Boolean.Input(
                    "pingpong", optional=True, default=False, tooltip="Play forwards, then backwards, so that a loop has no jump."
                ),
                io.Int.Input(
                    "loop_count", optional=True, default=0, min=0, max=65535, tooltip="How often gif and webp are played; 0 is for ever."
                ),
                io.Boolean.Input(
                    "save_output",
                    optional=True,
                    default=True,
                    tooltip="Off: write to ComfyUI's temp folder, which is emptied when ComfyUI starts.",
                ),
                io.Boolean.Input(
                    "first_frame_png",
                    optional=True,
                    default=False,
                    tooltip="Write the first frame beside it as a PNG of the same name that carries the workflow.",
                ),
                io.Float.Input(
                    "bitrate_mbps",
                    optional=True,
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    tooltip="Megabits per second instead of quality, for H.264, H.265, AV1 and VP9; 0 goes by quality.",
                ),
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
        pingpong: bool = False,
        loop_count: int = 0,
        save_output: bool = True,
        first_frame_png: bool = False,
        bitrate_mbps: float = 0.0,
    ) -> io.NodeOutput:
        video, path, ui = exporting.export(
            images=images,
            fps=fps,
            filename_prefix=filename_prefix,
            format=format,
            quality=quality,
            audio=audio,
            pingpong=pingpong,
            loop_count=loop_count,
            save_output=save_output,
            first_frame_png=first_frame_png,
            bitrate_mbps=bitrate_mbps,
            prompt=cls.hidden.prompt,
            extra_pnginfo=cls.hidden.extra_pnginfo,
        )
        return io.NodeOutput(video, path, ui=ui)
