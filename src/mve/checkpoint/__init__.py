"""Checkpoints of a run, whose files cannot run code: what is frozen, where its rows go, how a set is written.

frozen     a training state on the host, as it was at some step
segments   the rows of its replay, in files that checkpoints share
manifest   what a checkpoint says of itself, checksums included
store      a set of checkpoints written whole or not at all, and read back
writer     the thread that writes while training goes on
"""

from mve.checkpoint.store import (
    KEPT,
    Which,
    forget_after,
    latest,
    load_tensors,
    read_facts,
    restore,
    save,
    steps,
    write,
)

__all__ = [
    "KEPT",
    "Which",
    "forget_after",
    "latest",
    "load_tensors",
    "read_facts",
    "restore",
    "save",
    "steps",
    "write",
]
