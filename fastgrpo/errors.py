# SPDX-License-Identifier: Apache-2.0
"""The errors users see."""


class InputError(ValueError):
    """An argument, row or sample is not what the function documents.

    The message names the argument (and the row or sample where there is one), what was expected
    and what came.
    """
