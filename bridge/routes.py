"""The pack's HTTP routes: what GPUs there are, and how fast they and their links are, without a model.

``GET /wan_sharded/gpus`` says what there is. ``POST /wan_sharded/calibrate`` measures for some seconds and plans for a size.
"""

import asyncio
import logging
from dataclasses import asdict
from typing import Any

from aiohttp import web
from server import PromptServer

from ..engine import OWNER, Calibration, calibrate, probe
from ..engine.errors import BusyError, InvalidRequestError
from ..engine.planning.bars import as_json
from . import memory
from .loading import DEFAULT_SHAPE, sliders_by_index

logger = logging.getLogger(__name__)

SIZES = {"width": DEFAULT_SHAPE.width, "height": DEFAULT_SHAPE.height, "length": DEFAULT_SHAPE.num_frames}
CHOICES = {"weight_dtype": "default", "device_map": "balanced", "execution": "auto", "offload": "auto"}
SLIDERS = tuple(f"gpu{index}_gb" for index in range(8))


def register() -> None:
    """Add the routes to the running server, once; without a server (an import for its nodes only) there is nothing to add them to."""
    server = getattr(PromptServer, "instance", None)
    if server is None or any(getattr(route, "path", "") == "/wan_sharded/gpus" for route in server.routes):
        return
    server.routes.get("/wan_sharded/gpus")(_gpus)
    server.routes.post("/wan_sharded/calibrate")(_calibrate)


async def _gpus(request: web.Request) -> web.Response:
    return web.json_response(await asyncio.to_thread(gpus))


def gpus() -> dict[str, Any]:
    """The GPUs by visible index, in PCI bus order, and why some are missing; measures nothing."""
    found = [
        {"index": index, "name": gpu.name, "total_bytes": gpu.total_bytes, "torch_device": f"cuda:{gpu.torch_index}"}
        for index, gpu in enumerate(probe.visible_gpus())
    ]
    return {"gpus": found, "warnings": list(probe.warnings_without_measuring())}


async def _calibrate(request: web.Request) -> web.Response:
    try:
        options = read_options(await _body(request))
        if PromptServer.instance.prompt_queue.get_tasks_remaining():
            raise BusyError("A prompt is running or waiting. Wait until it is done, or cancel it, and measure again.")
        found = await asyncio.to_thread(calibrate, OWNER, **options, reserve=memory.reserve())
    except InvalidRequestError as error:
        return web.json_response({"error": str(error)}, status=400)
    except BusyError as error:
        return web.json_response({"error": str(error)}, status=409)
    for line in found.text.splitlines():
        logger.info("Calibration: %s", line)
    return web.json_response(as_answer(found))


async def _body(request: web.Request) -> Any:
    if not request.can_read_body:
        return {}
    try:
        return await request.json()
    except ValueError as error:  # no JSON, or no text
        raise InvalidRequestError(f"The body is no JSON ({error}). Send an object such as {SIZES}.") from error


def read_options(body: Any) -> dict[str, Any]:
    """The arguments of :func:`engine.calibrate` from what was posted: ``width``, ``height``, ``length`` and the loader's widgets by name.

    Raises:
        InvalidRequestError: a value is of the wrong kind, or its name is unknown.
    """
    if not isinstance(body, dict):
        raise InvalidRequestError(f"The body is {body!r}. Send an object such as {SIZES}.")
    known = (*SIZES, *CHOICES, *SLIDERS)
    unknown = sorted(set(body) - set(known))
    if unknown:
        raise InvalidRequestError(f"{unknown[0]} is not known here; send any of {', '.join(known)}.")
    for name in SIZES:
        value = body.get(name, 0)
        if not isinstance(value, int) or isinstance(value, bool):
            raise InvalidRequestError(f"{name} is {value!r}; send a whole number.")
    for name in SLIDERS:
        value = body.get(name, 0)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise InvalidRequestError(f"{name} is {value!r}; send a number of GiB, 0 for automatic, or -1 to leave the GPU out.")
    sliders = sliders_by_index([float(body.get(name, 0)) for name in SLIDERS])
    wanted = {name: body.get(name, default) for name, default in {**SIZES, **CHOICES}.items()}
    return {**wanted, "max_memory_gib": sliders}


def as_answer(found: Calibration) -> dict[str, Any]:
    """What is sent: ``text`` for people, and the same as values."""
    devices = [
        {
            "label": speed.device.label,
            "name": speed.device.name,
            "total_bytes": speed.device.total_bytes,
            "free_bytes": speed.device.free_bytes,
            "matrix_tflops": speed.device.speed_tflops,
            "block": None if speed.block is None else asdict(speed.block),
            "why_not": speed.why_not,
        }
        for speed in found.devices
    ]
    plan = {"text": found.plan, "bars": as_json(found.bars)}
    return {"text": found.text, "devices": devices, "links": [asdict(link) for link in found.links], "plan": plan}
