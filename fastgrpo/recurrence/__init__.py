# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers over a packed row: a prompt's state once, its completions start from it."""

from fastgrpo.recurrence.seams import (
    RecurrenceError,
    counted_calls,
    implementations,
    install,
    uninstall,
)
