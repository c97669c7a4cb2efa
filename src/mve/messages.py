"""What is said to users goes on one line. Imports nothing that is slow: the command line starts with it."""

from __future__ import annotations

import os


def one_line(x: object) -> str:
    """Its text without line breaks; the name of its type where it has none."""
    return " ".join(str(x).split()) or type(x).__name__


def what_failed(error: BaseException) -> str:
    """The kind of an error and what it says, on one line."""
    return one_line(f"{type(error).__name__}: {error}").rstrip(":")


def number(x: float | None, form: str) -> str:
    """A number of a report, None where it is not finite: a model that diverges has such."""
    return "not finite" if x is None else f"{x:{form}}"


def no_device() -> str | None:
    """Why JAX has nothing to compute on, on one line; None if it has."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter without a word, for a platform of no device
        asked = os.environ.get("JAX_PLATFORMS")
        where = f"; JAX_PLATFORMS={asked} asks for what is not there: unset it" if asked else ""
        return f"JAX has no device to compute on{where} ({what_failed(error)})"
    return None
