"""The worker's side: one JSON object a line is asked on stdin and answered on stdout.

A worker lives as long as the measurement, so that compiling and filling the buffer are done once and every
answer is a chunk of work in a warm process. Standard library only.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from machine import Usage, peak_rss_mb

Handler = Callable[..., dict[str, Any]]


def timed(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` says it has done, with the time that it took."""
    before = Usage.now()
    done = work()
    return done | Usage.now().since(before) | {"peak_rss_mb": peak_rss_mb()}


def serve(handlers: dict[str, Handler]) -> None:
    """Answer until stdin closes. Each answer says what the process did while nobody asked anything."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to the log
    rest = Usage.now()
    for line in sys.stdin:
        idle = Usage.now().since(rest)
        request = json.loads(line)
        try:
            answer = handlers[request.pop("do")](**request)
        except Exception as error:  # whatever a library raises; the measurement goes on without it
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        answer |= {"idle_seconds": idle["seconds"], "idle_cpu_seconds": idle["cpu_seconds"]}
        print(json.dumps(answer), file=answers, flush=True)
        rest = Usage.now()
