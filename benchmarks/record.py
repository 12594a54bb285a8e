"""Where benchmark figures go: a table on the screen and in RESULTS.md, and a JSON file with everything."""

import json
import os
import platform
import re
import shlex
import sys
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent


@dataclass
class Row:
    """One measurement.

    Attributes:
        case: the video's size, "832x480x81".
        what: wan-sharded, diffusers, device_map, ulysses, ulysses_fsdp, or a named variant.
        gpus: how many took part.
        dtype: of the weights.
        seconds: median of what the table's title says.
        peak_gib: per GPU.
        host_gib: of this process.
        rel_err: against the reference the note names.
        note: anything else, in words.
    """

    case: str
    what: str
    gpus: int
    dtype: str
    seconds: float | None = None
    peak_gib: list[float] = field(default_factory=list)
    host_gib: float | None = None
    rel_err: float | None = None
    note: str = ""


def versions() -> dict[str, str]:
    """Of everything that can change a figure."""
    import accelerate
    import diffusers

    found = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "accelerate": accelerate.__version__,
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.version.cuda or ""
    return found


def device_words() -> str:
    """``2 x NVIDIA H200``, or the CPU."""
    if not torch.cuda.is_available():
        cpuinfo = Path("/proc/cpuinfo")
        names = re.findall(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else []
        return f"CPU {names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{names.count(name)} x {name}" for name in sorted(set(names)))


def command() -> str:
    """How this process was started, as from the repository's folder."""
    return shlex.join(["python", os.path.relpath(sys.argv[0], FOLDER.parent), *sys.argv[1:]])


def record(name: str, title: str, rows: list[Row], *, append: bool = True) -> str:
    """Print a table under how it was made, append it to RESULTS.md, write results/<name>.json; returns the table."""
    table = [
        f"## {title}",
        "",
        f"`{command()}` on {device_words()}, {date.today()}, {', '.join(f'{k} {v}' for k, v in versions().items())}",
        "",
    ]
    table += ["| size | what | GPUs | weights | seconds | peak per GPU, GiB | host, GiB | rel. error | note |", "| --- " * 9 + "|"]
    table += [_line(row) for row in rows]
    text = "\n".join(table)
    print(text, flush=True)
    if append:
        results = FOLDER / "RESULTS.md"
        before = results.read_text() if results.is_file() else "# Results\n"
        results.write_text(f"{before.rstrip()}\n\n{text}\n")
        out = FOLDER / "results" / f"{name}.json"
        out.parent.mkdir(exist_ok=True)
        out.write_text(
            json.dumps({"device": device_words(), "versions": versions(), "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        )
    return text


def _line(row: Row) -> str:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    peaks = " / ".join(f"{value:.1f}" for value in row.peak_gib)
    cells = [
        row.case,
        row.what,
        str(row.gpus),
        row.dtype,
        number(row.seconds, ".2f" if row.seconds is None or row.seconds >= 0.2 else ".4f"),
        peaks,
        number(row.host_gib, ".1f"),
        number(row.rel_err, ".1e"),
        row.note,
    ]
    return "| " + " | ".join(cells) + " |"
