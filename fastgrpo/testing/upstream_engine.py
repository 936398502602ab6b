"""Adapters of recorded cases that are advantages or objective terms, not rewards."""

LEAD_ADAPTERS = {}
