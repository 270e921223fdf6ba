"""`scan_steps` takes at most 0.35 of the time per step of one dispatch per step, where dispatch dominates.

The 8-layer MLP of 119 leaves, batch 32, Adam, against the number of steps in one dispatch. Layers are 16 wide, and 64
wide where compute begins to count.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import optax

import flaxsplit as fs

from ._measure import Effort, Row, Tell, timed
from ._models import Stepper, batch_of, copy, dense_norm, ours, start

EACH = "one dispatch per step"


def measure(effort: Effort, tell: Tell) -> Iterator[Row]:
    """Both in turn, fifty steps or more in each repetition."""
    yield from _against_steps(
        16, effort.of(smoke=[2], quick=[1, 10, 50], full=[1, 2, 4, 10, 20, 50, 100, 256]), effort, tell
    )
    yield from _against_steps(64, effort.of(smoke=[], quick=[50], full=[10, 50]), effort, tell)


def _against_steps(width: int, sizes: list[int], effort: Effort, tell: Tell) -> Iterator[Row]:
    tx, batch = optax.adam(1e-3), batch_of(width=width)
    model = dense_norm(width=width)
    carry = start(model, tx, batch[0])
    step = ours(model, tx)
    each = fs.jit_step(step)
    for size in sizes:
        case = f"{size} steps, {width} wide"
        if not effort.wants(case):
            continue
        stacked = jax.tree.map(lambda leaf, size=size: jnp.stack([leaf] * size), batch)
        repeats = max(1, 50 // size)
        contenders = {
            EACH: Stepper(each, copy(carry), batch, size * repeats),
            "scan_steps": Stepper(fs.jit_step(fs.scan_steps(step)), copy(carry), stacked, repeats),
        }
        # dispatch dominates in narrow layers, once a dispatch is shared by ten steps
        bounds = {"scan_steps": 0.35} if width == 16 and size >= 10 else {}
        yield timed(case, contenders, effort, tell, per=size * repeats, baseline=EACH, bounds=bounds, x=size)
