"""docs/TROUBLESHOOTING.md quotes messages that there are, and its links lead to its headings."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "TROUBLESHOOTING.md").read_text(encoding="utf-8")
# Shorter pieces between two gaps ("is a", "has") say nothing about where they come from.
TELLING_LENGTH = 12


def spoken(node: ast.AST) -> str:
    """A string in the source, with ``…`` for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(spoken(value) for value in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"


def all_words() -> str:
    files = [file for folder in ("engine", "bridge") for file in sorted((ROOT / folder).rglob("*.py"))]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    strings = [spoken(node) for node in nodes if isinstance(node, (ast.JoinedStr, ast.Constant))]
    return "\n".join([*strings, (ROOT / "__init__.py").read_text(encoding="utf-8")])


def quoted_messages() -> list[str]:
    """The first column of the tables of messages, and the block quotes, each as one line."""
    tables = re.findall(r"^\| Message \|.*\n\|[- |]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    cells = [row.split("|")[1].strip() for table in tables for row in table.splitlines()]
    quotes = [" ".join(line.removeprefix("> ") for line in block.splitlines()) for block in re.findall(r"(?:^> .*\n)+", PAGE, re.MULTILINE)]
    return [message for cell in [*cells, *quotes] for message in cell.split(" / ")]


def test_the_messages_are_those_of_the_pack() -> None:
    words, messages = all_words(), quoted_messages()
    assert len(messages) > 50
    pieces = {piece.strip(" .") for message in messages for piece in message.split("…")}
    assert [piece for piece in sorted(pieces) if len(piece) >= TELLING_LENGTH and piece not in words] == []


def test_its_own_links_lead_to_headings() -> None:
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in re.findall(r"^## (.*)", PAGE, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= anchors
