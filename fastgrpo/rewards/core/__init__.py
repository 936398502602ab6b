"""Rewards as functions: the registry, its guard, what is made of other rewards."""
