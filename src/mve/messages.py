"""What is said to users goes on one line. Imports nothing: the command line starts with it."""

from __future__ import annotations


def one_line(x: object) -> str:
    """Its text without line breaks; the name of its type where it has none."""
    return " ".join(str(x).split()) or type(x).__name__


def what_failed(error: BaseException) -> str:
    """The kind of an error and what it says, on one line."""
    return one_line(f"{type(error).__name__}: {error}").rstrip(":")
