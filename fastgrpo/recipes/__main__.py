# SPDX-License-Identifier: Apache-2.0
"""`python -m fastgrpo.recipes`: the table of all recipes, in Markdown."""

from fastgrpo.recipes import load, names

INTRO = """# Recipes

Every recipe runs by `fastgrpo train --recipe NAME`, with your model and data beside it; any field
can be overridden. *Exact* is what equals the published code; *our reading* is what its authors did
not publish, or published only as a paper, and what this project makes of it. This page is made by
`make recipes` from the files in `fastgrpo/recipes/`.

| recipe | system | rewards | exact | our reading | you bring |
|---|---|---|---|---|---|
"""


def label(spec: dict) -> str:
    """One reward of a recipe in a few characters."""
    if "reward" in spec:
        name = f"`{spec['reward']}`"
    elif "compose" in spec:
        name = f"{spec['compose']}({', '.join(label(p) for p in spec.get('parts', ()))})"
    else:
        name = spec.get("name", "judge" if "judge" in spec else "reward model")
    weight = spec.get("weight", 1)
    return name if weight == 1 else f"{weight} {name}"


def table() -> str:
    """The Markdown page."""
    rows = []
    for name in names():
        recipe = load(name)
        cells = [
            f"`{name}`",
            f"{recipe.system} ({recipe.source})",
            " + ".join(label(r) for r in recipe.rewards),
            recipe.exact,
            recipe.reading,
            recipe.needs or "–",
        ]
        rows.append("| " + " | ".join(" ".join(str(c).split()).replace("|", "\\|") for c in cells))
    return INTRO + "\n".join(f"{row} |" for row in rows) + "\n"


if __name__ == "__main__":
    print(table(), end="")
