# SPDX-License-Identifier: Apache-2.0
"""RewardMap's difficulty-aware rewards for metro maps (fscdc/RewardMap@15428ac)."""

from __future__ import annotations

from typing import Any

from fastgrpo.errors import InputError
from fastgrpo.rewards.core.registry import reward
from fastgrpo.rewards.read.faults import BadColumn, Unscorable
from fastgrpo.rewards.read.mathematics import normal_latex
from fastgrpo.rewards.read.tags import pattern

SOURCE = "fscdc/RewardMap@15428ac"
CITY_WEIGHT = {"easy": 1.0, "middle": 1.2, "hard": 1.5}
MAX_TEXT = 16384
MAX_SECTIONS = 64
MAX_NAME = 256
_REPLACED = (
    ("Metro", ""), ("metro", ""), (",", ""), ("*", ""), ("\n", ""), ("'", ""),
    ("Univ.", "University"), ("Univ", "University"), ("Tech.", "Technology"),
    ("Tech", "Technology"), ("road", "lu"), ("Road", "lu"), ("Station", ""), ("station", ""),
    ("Asian Games Village", "yayuncun"),
)  # fmt: skip


def clean_stop(name: str) -> str:
    """One spelling of a stop: no "station", no brackets, blanks or hyphens, lower case."""
    name = name[:MAX_NAME]
    for old, new in _REPLACED:
        name = name.replace(old, new)
    name = name.removesuffix("站")
    name = pattern(r"[(（][^)）]*[)）]").sub("", name)
    return "".join(name.replace("-", "").split()).lower()


def difficulty_weight(
    kind: str, question_transfer_count: int | None, difficulty_city: str
) -> float:
    """1.0, 1.2 or 1.5 by city; plus 0.5 for planning with at least one transfer."""
    if difficulty_city not in CITY_WEIGHT:
        raise NotImplementedError(f"difficulty_city {difficulty_city!r}")
    weight = CITY_WEIGHT[difficulty_city]
    if "TorF" in kind or "Counting" in kind:
        return weight
    if "planning" not in kind:
        raise NotImplementedError(f"type {kind!r}")
    if question_transfer_count < 0:
        raise NotImplementedError(f"question_transfer_count {question_transfer_count}")
    return weight + 0.5 * (question_transfer_count > 0)


def read_route(text: str, *, exact_case: bool) -> list[tuple[str, str, str]]:
    """(line, departure, arrival) of every `--` section that has the three fields."""
    route = []
    for section in text.split("--")[:MAX_SECTIONS]:
        fields = ("Route Name:", "Departure Stop:", "Arrival Stop:")
        seen = section if exact_case else section.lower()
        if not all((f if exact_case else f.lower()) in seen for f in fields):
            continue
        line, departure = _field(section, "Route Name: "), _field(section, "Departure Stop: ")
        arrival = clean_stop(section.split("Arrival Stop:")[-1].strip())
        line = "Wrong" if line is None else line.strip()
        line = "Line 1" if "八通" in line else "Line 4" if "大兴" in line else line
        route.append((line, "Wrong" if departure is None else clean_stop(departure), arrival))
    return route


def _field(section: str, name: str) -> str | None:
    start = section.find(name)
    end = section.find("\n", start)
    return section[start + len(name) : end] if start >= 0 and end >= 0 else None


def _ends_right(route, station1: str, station2: str) -> bool:
    ends = clean_stop(route[0][1]), clean_stop(route[-1][2])
    return ends == (clean_stop(station1), clean_stop(station2))


def _section_is_right(route, i: int, stops: dict[str, list[str]]) -> tuple[bool, bool]:
    """(both stops on the line, and the transfer to the next section fits or none follows)."""
    line, departure, arrival = route[i]
    on_line = clean_stop(departure) in stops[line] and clean_stop(arrival) in stops[line]
    last = i == len(route) - 1
    return on_line, last or clean_stop(arrival) == clean_stop(route[i + 1][1])


def _cleaned(metro_data: dict[str, list[str]]) -> dict[str, list[str]]:
    return {line: [clean_stop(stop) for stop in stops] for line, stops in metro_data.items()}


def route_is_right(text: str, metro_data, station1: str, station2: str) -> bool:
    """The route leads from station1 to station2 over existing lines with fitting transfers."""
    route, stops = read_route(text, exact_case=True), _cleaned(metro_data)
    if not route or not _ends_right(route, station1, station2):
        return False
    return all(
        line in stops and all(_section_is_right(route, i, stops))
        for i, (line, _, _) in enumerate(route)
    )


