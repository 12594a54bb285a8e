"""Which block lives where: the model case of the README, every number of GPUs, and a few hundred random machines."""

import random
import re
from collections.abc import Callable

import pytest
import torch
from accelerate import infer_auto_device_map
from accelerate.utils import get_balanced_memory
from diffusers import WanTransformer3DModel
from imagined_machine import gpu, machine
from stored_like import dtypes_of, part_sizes
from wan_sharded.engine.errors import InvalidRequestError, PlacementError
from wan_sharded.engine.planning.budgets import CONTEXT_BYTES, Budget, budgets_for
from wan_sharded.engine.planning.devices import GIB, DeviceInfo, Machine, gib
from wan_sharded.engine.planning.footprint import VideoShape, transformer_activation_bytes
from wan_sharded.engine.planning.placement import HOST, SLACK_BYTES, Placement, parts_of, place_expert
from wan_sharded.engine.weights.precision import Precision

P480 = VideoShape(832, 480, 81)
P720 = VideoShape(1280, 720, 81)
# The README's machine, with the caps its guide gives.
MODEL_CASE = machine(gpu(0, 16, 15.3), gpu(1, 12, 11.5))
MODEL_CAPS = {0: 15.0, 1: 11.0}
BF16 = Precision(torch.bfloat16, torch.bfloat16)
INT8 = Precision(torch.bfloat16, torch.int8)


def place(
    model: WanTransformer3DModel,
    computer: Machine,
    sliders: dict[int, float],
    precision: Precision = BF16,
    *,
    shape: VideoShape = P480,
    device_map: str = "balanced",
    offload: str = "auto",
    host_gib: float = 56,
) -> Placement:
    budgets, _ = budgets_for(computer, sliders)
    width = model.config.num_attention_heads * model.config.attention_head_dim
    return place_expert(
        part_sizes(model, precision),
        budgets,
        device_map=device_map,
        offload=offload,
        activation_bytes=transformer_activation_bytes(shape, width, precision.dtype.itemsize),
        host_bytes=int(host_gib * GIB),
    )


def check(placement: Placement, model: WanTransformer3DModel, activation_bytes: int) -> None:
    """What holds for every placement, computed again from its homes alone."""
    assert list(placement.homes) == parts_of(model)
    limits = {budget.device.index: budget.usable_bytes for budget in placement.budgets}
    assert set(placement.homes.values()) <= {*limits, HOST}
    assert placement.main_device in limits
    waiting = {part: placement.sizes[part] for part, home in placement.homes.items() if home == HOST}
    blocks = [size for part, size in waiting.items() if part.startswith("blocks.")]
    # Blocks are fetched into room for one; what comes before and after them has room of its own.
    fetched = max(blocks, default=0) + sum(size for part, size in waiting.items() if not part.startswith("blocks."))
    for index, usable in limits.items():
        weights = sum(placement.sizes[part] for part, home in placement.homes.items() if home == index)
        computes = weights > 0 or index == placement.main_device
        needed = weights + computes * activation_bytes + (fetched if index == placement.main_device else 0)
        assert needed <= usable, f"{gib(needed)} planned for GPU {index}, which may take {gib(usable)}"
        assert placement.predicted_peak_bytes(index) == needed


# ---- the model case: RTX 5060 Ti 16 GB and RTX 3060 12 GB


