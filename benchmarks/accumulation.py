"""Gradients accumulated over n microbatches need the memory of one microbatch, and more time than the whole batch.

Memory as XLA assigns it, exact; time against `microbatches=1`. Last a network without state, since `optax.microbatch`
threads none: the same parts by a scan by hand, by flaxsplit and by optax; and in blocks of rows.
"""

from collections.abc import Iterator

import jax
import optax

import flaxsplit as fs

from . import _devices
from ._measure import HAND, OURS, Effort, Row, Tell, memory_of, timed
from ._models import Stepper, batch_of, copy, dense_norm, ours, start
from ._peers import check_agree, losses_of

WHOLE = "1 microbatch"


def measure(effort: Effort, tell: Tell) -> Iterator[Row]:
    """The same batch in 1, 2, 4, ... parts."""
    if not effort.wants("all of it"):
        return
    tx, batch = optax.sgd(1e-2), batch_of(2048, 128)
    model = dense_norm(width=128)
    carry = start(model, tx, batch[0])
    counts = effort.of(smoke=[1, 2], quick=[1, 4, 16], full=[1, 2, 4, 8, 16, 32, 64])
    names = {n: WHOLE if n == 1 else f"{n} microbatches" for n in counts}
    steps = {n: fs.jit_step(ours(model, tx, microbatches=n)) for n in counts}
    memory = {}
    for n, step in steps.items():
        tell(names[n])
        memory[names[n]] = [float(memory_of(step, carry, batch).temp_size_in_bytes)]
    yield Row("temporary memory", "bytes", memory, WHOLE)
    contenders = {names[n]: Stepper(step, copy(carry), batch) for n, step in steps.items()}
    yield timed("time of a step", contenders, effort, tell, baseline=WHOLE)

    mesh, batch, parts = jax.make_mesh((1,), ("data",)), batch_of(_devices.ROWS, _devices.WIDTH), counts[-1]
    wanted = (HAND, OURS, _devices.BLOCKS, _devices.OPTAX)
    peers = {name: build for name, build in _devices.contenders(parts) if name in wanted}
    check_agree({name: losses_of(*build(mesh, parts), batch) for name, build in peers.items()})
    steppers = {name: Stepper(*build(mesh, parts), batch) for name, build in peers.items()}
    yield timed(f"time of a step in {parts} microbatches, by peer", steppers, effort, tell)
