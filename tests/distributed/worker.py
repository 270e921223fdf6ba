"""One of the processes of `test_law_8`: python -m tests.distributed.worker ADDRESS PROCESSES RANK.

Every optimizer and every model of the core tests, on a mesh over all processes, against the step on one device.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax

jax.distributed.initialize(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))  # before anything asks for devices

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import flaxsplit as fs  # noqa: E402
from tests import strategies as some  # noqa: E402
from tests import test_mesh as mesh  # noqa: E402
from tests.test_traces import MODELS, loss_of  # noqa: E402

ROWS = NamedSharding(mesh.LINE, P("data"))


def is_key(leaf: jax.Array) -> bool:
    """Whether it is one of PRNG keys."""
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def whole(tree: Any) -> Any:
    """A tree that lies over all processes, as NumPy; keys as their data."""
    plain = jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree)
    return multihost_utils.process_allgather(plain, tiled=True)


def my_rows(batch: Any) -> Any:
    """The whole batch on the mesh, of which this process feeds its own part."""
    count, rank = jax.process_count(), jax.process_index()

    def part(leaf: Any) -> Any:
        rows = len(leaf) // count
        return jax.make_array_from_process_local_data(ROWS, np.asarray(leaf)[rank * rows : (rank + 1) * rows])

    return jax.tree.map(part, batch)


def compare(name: str, step: Callable[..., Any], start: Callable[[], fs.Carry], batch: Any, steps: int = 4) -> None:
    """Takes some steps on the mesh, one trace and one compile, and on one device."""
    shardings = mesh.by_shape(mesh.LINE, jax.eval_shape(start))
    carry = jax.jit(start, out_shardings=shardings)()
    if "Dropping" in name or name in some.OPTIMIZERS:
        assert shardings.params["head"]["kernel"].spec == P("data")
    sharded, loss = mesh.run(step, carry, my_rows(batch), steps, like=carry)
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(sharded)), name
    sharded, loss = whole((sharded, loss))
    if jax.process_index() == 0:
        single, expected = mesh.run(step, jax.jit(start)(), batch, steps)
        mesh.assert_close((sharded, loss), whole_here((single, expected)))
        print("equal", name, flush=True)


def whole_here(tree: Any) -> Any:
    """A tree of this process alone, as NumPy; keys as their data."""
    return jax.tree.map(lambda leaf: np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf), tree)


def start_of(name: str) -> tuple[Callable[..., Any], Callable[[], fs.Carry]]:
    """A step over a model with BatchNorm, an average, and dropout where it has any; and what makes its carry."""
    apply, variables = MODELS[name]()

    def start() -> fs.Carry:
        params, state = fs.split_params(variables)
        state |= fs.rng_state(dropout=jax.random.key(1)) if name == "Dropping" else {}
        return fs.init_carry(params, state | {"ema": params}, mesh.SGD)

    return fs.with_ema(fs.with_optimizer(loss_of(apply), mesh.SGD), decay=0.9), start


def main() -> None:
    """Runs every case; each names itself once it is found equal."""
    assert mesh.LINE.size == len(jax.devices()) == 8
    assert len(jax.local_devices()) < 8
    for name, tx in some.OPTIMIZERS.items():
        compare(name, mesh.dropping_step(tx), functools.partial(mesh.dropping_carry, tx), mesh.BATCH)
    for name in MODELS:
        compare(name, *start_of(name), mesh.BATCH)
    adam = some.OPTIMIZERS["adam"]
    step = mesh.dropping_step(adam, microbatches=4)
    compare("microbatches", step, lambda: mesh.dropping_carry(adam), mesh.BATCH, 20)
    print("done", flush=True)


if __name__ == "__main__":
    main()
