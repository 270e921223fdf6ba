"""`explain_step` takes at most 1.5 of the time that the step takes to be traced and compiled; its page is under 60 lines.

Over the types of the arguments alone: nothing is allocated, so the large networks fit everywhere.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax

import flaxsplit as fs

from ._measure import OURS, Effort, Row, Tell, in_turn, seconds
from ._peers import Peer, build
from .throughput import task_of

COMPILE, EXPLAIN = "trace and compile", "explain_step"
SMALL = [("ResNet-50's stand-in", 32, 8), ("transformer, small", 16, 8)]
LARGE = [("ResNet-50", 64, 8), ("transformer", 128, 4)]


def measure(effort: Effort, tell: Tell) -> Iterator[Row]:
    """A new function each time, so that nothing is found in a cache; persistent ones are off."""
    jax.config.update("jax_enable_compilation_cache", False)
    (rounds,) = effort.of(smoke=[1], quick=[3], full=[2])  # of the large ones each takes most of a minute
    for name, side, examples in effort.of(smoke=SMALL[1:], quick=SMALL, full=LARGE):
        case = f"{name} of {side}"
        if not effort.wants(case):
            continue
        task = task_of(name, side, None)
        batch = jax.eval_shape(lambda task=task, examples=examples: batch_of(task.shape, examples))
        carry, samples = jax.eval_shape(build(OURS, task).fresh), {COMPILE: list[float](), EXPLAIN: list[float]()}
        report = fs.explain_step(build(OURS, task).step, carry, batch)  # the first of a process imports and warms up
        for contender in in_turn(samples, effort, functools.partial(_tell, tell, case), rounds):
            peer = build(OURS, task)
            run = _explained if contender == EXPLAIN else _compiled
            samples[contender].append(seconds(functools.partial(run, peer, carry, batch)))
        told = f"a page of {len(str(report).splitlines())} lines, {len(report.findings)} findings"
        yield Row(case, "s", samples, COMPILE, {EXPLAIN: 1.5}, notes={EXPLAIN: told})


def batch_of(shape: tuple[int, ...], size: int) -> Any:
    """Examples and their classes."""
    return jax.numpy.zeros((size, *shape)), jax.numpy.zeros(size, int)


def _tell(tell: Tell, case: str, words: str) -> None:
    tell(f"{case}: {words}")


def _compiled(peer: Peer, carry: Any, batch: Any) -> None:
    peer.step.trace(carry, batch).lower().compile()


def _explained(peer: Peer, carry: Any, batch: Any) -> None:
    fs.explain_step(peer.step, carry, batch)
