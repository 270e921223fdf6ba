"""One of several processes that hold law 8 together: python -m tests.distributed.law_worker PORT COUNT RANK FOLDER.

Takes every optimizer and every model of the core tests through twenty steps on the mesh of all processes, and through
the first four on its own device as well. Each process feeds its part of the batch and compares the shards that it has.
Prints a line for each case: "ok NAME", or "wrong NAME" and what differs; FOLDER is where they leave
each other the results of the single device. The parent is test_processes.
"""

import functools
import pathlib
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

warnings.simplefilter("error")
PORT, COUNT, RANK = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{PORT}", COUNT, RANK, coordinator_bind_address=f"127.0.0.1:{PORT}")

# These make meshes of all devices when they are imported: of the devices of all processes, once those are joined
from jax.sharding import PartitionSpec as P  # noqa: E402

import flaxsplit as fs  # noqa: E402
from tests import meshes  # noqa: E402
from tests import test_mesh as mesh_tests  # noqa: E402
from tests.models import MLP, structure  # noqa: E402
from tests.strategies import OPTIMIZERS  # noqa: E402
from tests.test_traces import MODELS  # noqa: E402

CHECKED, STEPS = 4, 20
KINDS = {"Auto": meshes.AUTO, "Explicit": meshes.EXPLICIT}
LINE, on = mesh_tests.LINE, meshes.on
SGD, TX = mesh_tests.SGD, mesh_tests.TX
BATCH: Any = jax.tree.map(np.asarray, mesh_tests.BATCH)
STACKED: Any = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), BATCH)


def spread(tree: Any, shardings: Any) -> Any:
    """Takes what is whole in every process to the mesh of all."""

    def goal(leaf: Any, where: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return fs.adopt_carry(tree, jax.tree.map(goal, tree, shardings))


def fed(batch: Any, mesh: Any, axis: int = 0) -> Any:
    """The batch on the mesh, of which each process gives its own part."""

    def feed(leaf: Any) -> Any:
        part = np.split(leaf, COUNT, axis)[RANK]
        return jax.make_array_from_process_local_data(on(mesh, *[None] * axis, "data"), part)

    return jax.tree.map(feed, batch)


def numbers(leaf: Any) -> Any:
    """Keys as the numbers that they are made of."""
    return jax.random.key_data(leaf) if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def wrong(sharded: Any, expected: Iterable[Any], tolerance: float) -> list[str]:
    """The leaves of which a shard in this process is not what a single device has, to rounding."""
    found: list[str] = []
    leaves, _ = jax.tree_util.tree_flatten_with_path(sharded)
    for (path, leaf), whole in zip(leaves, expected, strict=True):
        rounding = tolerance if np.issubdtype(whole.dtype, np.floating) else 0.0
        found += [
            f"{jax.tree_util.keystr(path)} on device {shard.device.id}"
            for shard in numbers(leaf).addressable_shards
            if not np.allclose(np.asarray(shard.data), whole[shard.index], rtol=rounding, atol=rounding)
        ]
    return found


def loaded(path: pathlib.Path) -> list[Any]:
    """The arrays of a file, in the order in which they were given."""
    with np.load(path) as file:
        return [file[name] for name in file.files]


class Case(NamedTuple):
    """A step, where its carry lives on the mesh, and what it is compared with."""

    step: Any
    single: Any
    shardings: Any
    alone: Any = None  # the single device's step, where it is not the same
    scanned: bool = False

    def reference(self) -> list[Any]:
        """Carry and loss of the single device after the first steps, as NumPy arrays."""
        carry, loss, step = jax.tree.map(jax.numpy.copy, self.single), None, fs.jit_step(self.alone or self.step)
        for _ in range(CHECKED):
            carry, loss = step(carry, STACKED if self.scanned else BATCH)
        return [np.asarray(numbers(leaf)) for leaf in jax.tree.leaves((carry, loss))]

    def check(self, expected: Iterable[Any]) -> list[str]:
        """Takes the carry on the mesh through the steps and lists what does not hold."""
        carry, loss = spread(self.single, self.shardings), None
        assert not carry.step.sharding.is_fully_addressable
        mesh, placement = carry.step.sharding.mesh, meshes.placement(carry)
        batch = fed(STACKED, mesh, 1) if self.scanned else fed(BATCH, mesh)
        step = fs.jit_step(fs.assert_max_traces(self.step), like=carry)
        with fs.compile_log() as log:
            for _ in range(CHECKED):
                carry, loss = step(carry, batch)
            found = wrong((carry, loss), expected, 2e-3 if self.scanned else 2e-4)
            for _ in range(CHECKED, STEPS):
                carry, loss = step(carry, batch)
            jax.block_until_ready(carry)
        counts = [log.traces[self.step.__name__], log.compiles[self.step.__name__]]
        found += [f"traces and compiles: {counts}"] if counts != [1, 1] else []
        return found + (["the placement changed"] if meshes.placement(carry) != placement else [])


def of_optimizer(name: str, kind: Any) -> Case:
    """BatchNorm, dropout and an average, with one optimizer."""
    single, mesh = mesh_tests.dropping_carry(OPTIMIZERS[name]), meshes.line(kind)
    step, alone = (mesh_tests.dropping_step(OPTIMIZERS[name], each) for each in (mesh, LINE))
    return Case(step, single, mesh_tests.by_shape(mesh, single), alone)


def of_model(name: str, kind: Any) -> Case:
    """One model, with momentum and an average."""
    mesh, (alone, single) = meshes.line(kind), mesh_tests.averaged(name)
    step, _ = mesh_tests.averaged(name, mesh)
    return Case(step, single, mesh_tests.by_shape(mesh, single), alone)


def of_grid(kind: Any) -> Case:
    """A mesh of two axes, with microbatches, and several steps in one dispatch."""
    single, mesh = mesh_tests.dropping_carry(TX), meshes.grid(kind)
    step, alone = (fs.scan_steps(mesh_tests.dropping_step(TX, each, microbatches=4)) for each in (mesh, LINE))
    return Case(step, single, mesh_tests.PLACES["2-D"](single, kind), alone, scanned=True)


def of_shard_map(kind: Any) -> Case:
    """Per-device BatchNorm synced by name, gradients averaged."""
    mesh = meshes.line(kind)
    model, whole = MLP(axis_name="data"), MLP(axis_name=None)
    params, state = fs.split_params(whole.init(jax.random.key(0), BATCH[0]))
    single = fs.init_carry(params, state | {"ema": params}, SGD)

    def step_of(model: Any, axis_name: str | None) -> Any:
        loss_fn = mesh_tests.named(fs.with_mutable(model))
        return fs.with_ema(fs.with_optimizer(loss_fn, SGD, axis_name=axis_name), decay=0.9)

    step: Any = jax.shard_map(step_of(model, "data"), mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P()))
    step.__name__ = "shard_map"
    return Case(step, single, jax.tree.map(lambda _: on(mesh), single), alone=step_of(whole, None))


