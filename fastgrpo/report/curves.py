# SPDX-License-Identifier: Apache-2.0
"""The curves of a run as PNG: one picture per question a reader has."""

from __future__ import annotations

import io
from dataclasses import dataclass

from fastgrpo.report.run import Run

INK, GRID, LINE = "#333b47", "#e6e9ee", "#2563a8"
# Stacked parts, from the bottom: the rollout cold, the passes warm.
PART_COLOURS = {
    "generate": "#2563a8",
    "prepare": "#7fb0dd",
    "rewards": "#c9d6e3",
    "old and reference log-probs": "#f2c879",
    "policy forward": "#e8963e",
    "backward": "#c2572b",
    "optimizer": "#7a2e1d",
}


@dataclass(frozen=True)
class Curve:
    """A picture called `name`: its title, the log keys drawn in it (prefix "*" ends a family), and
    its unit.
    """

    name: str
    title: str
    keys: tuple[str, ...]
    unit: str = ""


CURVES = (
    Curve("reward", "Reward", ("reward", "rewards/*/mean")),
    Curve("reward_std", "Reward standard deviation", ("reward_std",)),
    Curve("zero_variance", "Groups without variance", ("frac_reward_zero_std",), "share"),
    Curve("kl", "KL to the reference", ("kl",), "nats per token"),
    Curve("entropy", "Entropy of the policy", ("entropy",), "nats per token"),
    Curve("length", "Completion length", ("completions/mean_length",), "tokens"),
    Curve("truncated", "Completions cut at the limit", ("completions/clipped_ratio",), "share"),
)


def draw_histograms(run: Run) -> dict[str, bytes]:
    """PNG bytes by reward: how its values are spread over the completions of the first and of the
    last logged step; a reward that scored none of them is left out."""
    pictures = {}
    steps = sorted({row["step"] for row in run.completions})
    for name in run.reward_names:
        spread = {
            f"step {step}": [
                row[name]
                for row in run.completions
                if row["step"] == step and row.get(name) is not None and row[name] == row[name]
            ]
            for step in dict.fromkeys((steps[0], steps[-1]))
        }
        spread = {label: values for label, values in spread.items() if values}
        if spread:
            pictures[name] = _histogram(name, spread)
    return pictures


def _histogram(name: str, spread: dict[str, list[float]]) -> bytes:
    figure, axes = _figure()
    every = [value for values in spread.values() for value in values]
    low, high = min(every), max(every)
    bins = (
        [low + (high - low) * i / 20 for i in range(21)] if high > low else [low - 0.5, low + 0.5]
    )
    colours = ("#7d8794", LINE)[-len(spread) :]
    axes.hist(
        list(spread.values()),
        bins=bins,
        weights=[[1 / len(values)] * len(values) for values in spread.values()],
        label=list(spread),
        color=colours,
    )
    axes.xaxis.get_major_locator().set_params(integer=False)
    return _finish(figure, axes, name, "share of completions", legend=True, across="value")


def draw_curves(run: Run) -> dict[str, bytes]:
    """PNG bytes by name, in reading order; a curve whose keys the run did not log is left out."""
    pictures = {}
    for curve in CURVES:
        series = _series(run, curve.keys)
        if series:
            pictures[curve.name] = _lines(curve, series)
    parts = _series(run, ("time/*",))
    if parts:
        pictures["step_time"] = _stack(parts)
    return pictures


def _series(run: Run, keys: tuple[str, ...]) -> dict[str, tuple[list[int], list[float]]]:
    """{label: (steps, values)} of the log keys that match, None and absent values left out."""
    found = {}
    logged = dict.fromkeys(key for entry in run.history for key in entry)
    for key in keys:
        head, star, tail = key.partition("*")
        for name in logged:
            if name != key and not (star and name.startswith(head) and name.endswith(tail)):
                continue
            points = [(e["step"], e[name]) for e in run.history if e.get(name) is not None]
            if points:
                label = name[len(head) : len(name) - len(tail)] if star else name
                found[label] = tuple(map(list, zip(*points, strict=True)))
    return found


def _figure(width: float = 4.6):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The object interface: no global state, no display, whatever backend the user's session has.
    figure = Figure(figsize=(width, 2.7), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#b8c0cc")
    axes.tick_params(colors=INK, labelsize=8, length=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return figure, axes


def _finish(
    figure, axes, title: str, unit: str, legend: bool, across: str = "optimizer step"
) -> bytes:
    pad = 16 if legend else 6
    axes.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold", pad=pad)
    axes.set_xlabel(across, fontsize=8, color=INK)
    axes.set_ylabel(unit, fontsize=8, color=INK)
    if legend:
        axes.legend(
            fontsize=7, frameon=False, labelcolor=INK, ncols=3, loc="lower left",
            bbox_to_anchor=(-0.02, 0.98), borderpad=0, handlelength=1.4, columnspacing=1.2,
        )  # fmt: skip
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _lines(curve: Curve, series: dict) -> bytes:
    figure, axes = _figure()
    shades = (LINE, "#e8963e", "#3f9b6c", "#8b5fb0", "#7d8794")
    for index, (label, (steps, values)) in enumerate(series.items()):
        marker = "o" if len(steps) < 3 else None
        axes.plot(
            steps,
            values,
            color=shades[index % len(shades)],
            linewidth=1.6,
            marker=marker,
            label=label,
        )
    if min(min(values) for _, values in series.values()) >= 0:
        top = max(max(values) for _, values in series.values())
        axes.set_ylim(0, 1.08 * top if top > 0 else 1)
    return _finish(figure, axes, curve.title, curve.unit, len(series) > 1)


def _stack(parts: dict) -> bytes:
    figure, axes = _figure(width=7.6)
    order = sorted(parts, key=lambda name: [*PART_COLOURS, name].index(name))
    steps = max((steps for steps, _ in parts.values()), key=len)
    at = [dict(zip(*parts[name], strict=True)) for name in order]
    axes.stackplot(
        steps,
        [[values.get(step, 0.0) for step in steps] for values in at],
        labels=order,
        colors=[PART_COLOURS.get(name, "#7d8794") for name in order],
        linewidth=0,
    )
    axes.margins(x=0)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], labels[::-1], fontsize=7, frameon=False, labelcolor=INK,
        loc="center left", bbox_to_anchor=(1.0, 0.5),
    )  # fmt: skip
    return _finish(figure, axes, "Where a step's time goes", "seconds", legend=False)
