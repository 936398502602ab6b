# SPDX-License-Identifier: Apache-2.0
"""Mathematical answers as text: the boxed part, and equality short of computer algebra."""

from __future__ import annotations

import re
from itertools import pairwise

from fastgrpo.rewards.read import math_pool

# A boxed answer longer than this is no answer.
MAX_BOXED = 8192
MAX_MATH = 2000


def boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` (or `\fbox{...}`), None without a closed one."""
    for command in ("\\boxed{", "\\fbox{"):
        start = text.rfind(command)
        if start >= 0:
            return _balanced(text[start + len(command) :])
    return None


def _balanced(text: str) -> str | None:
    """Up to the brace that closes the one before `text`."""
    depth = 1
    for i, char in enumerate(text[:MAX_BOXED]):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return text[:i]
    return None


def numbers_equal(a: str, b: str) -> bool | None:
    """Whether two texts are the same number; None when one is none."""
    try:
        return float(a) == float(b)
    except (ValueError, OverflowError):
        return None


def same_latex(a: str, b: str) -> bool:
    """Equality after the normalisation of the MATH data set (Hendrycks et al. 2021)."""
    try:
        return normal_latex(a) == normal_latex(b)
    except (ValueError, IndexError):
        return a == b


def normal_latex(text: str) -> str:
    """One spelling of fractions, roots, percent, degrees and units; raises ValueError if odd."""
    for old, new in (
        ("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"),
        ("\\left", ""), ("\\right", ""), ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""),
    ):  # fmt: skip
        text = text.replace(old, new)
    if "\\text{ " in text:
        value, unit = text.split("\\text{ ")  # a second unit is odd: ValueError
        text = value
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if text.startswith("."):
        text = "0" + text
    left, equals, right = text.partition("=")
    if equals and "=" not in right and len(left) <= 2:
        text = right
    text = _braced(text, "\\sqrt", 1).replace(" ", "")
    text = _braced(text, "\\frac", 2)
    if text == "0.5":
        return "\\frac{1}{2}"
    above, slash, below = text.partition("/")
    if slash and "/" not in below and text == f"{int(above)}/{int(below)}":
        return f"\\frac{{{int(above)}}}{{{int(below)}}}"
    return text


def _braced(text: str, command: str, arguments: int) -> str:
    """Braces around one-character arguments: `\\frac12` is `\\frac{1}{2}`."""
    head, *pieces = text.split(command)
    for piece in pieces:
        head += command
        if piece[0] == "{":
            head += piece
        elif arguments == 1 or piece[1] == "{":
            head += f"{{{piece[0]}}}{piece[1:]}"
        else:
            head += f"{{{piece[0]}}}{{{piece[1]}}}{piece[2:]}"
    return head


_UNITS = (
    "degree cm centimeter meter mile second minute hour day week month year foot feet inch yard"
).split()
_UNIT = re.compile(rf"(?:{'|'.join(sorted(_UNITS, key=len, reverse=True))})(?:es)?s? ?(?:\^[0-9])?")


def grade_answer(given: str | None, truth: str) -> bool:
    """Equal as normalised text, or element by element as numbers, fractions or expressions.

    The rules of PRM800K's grader as mathruler has them: a fraction must be spelled as the solution
    spells it, an integer needs an integer, tuples need the same brackets and length. Expressions
    are compared by math-verify in the pool (the published code gives them to SymPy's parser, which
    evaluates Python).
    """
    if given is None or len(given) > MAX_MATH or len(truth) > MAX_MATH:
        return False
    if _mathd(given) == _mathd(truth):
        return True
    given, truth = _plain(given), _plain(truth)
    if given == truth:
        return True
    if not given or not truth:
        return False
    given_parts, truth_parts = _elements(given), _elements(truth)
    if len(given_parts) != len(truth_parts):
        return False
    if len(truth_parts) > 1 and (given[0], given[-1]) != (truth[0], truth[-1]):
        return False
    return all(_same_element(g, t) for g, t in zip(given_parts, truth_parts, strict=True))


def _mathd(text: str) -> str:
    text = text.strip()
    if text.startswith("\\text{") and text.endswith("}"):
        text = text[len("\\text{") : -1].strip()
    try:
        return normal_latex(text)
    except (ValueError, IndexError):
        return text


def _plain(text: str) -> str:
    if text.startswith("\\text{") and text.endswith("}"):
        text = text[len("\\text{") : -1]
    for old, new in (
        ("\\%", ""), ("\\$", ""), ("$", ""), ("%", ""), (" or ", " , "), (" and ", " , "),
        ("million", "*10^6"), ("billion", "*10^9"), ("trillion", "*10^12"),
    ):  # fmt: skip
        text = text.replace(old, new)
    text = _UNIT.sub("", text).replace("^\\circ", "").replace("^ \\circ", "")
    if text.startswith("{") and text.endswith("}"):
        text = text[1:-1]
    if _is_integer(text):
        return str(round(float(text.replace(",", ""))))
    if "\\" in text:
        text = _without_latex(text)
    text = text.replace("- ", "-").strip()
    joined = text[:1]
    for before, char in pairwise(text):  # 7 3/4 is 7+3/4
        joined += "+" if char == " " and before.isdigit() else char
    text = joined.replace("+ ", "+").replace(" ", "").replace("{", "").replace("}", "").lower()
    return str(round(float(text.replace(",", "")))) if _is_integer(text) else text


_FRACTION = re.compile(r"\\[td]?frac\{([^{}]{1,200})\}\{([^{}]{1,200})\}")


def _without_latex(text: str) -> str:
    text = _FRACTION.sub(r"\1/\2", _braced_or_same(text))
    for old, new in (("\\cdot", "*"), ("\\times", "*"), ("\\infty", "inf"), ("\\cup", "U")):
        text = text.replace(old, new)
    return text.replace("\\", "").replace("left", "").replace("right", "")


def _braced_or_same(text: str) -> str:
    try:
        return _braced(text, "\\frac", 2)
    except IndexError:
        return text


def _is_integer(text: str) -> bool:
    try:
        value = float(text.replace(",", "") if _grouped(text) else text)
    except ValueError:
        return False
    return abs(value) < 1e15 and abs(value - round(value)) <= 1e-7


def _grouped(text: str) -> bool:
    """Commas in thousands places only."""
    head, *groups = text.split(",")
    return all(len(g.split(".")[0]) == 3 and g[:3].isdigit() for g in groups)


def _elements(text: str) -> list[str]:
    brackets = "()[]"
    if len(text) > 2 and text[0] in brackets and text[-1] in brackets:
        inner = text[1:-1]
        if not any(b in inner for b in brackets):
            return [part.strip() for part in inner.split(",")]
    return [text]


def _is_fraction(text: str) -> bool:
    above, slash, below = text.removeprefix("-").partition("/")
    return bool(slash) and above.isdigit() and below.isdigit() and int(below[:20]) != 0


def _same_element(given: str, truth: str) -> bool:
    if _is_fraction(given) and _is_fraction(truth):
        return given == truth
    if _is_integer(given) != _is_integer(truth):
        return False
    return math_pool.equal(f"${given}$", f"${truth}$").equal