def init_carry() -> list[str]:
    """What init_carry makes of params on a mesh of several processes: every leaf there, each like its param."""
    single = mesh_tests.dropping_carry(TX)
    params = spread(single.params, mesh_tests.by_shape(LINE, single.params))
    carry = fs.init_carry(params, single.state, TX)
    assert structure(carry) == structure(single)
    moments = (carry.opt_state[0].mu, carry.opt_state[0].nu)
    found = [] if all(meshes.placement(each) == meshes.placement(params) for each in moments) else ["moments"]
    others = {leaf.sharding for leaf in jax.tree.leaves((carry.step, carry.state, carry.opt_state[0].count))}
    found += [] if others == {on(LINE)} else [f"{others}"]
    return found + wrong(carry, [np.asarray(numbers(leaf)) for leaf in jax.tree.leaves(single)], 0)


def unequal_keys() -> list[str]:
    """The classic mistake: each process draws its own key. All of them say so, and none waits for another."""
    params = spread({"w": np.ones((8, 2), np.float32)}, {"w": on(LINE, "data")})
    state = {"batch_stats": {"mean": np.zeros(2, np.float32)}, **fs.rng_state(dropout=jax.random.key(RANK))}
    try:
        fs.init_carry(params, state, TX)
    except fs.SignatureError as error:
        return [] if str(error) == UNEQUAL else [str(error)]
    return ["no error"]


UNEQUAL = """\
init_carry(params, state, tx): leaves that are not on the mesh yet must be the same in every process
  got:
    carry.state['rngs']['dropout']: key<fry>[]
  likely cause: each process drew its own key, or read its own file
  fix: the same jax.random.key(seed) in every process; their batches may differ"""


def cases() -> Iterator[tuple[str, Case]]:
    """Every case by name, in the same order in every process; each kind of axes with half of the networks."""
    for i, name in enumerate(OPTIMIZERS):
        kind = [*KINDS][i % 2]
        yield f"optimizer {name}, {kind} axes", of_optimizer(name, KINDS[kind])
    for i, name in enumerate(MODELS):
        kind = [*KINDS][(i + 1) % 2]
        yield f"model {name}, {kind} axes", of_model(name, KINDS[kind])
    for kind, axes in KINDS.items():
        if kind == "Auto" or jax.__version_info__ >= (0, 7):  # before: jax-ml/jax#29859
            yield f"2-D mesh, microbatches, scan_steps, {kind} axes", of_grid(axes)
        yield f"shard_map, {kind} axes", of_shard_map(axes)


def main(folder: pathlib.Path) -> None:
    """Goes through the cases; one that raises ends this process, since the others would wait for it."""
    every = list(cases())
    for i, (_, case) in enumerate(every):  # the processes share this work
        if i % COUNT == RANK:
            np.savez(folder / f"{i}.npz", *case.reference())
    checks: list[tuple[str, Callable[[], list[str]]]] = [("init_carry", init_carry), ("unequal keys", unequal_keys)]
    multihost_utils.sync_global_devices("references")
    for i, (name, case) in enumerate(every):
        checks.append((name, functools.partial(case.check, loaded(folder / f"{i}.npz"))))
    for name, check in checks:
        began = time.monotonic()
        found = check()
        took = f"({time.monotonic() - began:.1f} s)"
        print(f"wrong {name}: {'; '.join(found)}" if found else f"ok {name} {took}", flush=True)
    print(f"all {len(checks)} cases", flush=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[4]))
