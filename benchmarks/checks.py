"""Signatures checked at run time cost while tracing only: a dispatch takes at most 1.02 of the time without checks.

`FLAXSPLIT_TYPECHECKER` is read at the import, so each contender is a process of its own, in turns.
"""

import json
import time
from collections.abc import Iterator
from importlib.util import find_spec
from statistics import median

import jax
import optax

import flaxsplit as fs

from ._measure import Effort, Row, Tell, elsewhere, in_turn, seconds
from ._models import Stepper, batch_of, dense_norm, ours, start

OFF, CHECKERS, STEPS = "no checks", ("typeguard", "beartype"), 20


def measure(effort: Effort, tell: Tell) -> Iterator[Row]:
    """One process after another, each with its own checker."""
    if not effort.wants("8 layers"):
        return
    wanted = effort.of(smoke=CHECKERS, quick=CHECKERS[:1], full=CHECKERS)
    names = [OFF, *(each for each in wanted if find_spec(each))]
    notes = {each: f"skipped: {each} is not installed" for each in wanted if not find_spec(each)}
    samples: dict[str, dict[str, list[float]]] = {"trace": {}, "dispatch": {}}
    (most,) = effort.of(smoke=[1], quick=[2], full=[8])
    for name in in_turn(names, effort, lambda words: None, most):
        tell(f"a process with {name}")
        for what, found in measured(name).items():
            samples[what].setdefault(name, []).extend(found)
    bounds = dict.fromkeys(names[1:], 1.02)
    yield Row("trace, 8 layers", "s", samples["trace"], OFF, notes=notes)
    yield Row("dispatch, 8 layers", "s", samples["dispatch"], OFF, bounds, notes=notes)


def measured(checker: str) -> dict[str, list[float]]:
    """What a process with a checker says; it leaves an accelerator's memory to this one, which holds it too."""
    found: dict[str, list[float]] = elsewhere(
        __name__, FLAXSPLIT_TYPECHECKER="" if checker == OFF else checker, XLA_PYTHON_CLIENT_PREALLOCATE="false"
    )
    return found


def report() -> dict[str, list[float]]:
    """Seconds of three traces, and the median of some dispatches, in this process."""
    tx, batch = optax.adam(1e-3), batch_of(width=16)
    model = dense_norm(width=16)
    carry = start(model, tx, batch[0])
    traces = []
    for _ in range(4):
        jitted, began = fs.jit_step(ours(model, tx)), time.perf_counter()
        jitted.trace(carry, batch)
        traces.append(time.perf_counter() - began)
    stepper = Stepper(fs.jit_step(ours(model, tx)), carry, batch, STEPS)
    jax.block_until_ready(stepper())
    return {"trace": traces[1:], "dispatch": [median(seconds(stepper) / STEPS for _ in range(15))]}


if __name__ == "__main__":
    print(json.dumps(report()))
