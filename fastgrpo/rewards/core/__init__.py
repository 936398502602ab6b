# SPDX-License-Identifier: Apache-2.0
"""Rewards as functions: the registry, its guard, what is made of other rewards."""
