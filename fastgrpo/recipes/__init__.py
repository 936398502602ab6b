# SPDX-License-Identifier: Apache-2.0
"""Published systems as recipes: `fastgrpo train --recipe NAME`.

`names()` lists them, `load(name)` reads one, `python -m fastgrpo.recipes` prints the table of what
is exact and what is this project's reading.
"""

from fastgrpo.recipes.recipe import Recipe, load, names, parse
