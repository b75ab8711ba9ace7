"""Align proteins: `Aligner` in Python, and the library behind scripts/align.py."""

from alignment.aligner import Aligner

__all__ = ["Aligner"]
