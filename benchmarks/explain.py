"""`explain_step` takes at most 1.50 of the time of tracing and compiling the step; of a good step it finds nothing.

A ResNet-50 and a transformer of 12 layers on the CPU, at their full depth; smaller ones where it is to be quick. Each
repetition has a step made anew, so that nothing is found in a cache. The report has fewer than 60 lines.
"""

import time
from collections.abc import Iterator
from typing import Any

import flaxsplit as fs

from ._measure import OURS, Effort, Row, Tell, in_turn
from ._peers import Task, build
from .throughput import batch_of, task_of

COMPILE, EXPLAIN, LINES = "trace and compile", "explain_step", 60
LARGE = (("ResNet-50", 64, 8), ("transformer", 64, 4))


def measure(effort: Effort, tell: Tell) -> Iterator[Row]:
    """Both in turns."""
    for name, side, size in effort.of(smoke=[("MLP", 0, 8)], quick=[("transformer, small", 32, 8)], full=LARGE):
        case = f"{name} of {side}, batch {size}"
        if not effort.wants(case):
            continue
        task = task_of(name, side, None)
        samples: dict[str, list[float]] = {COMPILE: [], EXPLAIN: []}
        tell(case)
        for contender in in_turn(samples, effort, lambda words: None):
            samples[contender].append(taken(contender, task, size))
        yield Row(case, "s", samples, COMPILE, {EXPLAIN: 1.5})


def taken(contender: str, task: Task, size: int) -> float:
    """Seconds for a step made anew."""
    peer: Any = build(OURS, task)
    given = peer.fresh(), batch_of(task, size)
    began = time.perf_counter()
    if contender == COMPILE:
        peer.step.lower(*given).compile()
        return time.perf_counter() - began
    report = fs.explain_step(peer.step, *given)
    seconds = time.perf_counter() - began
    if report.findings or len(str(report).splitlines()) >= LINES:
        raise RuntimeError(f"explain_step finds fault with our own step, or says too much:\n{report}")
    return seconds
