"""Every text of the nodes is there in English and in Chinese, and so is every help page.

The English file is made by scripts/make_locales.py, the Chinese one and the pages are written by hand.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from make_locales import FILE, LOCALES, paths, read_locale, texts_of

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "js" / "docs"
LANGUAGES = ("en", "zh")
NODES = ("WanShardedLoader", "WanShardedLora", "WanShardedI2VSampler", "WanShardedVideoExport")
# What ComfyUI reads of a folder in locales/ (app/custom_node_manager.py).
READ_BY_COMFYUI = {"main.json", "nodeDefs.json", "commands.json", "settings.json"}
# Technical words and file names, which a translation keeps letter by letter.
KEPT_WORDS = re.compile(r"%[a-z]+(?::[-a-zA-Z]+)?%|\bGPU \d|\w+\.safetensors|\b(?:LoRA|GGUF|UMT5|fp8_e4m3fn|int8|CRF)\b")
CHINESE = re.compile("[\u4e00-\u9fff]")


def english_page(node_id: str) -> str:
    return (DOCS / f"{node_id}.md").read_text(encoding="utf-8")


def chinese_page(node_id: str) -> str:
    return (DOCS / node_id / "zh.md").read_text(encoding="utf-8")


def headings(page: str) -> list[int]:
    """The levels of a page's headings, in order."""
    return [len(marks) for marks in re.findall(r"^(#+) ", page, re.MULTILINE)]


def tables(page: str) -> list[int]:
    """The number of columns of each table row, in order."""
    return [len(re.split(r"(?<!\\)\|", line)) - 2 for line in page.splitlines() if line.startswith("|")]


def input_names(node: dict[str, Any]) -> list[str]:
    return [name for group in ("required", "optional") for name in node["input"].get(group, {})]


@pytest.fixture(scope="module")
def own_texts(served: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The texts of the schemas, by their path in a file of translations."""
    return paths({node_id: texts_of(node) for node_id, node in served.items()})


def test_these_are_the_nodes(served: dict[str, dict[str, Any]]) -> None:
    assert set(served) == set(NODES)


def test_comfyui_reads_every_file() -> None:
    assert {folder.name for folder in LOCALES.iterdir()} == set(LANGUAGES)
    assert {file.name for file in LOCALES.glob("*/*")} <= READ_BY_COMFYUI


def test_english_is_what_the_nodes_say(own_texts: dict[str, str]) -> None:
    assert paths(read_locale("en")) == own_texts, "run scripts/make_locales.py"


def test_chinese_has_every_text_and_no_other(own_texts: dict[str, str]) -> None:
    chinese = paths(read_locale("zh"))
    assert own_texts.keys() - chinese.keys() == set()
    assert chinese.keys() - own_texts.keys() == set()
    assert [path for path, text in chinese.items() if not text.strip()] == []


def test_chinese_explanations_are_chinese() -> None:
    explanations = {path: text for path, text in paths(read_locale("zh")).items() if path.endswith(("tooltip", "description"))}
    assert [path for path, text in explanations.items() if not CHINESE.search(text)] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_text_is_a_formula_to_the_page(language: str) -> None:
    """vue-i18n, which shows them, gives a meaning to braces, to bars, and to @ before a name; HTML it warns about."""
    texts = paths(json.loads((LOCALES / language / FILE).read_text(encoding="utf-8")))
    assert {path: text for path, text in texts.items() if re.search(r"[{}|@<>]", text)} == {}
    assert [path for path in texts if not re.fullmatch(r"[\w.]+", path)] == []


def test_technical_words_are_kept(own_texts: dict[str, str]) -> None:
    chinese = paths(read_locale("zh"))
    lost = {path: set(KEPT_WORDS.findall(text)) - set(KEPT_WORDS.findall(chinese[path])) for path, text in own_texts.items()}
    assert {path: words for path, words in lost.items() if words} == {}


@pytest.mark.parametrize("node_id", NODES)
def test_the_pages_are_named_after_the_node(node_id: str) -> None:
    assert english_page(node_id).startswith(f"# {read_locale('en')[node_id]['display_name']}\n")
    assert chinese_page(node_id).startswith(f"# {read_locale('zh')[node_id]['display_name']}\n")


@pytest.mark.parametrize("node_id", NODES)
def test_the_chinese_page_names_every_input_and_output(served: dict[str, dict[str, Any]], node_id: str) -> None:
    """Each with the name that a Chinese page shows behind it, sliders excepted, which carry the GPUs' names."""
    page, texts = chinese_page(node_id), read_locale("zh")[node_id]
    labels = {name: texts["inputs"][name]["name"] for name in input_names(served[node_id])}
    labels |= {name: texts["outputs"][str(index)]["name"] for index, name in enumerate(served[node_id]["output_name"])}
    wanted = [f"`{name}`" if re.fullmatch(r"gpu\d_gb", name) else f"`{name}`（{label}）" for name, label in labels.items()]
    assert [name for name in wanted if name not in page] == []


@pytest.mark.parametrize("node_id", NODES)
def test_the_pages_have_the_same_parts(node_id: str) -> None:
    english, chinese = english_page(node_id), chinese_page(node_id)
    assert headings(chinese) == headings(english)
    assert tables(chinese) == tables(english)
    assert len(re.findall(r"^- ", chinese, re.MULTILINE)) == len(re.findall(r"^- ", english, re.MULTILINE))


@pytest.mark.parametrize("node_id", NODES)
def test_the_pages_mark_the_same_words(node_id: str) -> None:
    """Whatever stands as code in one page stands so in the other; emphasis is closed where it is opened."""
    english, chinese = english_page(node_id), chinese_page(node_id)
    assert set(re.findall(r"`([^`]+)`", chinese)) == set(re.findall(r"`([^`]+)`", english))
    for page in (english, chinese):
        without_code = re.sub(r"`[^`\n]+`", "", page)
        assert "`" not in without_code
        assert without_code.count("**") % 2 == 0 and without_code.replace("**", "").count("*") % 2 == 0


@pytest.mark.parametrize("node_id", NODES)
def test_chinese_paragraphs_are_one_line_each(node_id: str) -> None:
    """A page shows a line break within a paragraph as a space, which Chinese text does not have between words."""
    lines = chinese_page(node_id).splitlines()
    begins = re.compile(r"#|\||- |$")
    assert [line for before, line in zip(lines, lines[1:], strict=False) if before and not begins.match(line)] == []


@pytest.mark.parametrize("node_id", NODES)
def test_both_pages_show_the_node(node_id: str) -> None:
    """The page looks for pictures beside the English page, whatever the language."""
    for page in (english_page(node_id), chinese_page(node_id)):
        assert re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page) == [f"images/{node_id}.jpg"]
    assert (ROOT / "js" / "docs" / "images" / f"{node_id}.jpg").stat().st_size < 150_000
