"""FlashAttention 3 is taken where it is installed, made for the GPU, right and faster; whatever else it does, torch's function goes on.

Its modules are played by files of these tests, and the GPU by the CPU.
"""

import importlib
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from wan_sharded.engine.computing import Computing
from wan_sharded.engine.transformer import self_attention as flash
from wan_sharded.engine.transformer.self_attention import Choice, choices, choose, self_attention
from wan_sharded.engine.transformer.wan_block import attend

CPU = torch.device("cpu")
ATTENTION = """
import torch.nn.functional as F
def flash_attn_func(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
"""


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flash, "_choices", {})


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], str]:
    """Install a module with this text; its name."""
    monkeypatch.syspath_prepend(tmp_path)
    count = 0

    def install(text: str) -> str:
        nonlocal count
        count += 1
        name = f"played_flash_{tmp_path.name}_{count}".replace("-", "_")
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        return name

    return install


def chosen(*modules: str, quick: float = 0.8) -> Choice:
    """With seconds that are told: one call of torch's function takes one, one of another ``quick``."""
    calls: list[str] = []
    ask = flash._Flash.ask

    def counted(self: flash._Flash, *given: torch.Tensor) -> torch.Tensor:
        calls.append("flash")
        return ask(self, *given)

    def usual(*given: torch.Tensor) -> torch.Tensor:
        calls.append("torch")
        return attend(*given)

    def seconds(device: torch.device, action: Callable[[], object]) -> float:
        calls.clear()
        action()
        assert len(calls) > 1 and len(set(calls)) == 1, "the host is to be ahead"
        return len(calls) * (1.0 if calls[0] == "torch" else quick)

    with ExitStack() as changed:
        for where, name, value in ((flash, "attend", usual), (flash._Flash, "ask", counted), (flash, "TIMED", (8, 16, 2))):
            changed.enter_context(mock.patch.object(where, name, value))
        return choose(CPU, torch.float32, 16, modules=modules, seconds=seconds)


def drawn() -> tuple[torch.Tensor, ...]:
    query, key, value = (torch.randn(2, tokens, 3, 16) for tokens in (7, 11, 11))
    return query, key, value


def test_what_is_right_and_faster_is_taken(installed):
    choice = chosen("not_installed_at_all", installed(ATTENTION))
    assert choice.flash and not choice.refused
    given = drawn()
    torch.testing.assert_close(choice.attention(*given), attend(*given))


def test_what_returns_the_sums_too_is_understood(installed):
    choice = chosen(installed(ATTENTION.replace(".transpose(1, 2)\n", ".transpose(1, 2), 'sums'\n")))
    given = drawn()
    assert choice.flash
    torch.testing.assert_close(choice.attention(*given), attend(*given))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (ATTENTION.replace("return ", "return 1.015 * "), "1.5e-02 away from torch's"),
        (ATTENTION.replace("return ", "return (1 if q.shape[1] // 128 % 2 else 1.1) * "), "away from torch's"),
        (ATTENTION.replace("return ", "return (1.1 if q.shape[1] // 128 % 2 else 1) * "), "away from torch's"),
        (ATTENTION.replace("return ", "return float('nan') * "), "nan away from torch's"),
        (ATTENTION.replace("(q, k, v))", "(q, v, k))"), "away from torch's"),
        ("def flash_attn_func(q, k, v):\n    raise RuntimeError('only for bfloat16\\nand a stack')", "only for bfloat16"),
        ("def flash_attn_func(q, k, v):\n    raise AssertionError", "AssertionError"),
        ("raise ImportError('/home/me/lib/_C.so: no libcudart.so.13.')", "can't be imported: ...: no libcudart.so.13"),
        ("", "can't be imported: module 'played"),
    ],
    ids=["wrong", "even", "odd", "nan", "mixed up", "raises", "raises nothing said", "no library", "another module"],
)
def test_what_does_not_work_is_refused_and_said(installed, caplog, text, why):
    choice = chosen(installed(text))
    assert choice.attention is attend and not choice.flash
    assert why in choice.refused and "\n" not in choice.refused and not choice.refused.endswith(".")
    assert why in caplog.text
    good = installed(ATTENTION)
    assert not chosen(installed(text), good).refused or "imported" not in why
    assert chosen(installed(ATTENTION.replace("return ", "return 1.005 * "))).flash, "as rounding may be"


def test_what_is_no_faster_is_refused(installed):
    assert chosen(installed(ATTENTION), quick=0.96).flash
    choice = chosen(installed(ATTENTION), quick=0.98)
    assert choice.attention is attend and "as fast" in choice.refused


def test_where_it_is_not_installed_nothing_is_said(caplog):
    choice = chosen("not_installed_at_all")
    assert choice.attention is attend and not choice.refused and not caplog.text


def test_other_gpus_never_ask_it(installed, monkeypatch):
    other = installed("raise SystemExit")
    with monkeypatch.context() as changed:
        changed.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
        assert chosen(other) == Choice()
    monkeypatch.setattr(torch.version, "hip", "7.1")
    assert chosen(other) == Choice()


def test_it_is_asked_with_what_a_forward_has(installed):
    """Neither whole nor alone in memory, of odd lengths, and drawn without touching the random numbers of the process."""
    name = installed(ATTENTION.replace("    return", "    asked.append((q, k, v))\n    return") + "asked = []\n")
    before = torch.get_rng_state()
    assert chosen(name).flash
    assert torch.equal(before, torch.get_rng_state())
    query, key, value = __import__(name).asked[0]
    assert not any(tensor.is_contiguous() for tensor in (query, key, value))
    assert query.shape[1] % 128 and key.shape[1] % 128 and query.shape[1] != key.shape[1]


