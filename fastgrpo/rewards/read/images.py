# SPDX-License-Identifier: Apache-2.0
"""Which image of several a text is about, where it says so in words or in JSON.

words   the second image, the last picture, image two, 第二张图
number  Image 2, image #2, Figure 2, Picture-2, <image_2>, 图2: counted from one
JSON    {"image_index": 1}, as the data column of that name: counted from zero
"""

from __future__ import annotations

from fastgrpo.rewards.read.tags import pattern

ORDINALS = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth",
)  # fmt: skip
NUMERALS = "一二三四五六七八九十"
# The longest text searched.
MAX_SEARCHED = 1 << 16

_KIND = r"(?:image|picture|photo|photograph|figure|img)"
_NAMED = "|".join(
    (
        rf"\b({'|'.join(ORDINALS)}|last|[0-9]{{1,2}}(?:st|nd|rd|th))\s+(?:of\s+the\s+)?{_KIND}\b",
        rf"\b{_KIND}s?[\s_#-]*(?:no\.?\s*|number\s+)?([0-9]{{1,2}})\b",
        rf"\b{_KIND}\s+({'|'.join(('one', 'two', 'three', 'four', 'five'))})\b",
        rf"第\s*([{NUMERALS}]|[0-9]{{1,2}})\s*(?:张|幅|个)?\s*(?:图|照片)",
        r"(?:图片?|图像|照片)\s*([0-9]{1,2})",
        r'"image_index"\s*:\s*([0-9]{1,3})',
    )
)
_WORDS = {word: i for i, word in enumerate(ORDINALS)}
_WORDS |= {word: i for i, word in enumerate(NUMERALS)}
_WORDS |= {word: i for i, word in enumerate(("one", "two", "three", "four", "five"))}
_FROM_ZERO = 6  # the group of the JSON key


def named_image(text: str, count: int) -> int | None:
    """The index of the one image of `count` that the text names; None for none or several."""
    named = set()
    for found in pattern(f"(?i){_NAMED}").finditer(text[:MAX_SEARCHED]):
        group = found.lastindex
        word = found.group(group).lower()
        if word == "last":
            named.add(count - 1)
        elif word in _WORDS:
            named.add(_WORDS[word])
        else:
            number = int(word.rstrip("stndrh"))
            named.add(number if group == _FROM_ZERO else number - 1)
    index = named.pop() if len(named) == 1 else None
    return index if index is not None and 0 <= index < count else None
