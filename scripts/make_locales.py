"""Write ``locales/en/nodeDefs.json`` from the nodes' own texts, so that the two can't drift.

Run it after a change of a display name, a tooltip, an input or an output, in the environment of `make test`:

    .venv/bin/python scripts/make_locales.py

English readers would see the same without the file. It is there for translators: what it holds is what ``locales/zh/nodeDefs.json``
says in Chinese, which is written by hand. The script names what is missing or left over there, and tests/nodes/test_locales.py insists.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from setup_env import ROOT, comfyui_folder

LOCALES = ROOT / "locales"
FILE = "nodeDefs.json"

Texts = dict[str, Any]


def served_nodes(base: Path) -> dict[str, dict[str, Any]]:
    """What ComfyUI would serve at /object_info: node id -> its entry, on a machine without GPUs and without models.

    Args:
        base: An empty folder in the place of ComfyUI's own models, input and output.

    Raises:
        RuntimeError: the nodes could not be imported; the message holds their traceback.
    """
    script = ROOT / "tests" / "support" / "served_nodes.py"
    command = [sys.executable, str(script), str(comfyui_folder()), str(ROOT), str(base)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "PYTHONIOENCODING": "utf-8"}
    result = subprocess.run(command, cwd=base, env=environment, capture_output=True, text=True, encoding="utf-8")
    if result.returncode:
        raise RuntimeError(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def texts_of(node: dict[str, Any]) -> Texts:
    """The texts of one /object_info entry, in the layout in which ComfyUI's page looks for translations."""
    inputs = {}
    for group in ("required", "optional"):
        for name, (_, options) in node["input"].get(group, {}).items():
            # A GPU slider's name is "GPU 0" where there is no GPU; wan_sharded.js puts the card's name over it.
            inputs[name] = {"name": options.get("display_name") or name, "tooltip": options["tooltip"]}
    outputs = zip(node["output_name"], node["output_tooltips"], strict=True)
    return {
        "display_name": node["display_name"],
        "description": node["description"],
        "inputs": inputs,
        "outputs": {str(index): {"name": name, "tooltip": tooltip} for index, (name, tooltip) in enumerate(outputs)},
    }


def paths(texts: Texts, begin: str = "") -> dict[str, str]:
    """Every text by its path: ``{"WanShardedLoader.inputs.vae.name": "vae", ...}``."""
    found: dict[str, str] = {}
    for key, value in texts.items():
        found |= paths(value, f"{begin}{key}.") if isinstance(value, dict) else {f"{begin}{key}": value}
    return found


def read_locale(language: str) -> Texts:
    return json.loads((LOCALES / language / FILE).read_text(encoding="utf-8"))


def main() -> None:
    with tempfile.TemporaryDirectory() as base:
        english = {node_id: texts_of(node) for node_id, node in served_nodes(Path(base)).items()}
    target = LOCALES / "en" / FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(english, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
    print(f"[locales] {target.relative_to(ROOT)}: {len(paths(english))} texts")
    for folder in sorted(LOCALES.iterdir()):
        if folder.name != "en":
            there = paths(read_locale(folder.name))
            print(f"[locales] {folder.name}: missing {sorted(paths(english).keys() - there.keys()) or 'nothing'}")
            print(f"[locales] {folder.name}: left over {sorted(there.keys() - paths(english).keys()) or 'nothing'}")


if __name__ == "__main__":
    main()