@pytest.mark.parametrize("device_map", ["balanced", "auto"])
@pytest.mark.parametrize("storage", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_eight_bits_fit_wholly_on_the_gpus(wan_14b: WanTransformer3DModel, device_map: str, storage: torch.dtype) -> None:
    placement = place(wan_14b, MODEL_CASE, MODEL_CAPS, Precision(torch.bfloat16, storage), device_map=device_map)
    check(placement, wan_14b, transformer_activation_bytes(P480, 5120, 2))
    assert placement.weight_bytes(HOST) == 0
    assert placement.weight_bytes(0) > 0 and placement.weight_bytes(1) > 0
    assert 13 * GIB < placement.weight_bytes(0) + placement.weight_bytes(1) < 15 * GIB


@pytest.mark.parametrize("device_map", ["balanced", "auto"])
@pytest.mark.parametrize("shape", [P480, P720], ids=str)
def test_bf16_fits_with_the_rest_on_the_host(wan_14b: WanTransformer3DModel, device_map: str, shape: VideoShape) -> None:
    placement = place(wan_14b, MODEL_CASE, MODEL_CAPS, device_map=device_map, shape=shape)
    check(placement, wan_14b, transformer_activation_bytes(shape, 5120, 2))
    assert all(placement.weight_bytes(home) > 0 for home in (0, 1, HOST))
    # No block waits on the host for which a GPU had room: less than two blocks' bytes (one each for accelerate's and our fetching).
    block = placement.sizes["blocks.0"]
    for budget in placement.budgets:
        assert budget.usable_bytes - placement.predicted_peak_bytes(budget.device.index) < 2 * block


def test_balanced_is_even_where_all_fits(wan_14b: WanTransformer3DModel) -> None:
    placement = place(wan_14b, machine(gpu(0, 48), gpu(1, 48)), {}, device_map="balanced")
    assert abs(placement.weight_bytes(0) - placement.weight_bytes(1)) <= 2 * placement.sizes["blocks.0"]


def test_auto_fills_one_gpu_after_another(wan_14b: WanTransformer3DModel) -> None:
    placement = place(wan_14b, machine(gpu(0, 48), gpu(1, 48)), {}, device_map="auto")
    assert placement.weight_bytes(1) == 0
    placement = place(wan_14b, machine(gpu(0, 24), gpu(1, 48)), {}, device_map="auto")
    assert placement.weight_bytes(0) > 17 * GIB and placement.weight_bytes(1) > 0


def test_an_even_split_gives_way_to_one_that_fits(wan_14b: WanTransformer3DModel) -> None:
    """accelerate's even split would put blocks on the host although the larger GPU has room for them."""
    placement = place(wan_14b, machine(gpu(0, 24), gpu(1, 7)), {}, INT8, device_map="balanced")
    assert placement.weight_bytes(HOST) == 0
    assert "Not every GPU can hold an even share" in placement.notes[0]


def test_a_gpu_left_out_gets_nothing(wan_14b: WanTransformer3DModel) -> None:
    placement = place(wan_14b, MODEL_CASE, {0: -1, 1: 11})
    assert set(placement.homes.values()) == {1, HOST}
    assert placement.main_device == 1


def test_offload_cpu_keeps_weights_off_the_gpus(wan_14b: WanTransformer3DModel) -> None:
    placement = place(wan_14b, MODEL_CASE, MODEL_CAPS, offload="cpu")
    check(placement, wan_14b, transformer_activation_bytes(P480, 5120, 2))
    assert {home for part, home in placement.homes.items() if placement.sizes[part]} == {HOST}
    assert placement.main_device == 0, "the roomiest computes"
    assert placement.predicted_peak_bytes(1) == 0


def test_no_gpu(wan_14b: WanTransformer3DModel) -> None:
    cpu = machine(DeviceInfo(0, "CPU", "cpu", 64 * GIB, 60 * GIB, is_gpu=False))
    for offload in ("auto", "cpu", "none"):
        placement = place(wan_14b, cpu, {}, offload=offload)
        assert set(placement.homes.values()) == {0}


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("device_map", ["balanced", "auto"])
def test_any_number_of_gpus(wan_14b: WanTransformer3DModel, count: int, device_map: str) -> None:
    placement = place(wan_14b, machine(*(gpu(index, 12) for index in range(count))), {}, device_map=device_map)
    check(placement, wan_14b, transformer_activation_bytes(P480, 5120, 2))
    in_use = {home for part, home in placement.homes.items() if placement.sizes[part]}
    assert set(range(min(count, 4))) <= in_use
    assert (HOST in in_use) == (count < 4)


# ---- against accelerate itself


@pytest.mark.parametrize("rooms_gib", [(40,), (14, 30), (9, 9, 30), (8, 40), (20, 15)], ids=str)
@pytest.mark.parametrize("device_map", ["balanced", "auto"])
def test_the_map_is_accelerates_own(wan_14b: WanTransformer3DModel, rooms_gib: tuple[float, ...], device_map: str) -> None:
    """We give accelerate one parameter per part, for speed; the whole model must give the same map."""
    sizing = {"dtype": BF16.dtype, "special_dtypes": dtypes_of(wan_14b, BF16)}
    room = {index: int(value * GIB) for index, value in enumerate(rooms_gib)}
    memory = {**room, "cpu": 56 * GIB}
    if device_map == "balanced" and len(room) > 1:
        memory = get_balanced_memory(wan_14b, dict(memory), no_split_module_classes=["WanTransformerBlock"], **sizing)
    expected = infer_auto_device_map(wan_14b, dict(memory), no_split_module_classes=["WanTransformerBlock"], clean_result=False, **sizing)

    activations = transformer_activation_bytes(P480, 5120, 2)
    sliders = {index: (value + activations + CONTEXT_BYTES + SLACK_BYTES) / GIB for index, value in room.items()}
    placement = place(wan_14b, machine(*(gpu(index, 80) for index in room)), sliders, device_map=device_map)
    for part, home in placement.homes.items():
        if placement.sizes[part]:
            pieces = {where for name, where in expected.items() if f"{part}.".startswith(f"{name}.") or name.startswith(f"{part}.")}
            assert pieces == {home}, part


def test_sizes_are_what_the_weights_take(wan_14b: WanTransformer3DModel, precision: Precision) -> None:
    placement = place(wan_14b, machine(gpu(0, 80)), {}, precision)
    dtypes = dtypes_of(wan_14b, precision)
    values = sum(p.numel() * dtypes[name].itemsize for name, p in wan_14b.named_parameters())
    rows = sum(p.shape[0] for name, p in wan_14b.named_parameters() if dtypes[name].itemsize == 1)
    assert sum(placement.sizes.values()) == values + 4 * rows, "and a float32 scale per row of few bits"


# ---- random machines


@pytest.fixture(scope="module")
def models(wan_14b: WanTransformer3DModel) -> Callable[[random.Random], WanTransformer3DModel]:
    """Wan transformers of odd shapes, on the meta device."""
    made: dict[tuple[int, int], WanTransformer3DModel] = {}

    def draw(dice: random.Random) -> WanTransformer3DModel:
        blocks, heads = dice.choice([(1, 24), (2, 40), (5, 40), (13, 12), (20, 40), (30, 8)])
        if (blocks, heads) not in made:
            with torch.device("meta"):
                config = {**wan_14b.config, "num_layers": blocks, "num_attention_heads": heads, "ffn_dim": heads * 320}
                made[blocks, heads] = WanTransformer3DModel.from_config(config)
        return made[blocks, heads]

    return draw


def random_case(
    dice: random.Random, draw: Callable[[random.Random], WanTransformer3DModel]
) -> tuple[WanTransformer3DModel, Machine, dict, dict]:
    totals = [dice.choice([4, 6, 8, 10, 12, 16, 24, 32, 80]) for _ in range(dice.choice([1, 1, 2, 2, 2, 3, 4, 8]))]
    computer = machine(*(gpu(index, total, total * dice.uniform(0.05, 1)) for index, total in enumerate(totals)))
    sliders = {index: dice.choice([0, 0, -1, dice.randrange(1, 2 * total + 8) / 2]) for index, total in enumerate(totals)}
    if set(sliders.values()) == {-1}:
        sliders[0] = 0
    options = {
        "shape": VideoShape(16 * dice.randrange(4, 90), 16 * dice.randrange(4, 60), 4 * dice.randrange(0, 31) + 1, dice.choice([1, 1, 2])),
        "device_map": dice.choice(["auto", "balanced"]),
        "offload": dice.choice(["auto", "auto", "cpu", "none"]),
        "host_gib": dice.choice([64, 32, 8, 1, 0]),
        "precision": dice.choice([BF16, INT8]),
    }
    return draw(dice), computer, sliders, options


@pytest.mark.parametrize("part", range(8))
def test_random_machines(models: Callable[[random.Random], WanTransformer3DModel], part: int) -> None:
    """Whatever the machine: the plan keeps its limits, or says which slider at which value would do, and that is true."""
    dice = random.Random(part)
    placed = remedied = hopeless = 0
    for number in range(50):
        model, computer, sliders, options = random_case(dice, models)
        case = f"case {number} of part {part}: {[gib(d.free_bytes) for d in computer.devices]} {sliders} {options}"
        shape, precision, offload = options["shape"], options["precision"], options["offload"]
        try:
            placement = place(model, computer, sliders, **options)
        except PlacementError as error:
            remedy = re.search(r"It fits with the slider of GPU (\d) [^:]*? at ([\d.]+) or more", str(error))
            if remedy is None:
                assert "It fits with the sliders at " in str(error) or "No position of the sliders is enough" in str(error), case
                hopeless += 1
                continue
            index, value = int(remedy[1]), float(remedy[2])
            place(model, computer, {**sliders, index: value}, **options)
            below = value - 0.5
            if below > max(sliders[index], 0.5) and sliders[index] != 0:
                with pytest.raises(PlacementError):
                    place(model, computer, {**sliders, index: below}, **options)
            remedied += 1
        else:
            width = model.config.num_attention_heads * model.config.attention_head_dim
            try:
                check(placement, model, transformer_activation_bytes(shape, width, precision.dtype.itemsize))
                homes = {home for name, home in placement.homes.items() if placement.sizes[name]}
                assert offload != "none" or HOST not in homes
                assert offload != "cpu" or homes == {HOST}
                assert placement.weight_bytes(HOST) <= options["host_gib"] * GIB
            except AssertionError as error:
                raise AssertionError(case) from error
            placed += 1
    assert placed > 10 and remedied + hopeless > 5, "the cases must be of all kinds"


# ---- what does not fit


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises(PlacementError) as caught:
        call()
    return str(caught.value)


def test_offload_none_names_the_sliders(wan_14b: WanTransformer3DModel) -> None:
    message = message_of(lambda: place(wan_14b, MODEL_CASE, MODEL_CAPS, offload="none"))
    assert "GPU 0 · Imagined 16 GB: 15.0 GiB" in message and "GPU 1 · Imagined 12 GB: 11.0 GiB" in message
    assert "offload is 'none'. Set offload to 'auto', or choose a smaller weight_dtype." in message
    assert "No position of the sliders is enough" in message


def test_offload_none_names_the_slider_that_would_do(wan_14b: WanTransformer3DModel) -> None:
    sliders = {0: 8.0, 1: 11.0}
    message = message_of(lambda: place(wan_14b, MODEL_CASE, sliders, INT8, offload="none"))
    remedy = re.search(r"It fits with the slider of GPU 0 · Imagined 16 GB at ([\d.]+) or more\.", message)
    assert remedy, message
    value = float(remedy[1])
    assert place(wan_14b, MODEL_CASE, {**sliders, 0: value}, INT8, offload="none").weight_bytes(HOST) == 0
    message_of(lambda: place(wan_14b, MODEL_CASE, {**sliders, 0: value - 0.5}, INT8, offload="none"))


def test_sliders_too_small_for_one_block(wan_14b: WanTransformer3DModel) -> None:
    message = message_of(lambda: place(wan_14b, MODEL_CASE, {0: 2.0, 1: 2.0}))
    assert "may use 2.0 GiB" in message and "for activations and the block being fetched" in message
    remedy = re.search(r"It fits with the slider of GPU (\d) .* at ([\d.]+) or more\.", message)
    assert remedy, message
    place(wan_14b, MODEL_CASE, {0: 2.0, 1: 2.0, int(remedy[1]): float(remedy[2])})


def test_all_sliders_together_where_none_alone_would_do(wan_14b: WanTransformer3DModel) -> None:
    message = message_of(lambda: place(wan_14b, machine(gpu(0, 12), gpu(1, 12)), {0: 6.0, 1: 6.0}, INT8, offload="none"))
    assert "It fits with the sliders at GPU 0 · Imagined 12 GB: 12, GPU 1 · Imagined 12 GB: 12." in message


def test_neither_gpus_nor_host(wan_14b: WanTransformer3DModel) -> None:
    message = message_of(lambda: place(wan_14b, machine(gpu(0, 12)), {}, host_gib=8))
    assert "26.7 GiB" in message and "8.0 GiB of free system memory" in message
    assert "Choose weight_dtype fp8_e4m3fn or int8, or close other programs." in message


def test_a_cpu_without_the_memory(wan_14b: WanTransformer3DModel) -> None:
    cpu = machine(DeviceInfo(0, "CPU", "cpu", 8 * GIB, 2 * GIB, is_gpu=False))
    message = message_of(lambda: place(wan_14b, cpu, {}, shape=P720))
    assert "2.0 GiB are free" in message and "smaller or shorter" in message


def test_unknown_choices(wan_14b: WanTransformer3DModel) -> None:
    with pytest.raises(InvalidRequestError, match="device_map is 'even'; choose one of auto, balanced"):
        place(wan_14b, MODEL_CASE, {}, device_map="even")
    with pytest.raises(InvalidRequestError, match="offload is 'disk'; choose one of auto, cpu, none"):
        place(wan_14b, MODEL_CASE, {}, offload="disk")


def test_a_budget_says_what_it_is_for() -> None:
    (budget, _), _ = budgets_for(MODEL_CASE, MODEL_CAPS)
    assert isinstance(budget, Budget)
    assert budget.device.label == "GPU 0 · Imagined 16 GB"
