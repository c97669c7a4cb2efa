"""The `mve` command line, saying when it takes its first environment step and has learned its first block.

What follows is not run: the process ends there. The counting of seconds is the asking side's.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import machine


def say(word: str, value: float | None = None) -> None:
    print(word if value is None else f"{word} {value}", flush=True)


def watch() -> None:
    """Put a look-out around the first step and the first call that learns."""
    import jax

    from mve import train
    from mve.envs.host import HostEnv

    collect, learn = HostEnv.collect, train.learn

    def first_collect(self: Any, policy: Any, num_steps: int) -> Any:
        env = self._stepped.env
        step = env.step

        def first(action: Any) -> Any:
            result = step(action)
            env.step = step
            say("first_step")
            return result

        env.step, HostEnv.collect = first, collect
        return collect(self, policy, num_steps)

    def first_learn(*arguments: Any) -> Any:
        jax.block_until_ready(learn(*arguments))
        say("first_learned")
        say("peak_rss_mb", machine.peak_rss_mb())
        os._exit(0)

    HostEnv.collect, train.learn = first_collect, first_learn


if __name__ == "__main__":
    watch()
    from mve.cli import main

    sys.exit(main())
