"""Hypothesis without its time limit per example: these tests must not fail because the machine is busy."""

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
