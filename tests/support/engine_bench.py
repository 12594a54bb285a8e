"""An engine on imagined GPUs that count every byte, with what tests look at."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers_reference import HostVae
from imagined_gpus import ImaginedGpus
from imagined_machine import TinyExpert, gpu
from wan_sharded.engine import Callbacks, ImageToVideoRequest, ModelHandle, VideoResult
from wan_sharded.engine.checkpoints.stored import StoredTensor
from wan_sharded.engine.owner import ModelOwner
from wan_sharded.engine.parallel import forward as forward_module
from wan_sharded.engine.pipeline.image_to_video import ImageToVideo
from wan_sharded.engine.planning.devices import GIB, Machine
from wan_sharded.engine.weights.expert import CPU
from wan_sharded.engine.weights.reading import Reading, TensorReader

MIB = 1024**2
# Activations, embeddings and the VAE of 64x48x5, generously.
SMALL_CHANGE = int(3.5 * MIB)


class Bench:
    """An engine on imagined GPUs, with what the tests look at.

    Attributes:
        read: names of the tensors read from files since :meth:`forget`.
        loaded: parts said to be loaded since then.
    """

    def __init__(self, gpus: ImaginedGpus, count: int, checkpoint: Path, make_request: Callable[..., ImageToVideoRequest]):
        self.gpus, self.count, self.make_request = gpus, count, make_request
        self.owner = ModelOwner()
        self.free_gib: dict[int, float] = {}
        self.engine = ImageToVideo(self.owner, self.machine)
        self.vae = HostVae(checkpoint)
        self.read: list[str] = []
        self.loaded: list[str] = []

    def machine(self) -> Machine:
        """The GPUs as they are now: what lives there is not free."""
        devices = (gpu(i, 64, self.free_gib.get(i, 64) - self.gpus.live_bytes(i) / GIB) for i in range(self.count))
        return Machine(tuple(devices), 64 * GIB)

    def run(self, handle: ModelHandle, **changes: object) -> VideoResult:
        quick = {"prompt_embeds": torch.ones(1, 3, 32), "guidance_scale": 1.0, "num_inference_steps": 2, "switch_step": 1}
        callbacks = Callbacks(on_load=lambda done, total, what: self.loaded.append(what) if done < total else None)
        result = self.engine(handle, self.make_request(**{**quick, **changes}), callbacks, vae=self.vae)
        gc.collect()
        return result

    def forget(self) -> None:
        self.read.clear()
        self.loaded.clear()
        self.gpus.reset_peaks()

    def locations(self, part: str) -> set[torch.device]:
        """Where the blocks of an expert are."""
        model = self.owner.loaded
        assert model is not None
        expert = model.experts[part]
        return {expert.location(name) for name in expert.parts if name.startswith("blocks.")}

    def homes(self) -> set:
        model = self.owner.loaded
        assert model is not None and model.plan is not None
        return {home for p in model.plan.placements.values() for name, home in p.homes.items() if p.sizes[name]}


def sliders(expert: TinyExpert, make_request: Callable[..., ImageToVideoRequest], *experts: float) -> dict[int, float]:
    """Sliders that leave room for so many experts' weights on each GPU, with the block that accelerate keeps free."""
    return expert.sliders(make_request().shape, [share * expert.total_bytes + expert.block_bytes for share in experts])


@contextmanager
def benches(
    checkpoint: Path, make_request: Callable[..., ImageToVideoRequest], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Bench]]:
    """Makes benches with so many GPUs, of so many bytes each; released at the end."""
    made: list[Bench] = []
    all_mapped, begin = TensorReader.all_mapped, TensorReader.begin

    def watched_mapped(reader: TensorReader, wanted: Sequence[StoredTensor]) -> dict[StoredTensor, torch.Tensor]:
        made[-1].read.extend(stored.key for stored in wanted)
        return all_mapped(reader, wanted)

    def watched_begin(reader: TensorReader, wanted: list[tuple[StoredTensor, torch.Tensor]], **options: bool) -> Reading:
        made[-1].read.extend(stored.key for stored, target in wanted if target.device == CPU)
        return begin(reader, wanted, **options)

    monkeypatch.setattr(TensorReader, "all_mapped", watched_mapped)  # imagined GPUs are given pages of the file
    monkeypatch.setattr(TensorReader, "begin", watched_begin)
    # By what was timed, shares would differ from run to run, and the frames in rounding.
    monkeypatch.setattr(forward_module, "better_speeds", lambda *args: None)

    def make(count: int = 1, capacity: dict[int, int] | None = None) -> Bench:
        gpus.capacity.update(capacity or {})
        made.append(Bench(gpus, count, checkpoint, make_request))
        return made[-1]

    with ImaginedGpus() as gpus:
        yield make
        for one in made:
            one.owner.release()
