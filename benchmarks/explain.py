"""`explain_step` takes at most 1.5 of the tracing and compiling that is in it; its page is under 60 lines.

Over the types of the arguments alone: nothing is allocated, so the large networks fit everywhere.
"""

import time
from collections.abc import Iterator

import jax

import flaxsplit as fs

from ._measure import OURS, Effort, Row, Tell
from ._peers import build
from .throughput import task_of

COMPILE, EXPLAIN = "trace and compile", "explain_step"
SMALL = [("ResNet-50's stand-in", 32, 8), ("transformer, small", 16, 8)]
LARGE = [("ResNet-50", 64, 8), ("transformer", 128, 4)]


def measure(effort: Effort, tell: Tell) -> Iterator[Row]:
    """A new function each time, so that nothing is found in a cache; persistent ones are off."""
    jax.config.update("jax_enable_compilation_cache", False)
    (rounds,) = effort.of(smoke=[1], quick=[3], full=[8])
    for name, side, examples in effort.of(smoke=SMALL[1:], quick=SMALL, full=LARGE):
        case = f"{name} of {side}"
        if not effort.wants(case):
            continue
        task = task_of(name, side, None)
        carry = jax.eval_shape(build(OURS, task).fresh)
        batch = jax.ShapeDtypeStruct((examples, *task.shape), "float32"), jax.ShapeDtypeStruct((examples,), "int32")
        samples, reports = {COMPILE: list[float](), EXPLAIN: list[float]()}, list[fs.StepReport]()
        for i in range(min(rounds, effort.rounds)):
            tell(f"{case}: {i + 1} of {rounds}")
            step, began = build(OURS, task).step, time.perf_counter()
            reports.append(fs.explain_step(step, carry, batch))
            samples[EXPLAIN].append(time.perf_counter() - began)
            samples[COMPILE].append(sum(reports[-1].seconds.values()))
        told = f"a page of {len(str(reports[-1]).splitlines())} lines, {len(reports[-1].findings)} findings"
        yield Row(case, "s", samples, COMPILE, {EXPLAIN: 1.5}, notes={EXPLAIN: told})
