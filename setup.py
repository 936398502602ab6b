"""Package metadata is in pyproject.toml; this file only builds the optional extension."""

from setuptools import setup

setup()
