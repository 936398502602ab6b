# SPDX-License-Identifier: Apache-2.0
"""Arithmetic on model text: a recursive-descent parser over a fixed grammar.

    sum     = product (("+" | "-") product)*
    product = sign (("*" | "/" | "//" | "%") sign)*
    sign    = ("+" | "-")* power
    power   = atom (("^" | "**") sign)?
    atom    = number | name | name "(" sum ("," sum)* ")" | "(" sum ")"

Names are those of `FUNCTIONS` and `CONSTANTS`. Time and numbers are bounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from fastgrpo.rewards.read.tags import pattern

MAX_CHARS, MAX_DEPTH = 512, 32
FUNCTIONS: dict[str, Callable[..., float]] = {
    "sqrt": math.sqrt, "abs": abs, "exp": math.exp, "log": math.log, "log10": math.log10,
    "sin": math.sin, "cos": math.cos, "tan": math.tan, "floor": math.floor, "ceil": math.ceil,
    "round": round, "min": min, "max": max,
}  # fmt: skip
CONSTANTS = {"pi": math.pi, "e": math.e}
_TOKEN = (
    r"\s*(?:([0-9]+\.?[0-9]*(?:[eE][-+]?[0-9]{1,3})?|\.[0-9]+(?:[eE][-+]?[0-9]{1,3})?)"
    r"|([a-z][a-z0-9]*)|(\*\*|//|[-+*/%^(),]))"
)


def calculate(expression: str) -> float:
    """The value of an arithmetic expression; ValueError, with the reason, where it has none."""
    if not isinstance(expression, str) or len(expression) > MAX_CHARS:
        raise ValueError(f"expression: expected text of at most {MAX_CHARS} characters")
    try:
        value = _Parser(_tokens(expression)).whole()
    except ZeroDivisionError as fault:
        raise ValueError("expression: a division by zero") from fault
    if not math.isfinite(value):
        raise ValueError("expression: the result is not a finite real number")
    return value


def _tokens(text: str) -> list[str | float]:
    text, found, position = text.strip().lower().replace("×", "*").replace("÷", "/"), [], 0
    while position < len(text):
        match = pattern(_TOKEN).match(text, position)
        if match is None:
            raise ValueError(f"expression: cannot read {text[position : position + 16]!r}")
        number, word, sign = match.groups()
        found.append(float(number) if number is not None else word or sign)
        position = match.end()
    return found


class _Parser:
    def __init__(self, tokens: list[str | float]):
        self._tokens, self._at, self._depth = tokens, 0, 0

    def whole(self) -> float:
        value = self._sum()
        if self._at < len(self._tokens):
            raise ValueError(f"expression: unexpected {self._tokens[self._at]!r}")
        return value

    def _deeper(self) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ValueError(f"expression: nested deeper than {MAX_DEPTH}")

    def _take(self, *wanted: str) -> str | None:
        """The next token where it is one of those wanted."""
        if self._at < len(self._tokens) and self._tokens[self._at] in wanted:
            self._at += 1
            return self._tokens[self._at - 1]
        return None

    def _sum(self) -> float:
        self._deeper()
        value = self._product()
        while sign := self._take("+", "-"):
            other = self._product()
            value = value + other if sign == "+" else value - other
        self._depth -= 1
        return value

    def _product(self) -> float:
        value = self._sign()
        while sign := self._take("*", "/", "//", "%"):
            other = self._sign()
            if sign == "*":
                value = value * other
            elif sign == "%":
                value = value % other
            else:
                value = value / other if sign == "/" else value // other
        return value

    def _sign(self) -> float:
        negative = False
        while sign := self._take("+", "-"):
            negative ^= sign == "-"
        value = self._power()
        return -value if negative else value

    def _power(self) -> float:
        base = self._atom()
        if not self._take("^", "**"):
            return base
        self._deeper()
        value = _applied(math.pow, base, self._sign())
        self._depth -= 1
        return value

    def _atom(self) -> float:
        if self._take("("):
            return self._closed()
        token = self._tokens[self._at] if self._at < len(self._tokens) else None
        self._at += 1
        if isinstance(token, float):
            return token
        if token in CONSTANTS:
            return CONSTANTS[token]
        if token not in FUNCTIONS or not self._take("("):
            raise ValueError(f"expression: expected a number, came {token!r}")
        arguments = [self._sum()]
        while self._take(","):
            arguments.append(self._sum())
        if not self._take(")"):
            raise ValueError("expression: a bracket is not closed")
        return _applied(FUNCTIONS[token], *arguments)

    def _closed(self) -> float:
        value = self._sum()
        if not self._take(")"):
            raise ValueError("expression: a bracket is not closed")
        return value


def _applied(function: Callable[..., float], *arguments: float) -> float:
    try:
        return float(function(*arguments))
    except (ArithmeticError, TypeError, ValueError) as fault:
        raise ValueError(f"expression: {fault}") from fault