def planning_detail(
    text: str, metro_data, station1: str, station2: str, transfers: int, allowed: int
) -> float:
    """+2 right ends; per section +4 the direct line (0 transfers) or +3 a known line, +1 a right
    transfer, -5 for each section beyond `allowed`; at most 10.
    """
    route, stops = read_route(text, exact_case=False), _cleaned(metro_data)
    if not route or not _ends_right(route, station1, station2):
        return 0.0
    ends = {clean_stop(station1), clean_stop(station2)}
    direct = {line for line, names in stops.items() if ends <= set(names)}
    score = 2.0
    for i, (line, _, _) in enumerate(route):
        score -= 5 * (i + 1 > allowed)
        if line not in stops:
            continue
        score += (4 * (line in direct)) if transfers == 0 else 3
        on_line, fits = _section_is_right(route, i, stops)
        if on_line and fits and i < len(route) - 1 and i + 1 <= transfers:
            score += 1
    return min(score, 10.0)


_FLAGS = ("the final answer is", "the answer is", "the correct answer is", "the answer should be")


def short_answer(text: str) -> str:
    r"""The answer of a yes/no or counting question: boxed, or after "the answer is"."""
    if "oxed{" not in text:
        for flag in _FLAGS:
            for spelled in (flag, flag.replace("the", "The")):
                found = spelled in text
                text = text.split(spelled)[-1].strip()
                if found:
                    text = text.split("\n")[0].split(". ")[0]
    elif text.count("oxed{") > 1:
        text = "\\boxed{" + text.split("oxed{")[-1]
    text = text.lower().replace("{}", "")
    start, end = text.find("oxed{"), text.rfind("}")
    if 0 <= start and start + 5 <= end:
        text = text[start + 5 : end]
    closed, opened = text.find("}"), text.find("{")
    if closed >= 0 and not 0 <= opened < closed:
        text = text.split("}")[0]
    text = text.split("=")[-1].split("\\approx")[-1].replace("$", "")
    for old in (" ", "\\,", "\n", "\\text", "\\mbox", "{units}", "units", "{km}", "km"):
        text = text.replace(old, "")
    try:
        text = normal_latex(text)
    except (ValueError, IndexError):
        pass
    return text.rstrip(".").lstrip(":").strip()


def _is_right(kind: str, said: str, truth: Any) -> bool:
    if "TorF" in kind:
        return said.lower() == ("yes" if truth == 1 else "no")
    if kind == "Counting1":
        letters = {"a": 0, "b": 1, "c": 2, "d": 3}
        return said.lower() in letters and letters[said.lower()] == truth
    try:
        return int(said) == truth
    except ValueError:
        return False


_COLUMNS = ("solution", "type", "difficulty_city")
_OPTIONAL = ("station1", "station2", "metro_data", "question_transfer_count")


@reward(
    "rewardmap/total",
    columns=_COLUMNS,
    optional=_OPTIONAL,
    range=(0.0, 30.0),
    upstream_range=(-620.0, 30.0),
    source=SOURCE,
)
def total(
    text: str,
    *,
    solution: Any,
    type: str,
    difficulty_city: str,
    station1: str = "",
    station2: str = "",
    metro_data: dict[str, list[str]] | None = None,
    question_transfer_count: int | None = None,
    mode: str = "difficulty_aware",
) -> float:
    """w * (10 * right + 0.5 * detail); the detail for "planning" only, w by `difficulty_weight`.

    `type` is TorF1, TorF2, Counting1-3 or planning; `metro_data` maps lines to their stops.
    `mode="baseline"` has w = 1.

    Source: fscdc/RewardMap@15428ac, `reason_map_compute_score`. "upstream": every section beyond
    the transfer count loses 5, so even the right direct route does, and long routes go far below
    zero. "fixed": a route with k transfers may have k + 1 sections, and the score is at least 0.
    """
    check_mode(mode)
    try:
        weight = weight_of(type, question_transfer_count, difficulty_city, mode)
    except (NotImplementedError, TypeError) as fault:
        raise BadColumn(str(fault)) from None
    if len(text) > MAX_TEXT:
        raise Unscorable("answer_too_long")
    route = (metro_data, station1, station2, question_transfer_count)
    allowed = (question_transfer_count or 0) + 1  # k transfers join k + 1 sections
    return max(score_of(text, solution, type, route, allowed), 0.0) * weight


def check_mode(mode: str) -> None:
    """InputError unless the mode is one of the two."""
    if mode not in ("difficulty_aware", "baseline"):
        raise InputError(f"mode: expected 'difficulty_aware' or 'baseline', got {mode!r}")


def weight_of(kind: str, transfers: int | None, city: str, mode: str) -> float:
    """`difficulty_weight`, 1 in the baseline."""
    weight = difficulty_weight(kind, transfers, city)
    return 1.0 if mode == "baseline" else weight


def score_of(text: str, solution: Any, kind: str, route: tuple, allowed: int) -> float:
    """10 for the right answer, and half the detail of a planned route."""
    if "planning" not in kind:
        return 10.0 * _is_right(kind, short_answer(text), solution)
    score = 10.0 * route_is_right(text, *route[:3])
    return score + 0.5 * planning_detail(text, *route, allowed) if kind == "planning" else score
