# SPDX-License-Identifier: Apache-2.0
"""Which options an answer chooses: letters where they are letters, else the text of an option.

A letter is read where it stands

    alone             B    (b)    **B**    B.    Ｂ。            also several: A, C   A和C   AC
    as a head         B. A red car    (B) A red car    B：红色的车    one head per line
    after a cue       the answer is B    option B    答案是A、C    选B    B选项
    at the end        ... so I say C.    it is C    ... 因此是（C）

and nowhere else: "A red car" holds no letter. Without a letter, a text equal to an option's counts
as that option.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from fastgrpo.rewards.read.faults import BadColumn, short
from fastgrpo.rewards.read.tags import last_answer, pattern

Options = Mapping[str, str]

# What may stand around a letter, and what may stand between two.
_WRAP = "()[]{}<>\"'`*_$.:,;!?、。 \t\r\n\u3010\u3011\u300c\u300d\\"
_LATEX = ("\\boxed", "\\text", "\\mathrm", "\\mathbf")
_JOIN = r"(?:\s*(?:,|;|/|&|\+|、|\band\b|\bor\b|和|与|及|以及|或)\s*)+"
_AND = rf"{_JOIN}|\s+"
_BEFORE = ("both", "answer", "options", "option", "choices", "choice")  # of letters alone
_ONE = r"[(\[{]?\s*([A-Za-z])\s*[)\]}]?"
_LIST = rf"{_ONE}(?:(?:{_AND}){_ONE})*"
_LETTERS = rf"([(\[{{]?[A-Z][)\]}}]?(?:{_JOIN}[(\[{{]?[A-Z][)\]}}]?)*|[A-Z]{{2,8}})"
_CUES = (
    rf"(?:(?i:answers?|options?|choices?|choose|select|pick)(?i:\s+(?:is|are|would be|should be))?"
    rf"|答案|选项|选择|应选|应该选|故选|我选|选)(?:\s*(?:是|为|应为|应该是))?\s*[:\s\"'*]*{_LETTERS}"
    r"(?:[^A-Za-z0-9_'\-]|$)",
    rf"(?:^|[^A-Za-z0-9_]){_LETTERS}\s*(?:选项|项|是正确|正确"
    r"|(?:is|are)\s+(?:both\s+)?(?:the\s+)?(?:right|correct|best|true))",
)
# The last word of a text, where a stop or a bracket follows it.
_STOPPED = r"(?:^|[\s,:、(\[{*]|[^\x00-\x7f])([A-Z])\s*(?:[)\]}][^A-Za-z]*|[*]*[.。!?][\s\"'*]*)$"
_LAST = r"(?:\bis|[:=是为])[\s\"'*]*([A-Z])[\s\"'*]*$"
_INLINE = r"(?:^|\s)\(?([A-Z])[).:、]\s*"
_BRACKETED = r"[(\[{]\s*([A-Z])\s*[)\]}]"


def choices(text: str, options: Options | None = None, *, strict: bool = False) -> frozenset[str]:
    """The letters chosen by an answer (without its tags), empty when none is.

    `options` maps letters to texts: other letters are not read, and a text equal to an option's
    counts as its letter. `strict` reads letters alone and as heads only, as for a solution that
    need not be a choice at all.
    """
    if options is None and len(text) == 1:
        return _upper(text)
    text = unicodedata.normalize("NFKC", short(text)).strip()
    for command in _LATEX:
        text = text.replace(command, "")
    found = _alone(text, options) or _heads(text)
    if not found and not strict:
        found = _cued(text) or _stopped(text)
    if options is not None:
        found = found & frozenset(options)
        return found or _by_text(text, options)
    return found


def solution_choices(
    solution: Any, options: Options | None = None, *, strict: bool = False
) -> frozenset[str]:
    """The letters of a solution: text, tags allowed, or a list of letters or option texts.

    Raises BadColumn when it is neither text nor a list of texts.
    """
    if isinstance(solution, str):
        return choices(last_answer(solution), options, strict=strict)
    if isinstance(solution, Sequence) and all(isinstance(s, str) for s in solution):
        return frozenset().union(*(choices(s, options, strict=strict) for s in solution))
    raise BadColumn("solution is not text")


def same_choice(
    said: str, solution: Any, options: Options | None = None, *, strict: bool = False
) -> bool | None:
    """Whether an answer chooses exactly what the solution does; None where that chooses nothing.

    The text behind the letter of a solution ("B. A red car") counts as that option's.
    """
    truth = solution_choices(solution, options, strict=strict)
    if not truth:
        return None
    chosen = choices(said, options)
    if not chosen and options is None and isinstance(solution, str):
        own = _headed_texts(last_answer(solution))
        chosen = _by_text(unicodedata.normalize("NFKC", said), own) if own else chosen
    return chosen == truth


def read_options(value: Any, problem: Any = None) -> dict[str, str] | None:
    """{letter: text} from a row's list or mapping of options, or from the lines of its question.

    A list is lettered from A, whether or not its texts carry their letters. In a question, lines
    headed A, B, ... in order are its options, else such heads in its last line. None without any.
    """
    if isinstance(value, Mapping):
        return {str(k).strip().upper(): str(v) for k, v in value.items() if v is not None} or None
    if isinstance(value, Sequence) and not isinstance(value, str) and 1 < len(value) <= 26:
        lettered = [_headed_texts(str(text)) or {chr(65 + i): str(text)} for i, text in
                    enumerate(value)]  # fmt: skip
        merged = {letter: text for one in lettered for letter, text in one.items()}
        return merged if len(merged) == len(value) else None
    lines = value if isinstance(value, str) else problem
    if not isinstance(lines, str):
        return None
    lines = unicodedata.normalize("NFKC", lines[-(1 << 14) :])
    found = _headed_texts(lines)
    expected = [chr(65 + i) for i in range(len(found))]
    if len(found) > 1 and list(found) == expected:
        return found
    return _inline_options(next((line for line in reversed(lines.split("\n")) if line.strip()), ""))


def _inline_options(line: str) -> dict[str, str] | None:
    """The options of `... (A) a cat (B) a dog`: heads A, B, ... in order, each once."""
    heads = list(pattern(_INLINE).finditer(line))
    if len(heads) < 2 or [head.group(1) for head in heads] != [
        chr(65 + i) for i in range(len(heads))
    ]:
        return None
    ends = [head.start() for head in heads[1:]] + [len(line)]
    texts = [line[head.end() : end].strip(" ,;") for head, end in zip(heads, ends, strict=True)]
    return {head.group(1): text for head, text in zip(heads, texts, strict=True)}


def _alone(text: str, options: Options | None) -> frozenset[str]:
    """The whole text is a letter, a list of letters, or letters written together."""
    bare = text.strip(_WRAP)
    for word in _BEFORE:
        if bare[: len(word) + 1].lower() in (f"{word} ", f"{word}:", f"{word}("):
            bare = bare[len(word) :].strip(_WRAP)
    if len(bare) == 1:
        return _upper(bare)
    if len(bare) > 128:
        return frozenset()
    if bare.isascii() and bare.isalpha():  # AC: in order, none twice, none beyond the options
        known = options if options is not None else "ABCDEFGHIJ"
        ordered = len(bare) <= len(known) and list(bare) == sorted(set(bare))
        return frozenset(bare) if ordered and all(c in known for c in bare) else frozenset()
    if pattern(_LIST).fullmatch(bare) is None:
        return frozenset()
    singles = pattern(r"(?:^|[^A-Za-z])([A-Za-z])(?:[)\]}]|\b)").findall(bare)
    return frozenset().union(*map(_upper, singles))


def _upper(letter: str) -> frozenset[str]:
    usable = letter.isascii() and letter.isalpha()
    return frozenset(letter.upper()) if usable else frozenset()


def _heads(text: str) -> frozenset[str]:
    lines = text.replace(";", "\n").split("\n")[:64]
    if _head(lines[0]) is None:
        return frozenset()
    return frozenset(head[0] for line in lines if (head := _head(line)))


def _head(line: str) -> tuple[str, str] | None:
    """(letter, text behind it) of a line that begins with an option's letter and a stop."""
    line = line.lstrip(" \t([{*_#")
    for word in ("option", "choice", "选项"):
        if line[: len(word)].lower() == word:
            line = line[len(word) :].lstrip()
    letter, rest = line[:1], line[1:].lstrip(" \t*_")
    if not _upper(letter) or not rest:
        return None
    stop, after = rest[0], rest[1:].lstrip("*_")
    following = after[:1]
    if stop in ")]}.:、。":
        # The rest of an abbreviation (U.S., e.g.) is a lone letter or follows a small one.
        word = not following.isalpha() or after[1:2].isalnum() or after[:2] in ("A ", "I ", "a ")
        sets_off = not following or following.isspace() or not following.isascii()
        if sets_off or (letter.isupper() and word):
            return letter.upper(), after.strip()
    elif stop in "-\u2013\u2014" and letter.isupper() and line[1:2].isspace():
        if following.isspace():
            return letter, after.strip()
    return None


def _headed_texts(text: str) -> dict[str, str]:
    heads = [head for line in text.split("\n")[:512] if (head := _head(line.strip()))]
    return {letter: rest for letter, rest in heads if rest}


def _cued(text: str) -> frozenset[str]:
    found, at = frozenset(), -1
    for cue in _CUES:
        for match in pattern(cue).finditer(text):
            if match.start() > at:
                found, at = frozenset(c for c in _without_words(match.group(1))), match.start()
    return found


def _without_words(letters: str) -> str:
    for word in ("and", "or"):
        letters = letters.replace(word, "")
    return "".join(c for c in letters if c.isascii() and c.isalpha())


def _stopped(text: str) -> frozenset[str]:
    found = pattern(_STOPPED).search(text) or pattern(_LAST).search(text)
    if found is not None:
        return frozenset(found.group(1))
    bracketed = pattern(_BRACKETED).findall(text)
    return frozenset(bracketed[-1:])


def _by_text(text: str, options: Options) -> frozenset[str]:
    said = _plain(text)
    same = [letter for letter, option in options.items() if said and _plain(option) == said]
    return frozenset(same) if len(same) == 1 else frozenset()


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).strip().strip("\"'`*").rstrip(".。!").lower()
    return " ".join(text.split())