def test_out_of_memory_is_raised_and_nothing_decided(installed, monkeypatch):
    with pytest.raises(torch.OutOfMemoryError):
        chosen(installed("import torch\nraise torch.OutOfMemoryError('none left')"))
    name = installed("import torch\ndef flash_attn_func(q, k, v):\n    raise torch.OutOfMemoryError('none left')")
    with pytest.raises(torch.OutOfMemoryError):
        chosen(name)
    monkeypatch.setattr(flash, "MODULES", (name,))
    meta = torch.device("cuda", 7)
    monkeypatch.setattr(flash, "_random", lambda size, width, device, dtype: drawn())
    with pytest.raises(torch.OutOfMemoryError):
        self_attention(meta, torch.float32, 16)
    assert not flash._choices


def test_a_failure_later_leaves_torchs_for_good(installed, caplog):
    name = installed(
        ATTENTION.replace("    return", "    asked.append(1)\n    if fails: raise RuntimeError('no such size')\n    return")
        + "fails, asked = [], []\n",
    )
    choice = chosen(name)
    given = drawn()
    module = __import__(name)
    module.fails.append(True)
    torch.testing.assert_close(choice.attention(*given), attend(*given))
    assert not choice.flash and choice.gave_up and choice.refused == "no such size" and "no such size" in caplog.text
    module.asked.clear()
    torch.testing.assert_close(choice.attention(*given), attend(*given))
    assert not module.asked


def test_out_of_memory_later_is_raised(installed):
    name = installed(
        ATTENTION.replace("    return", "    if fails: raise torch.OutOfMemoryError\n    return") + "import torch\nfails = []\n"
    )
    choice = chosen(name)
    __import__(name).fails.append(True)
    with pytest.raises(torch.OutOfMemoryError):
        choice.attention(*drawn())
    assert choice.flash


def test_it_is_found_out_once_for_a_kind_of_tensor(monkeypatch):
    asked = []

    def decide(device, dtype, width):
        asked.append((device, dtype, width))
        return Choice(refused="" if dtype == torch.bfloat16 else "no", flash=dtype == torch.bfloat16)

    monkeypatch.setattr(flash, "choose", decide)
    gpu, other = torch.device("cuda", 0), torch.device("cuda", 1)
    kinds = [(gpu, torch.bfloat16, 128), (gpu, torch.float16, 128), (other, torch.float16, 128), (other, torch.float16, 64)]
    for kind in kinds * 2:
        self_attention(*kind)
    assert asked == kinds
    assert self_attention(CPU, torch.float32, 16) is attend
    assert {device: choice.flash for device, choice in choices([gpu, other, CPU], torch.float16).items()} == {gpu: False, other: False}
    assert {device: choice.flash for device, choice in choices([gpu, other, CPU], torch.bfloat16).items()} == {gpu: True}
    assert choices([other], torch.float16)[other].refused == "no"


class PlayedPlan:
    """Of two GPUs."""

    class Budget:
        def __init__(self, index: int):
            self.device = type("Device", (), {"torch_device": f"cuda:{index}", "label": f"GPU {index}"})

    budgets = (Budget(0), Budget(1))


@pytest.mark.parametrize(
    ("made", "notes"),
    [
        ({}, []),
        ({0: Choice()}, []),
        ({0: Choice(flash=True)}, ["GPU 0 computed attention by FlashAttention 3: measured to be faster than torch's own."]),
        (
            {0: Choice(flash=True), 1: Choice(flash=True)},
            ["GPU 0 and GPU 1 computed attention by FlashAttention 3: measured to be faster than torch's own."],
        ),
        (
            {0: Choice(flash=True), 1: Choice(refused="no such file")},
            [
                "GPU 0 computed attention by FlashAttention 3: measured to be faster than torch's own.",
                "FlashAttention 3 is installed and was not used on GPU 1: no such file.",
            ],
        ),
        (
            {1: Choice(refused="no such size", gave_up=True)},
            ["FlashAttention 3 failed on GPU 1, and torch's own attention went on: no such size."],
        ),
    ],
)
def test_a_run_says_who_used_it(monkeypatch, made, notes):
    monkeypatch.setattr(flash, "_choices", {(torch.device("cuda", index), torch.bfloat16, 128): one for index, one in made.items()})
    computing = SimpleNamespace(_precision=SimpleNamespace(dtype=torch.bfloat16))
    assert Computing.attention_notes(computing, PlayedPlan()) == notes
    computing._precision.dtype = torch.float16
    assert not Computing.attention_notes(computing, PlayedPlan()), "of another model's run"


def test_it_is_looked_for_under_the_names_it_has(installed, monkeypatch, tmp_path):
    """Its own build's, then that of the wheel with its forward half."""
    for name in ("fa3_fwd_interface", "flash_attn_interface"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(ATTENTION.replace("def", f"name = {name!r}\ndef"), encoding="utf-8")
        function, why_not = flash._flash_3(flash.MODULES)
        assert function.__globals__["name"] == name and not why_not
        importlib.invalidate_caches()
    for name in flash.MODULES:
        sys.modules.pop(name, None)


def test_several_threads_find_it_out_once(monkeypatch):
    asked = []

    def decide(*kind):
        asked.append(kind)
        time.sleep(0.05)
        return Choice()

    monkeypatch.setattr(flash, "choose", decide)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: self_attention(torch.device("cuda", 0), torch.bfloat16, 128), range(8)))
    assert len(asked) == 1 and found == [attend] * 8
