"""Which expert a file is, and which file goes with it, by their names. Pure functions of text; called where experts are chosen."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import CheckpointError
from .stored import EXPERT_WORDS, HIGH_NOISE, LOW_NOISE

Level = Literal["high", "low"]

_OTHER: dict[Level, Level] = {"high": "low", "low": "high"}
_PARTS: dict[Level, str] = {"high": HIGH_NOISE, "low": LOW_NOISE}
# HIGH, High, high and numbers, also in one piece: I2VHighNoise.
_WORD = re.compile(r"(?:TI|[IT])2V|(?:HIGH|LOW)(?=noise)|[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# Behind these, high and low are about something else: HighRes, low_vram.
_ELSE = frozenset(
    "res resolution quality motion dynamic dynamics vram ram mem memory poly fps speed rank end detail details contrast light key angle "
    "def definition step steps cfg bit bits precision pass frequency freq".split()
)


@dataclass(frozen=True)
class _Mention:
    """Where a name says high or low, and whether it says noise behind it."""

    begin: int
    end: int
    level: Level
    noise: bool


def noise_level(name: str) -> Level | None:
    """Which expert a file's name, or else its nearest folder's, says it is; ``None`` where it says neither, or both.

    Args:
        name: a path with forward or backward slashes, or its last part.
    """
    for part in reversed(_path(name)):
        mentions = _mentions(part)
        mentions = [mention for mention in mentions if mention.noise] or mentions
        levels: set[Level] = {mention.level for mention in mentions}
        if levels:
            return levels.pop() if len(levels) == 1 else None
    return None


def partner(name: str, choices: Sequence[str]) -> str | None:
    """The other expert's file: the choice with the same name but for high and low, exactly so if there is one.

    Returns:
        One of ``choices``, as spelled there, or ``None`` if none or several would do.
    """
    level = noise_level(name)
    if level is None:
        return None
    exact = [_swapped(part, level) for part in _path(name)]
    found = [choice for choice in choices if _path(choice) == exact]
    if found:
        return found[0]
    others = [choice for choice in choices if noise_level(choice) == _OTHER[level]]
    alike: tuple[Callable[[str], str], ...] = (_levelless, lambda choice: _levelless(_path(choice)[-1]))
    for same in alike:
        found = [choice for choice in others if same(choice) == same(name)]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def surely_for(name: str, choices: Sequence[str]) -> Level | None:
    """As :func:`noise_level`, where a name can hardly mean anything else: it says noise, or the other expert's file is there too.

    LoRAs have names of what they show, too: high heels, low lighting.
    """
    for part in reversed(_path(name)):
        levels: set[Level] = {mention.level for mention in _mentions(part) if mention.noise}
        if levels:
            return levels.pop() if len(levels) == 1 else None
    return noise_level(name) if partner(name, choices) is not None else None


def check_slot(name: str, wanted: str) -> None:
    """Check that a file's name does not say that it is the other expert.

    Args:
        name: of the file.
        wanted: ``HIGH_NOISE`` or ``LOW_NOISE``, what it was chosen as.

    Raises:
        CheckpointError: it says so.
    """
    level = noise_level(name)
    if level is not None and _PARTS[level] != wanted:
        right, wrong = EXPERT_WORDS[_PARTS[level]], EXPERT_WORDS[wanted]
        raise CheckpointError(
            f"{name} was chosen as the {wrong}, but its name says that it is the {right}. Choose it as {level}_noise_model, and the {wrong}'s "
            f"file as {_OTHER[level]}_noise_model."
        )


def _path(name: str) -> list[str]:
    return re.split(r"[/\\]", name)


def _mentions(part: str) -> list[_Mention]:
    return list(_find_mentions(part))


def _find_mentions(part: str) -> Iterator[_Mention]:
    words = list(_WORD.finditer(part))
    behind = [*(word.group().lower() for word in words[1:]), ""]
    for word, following in zip(words, behind, strict=False):
        text, begin, noise = word.group().lower(), word.start(), following == "noise"
        if text in ("highnoise", "lownoise"):
            yield _Mention(begin, word.end() - len("noise"), "high" if text == "highnoise" else "low", True)
        elif text in ("high", "low") and following not in _ELSE:
            yield _Mention(begin, word.end(), "high" if text == "high" else "low", noise)
        elif text in ("h", "l") and noise:
            yield _Mention(begin, word.end(), "high" if text == "h" else "low", True)


def _swapped(part: str, level: Level) -> str:
    """The part of a path with the other level in the place of this one, in the same case."""
    return _replaced(part, lambda mention, text: _cased(_OTHER[level], text) if mention.level == level else text)


def _levelless(name: str) -> str:
    return "/".join(_replaced(part, lambda mention, text: "?") for part in _path(name)).lower()


def _replaced(part: str, replacement: Callable[[_Mention, str], str]) -> str:
    for mention in reversed(_mentions(part)):
        part = part[: mention.begin] + replacement(mention, part[mention.begin : mention.end]) + part[mention.end :]
    return part


def _cased(word: str, like: str) -> str:
    word = word[: len(like)] if len(like) == 1 else word
    if like.isupper():
        return word.upper()
    return word.capitalize() if like[:1].isupper() else word
