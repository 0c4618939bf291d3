"""Shared fixtures: where the reference cases lie."""

from pathlib import Path

GOLDEN = Path(__file__).parent / "data" / "golden"
UNDERSTANDING = GOLDEN / "understanding"
GENERATION = GOLDEN / "generation"
