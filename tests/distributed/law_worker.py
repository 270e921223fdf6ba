"""One of several processes that hold law 8 together: python -m tests.distributed.law_worker PORT COUNT RANK.

Takes every optimizer and every model of the core tests through twenty steps on the mesh of all processes, and through
the first four on its own device as well. Each process feeds its part of the batch and compares the shards that it has.
Prints a line for each case: "ok NAME", or "wrong NAME" and what differs. The parent is test_processes.
"""

import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

warnings.simplefilter("error")
PORT, COUNT, RANK = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{PORT}", COUNT, RANK, coordinator_bind_address=f"127.0.0.1:{PORT}")

# These make meshes of all devices when they are imported: of the devices of all processes, once those are joined
from jax.sharding import PartitionSpec as P  # noqa: E402

import flaxsplit as fs  # noqa: E402
from tests import test_mesh as mesh_tests  # noqa: E402
from tests.strategies import OPTIMIZERS  # noqa: E402
from tests.test_traces import MODELS, loss_of  # noqa: E402

CHECKED, STEPS = 4, 20
LINE, GRID, PLACES, on = mesh_tests.LINE, mesh_tests.GRID, mesh_tests.PLACES, mesh_tests.on
SGD, TX = mesh_tests.SGD, mesh_tests.TX
BATCH: Any = jax.tree.map(np.asarray, mesh_tests.BATCH)
STACKED: Any = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), BATCH)

Case = tuple[Callable[..., Any], Any, Any, Callable[..., Any]]


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


def wrong(sharded: Any, single: Any, tolerance: float) -> list[str]:
    """The leaves of which a shard in this process is not the single device's to rounding."""
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(single)[0]]
    found: list[str] = []
    for name, ours, theirs in zip(names, jax.tree.leaves(sharded), jax.tree.leaves(single), strict=True):
        whole = np.asarray(numbers(theirs))
        rounding = tolerance if np.issubdtype(whole.dtype, np.floating) else 0.0
        found += [
            f"{name} on device {shard.device.id}"
            for shard in numbers(ours).addressable_shards
            if not np.allclose(np.asarray(shard.data), whole[shard.index], rtol=rounding, atol=rounding)
        ]
    return found


def held(
    step: Any, single: Any, sharded: Any, batch: Any, parts: Any, tolerance: float, alone: Any = None
) -> list[str]:
    """Takes both carries through the steps and lists what does not hold."""
    assert not sharded.step.sharding.is_fully_addressable
    placement = mesh_tests.placement(sharded)
    together, alone = fs.jit_step(fs.assert_max_traces(step), like=sharded), fs.jit_step(alone or step)
    for _ in range(CHECKED):
        single, expected = alone(single, batch)
    with fs.compile_log() as log:
        for _ in range(CHECKED):
            sharded, loss = together(sharded, parts)
        found = wrong((sharded, loss), (single, expected), tolerance)
        for _ in range(CHECKED, STEPS):
            sharded, loss = together(sharded, parts)
        jax.block_until_ready(sharded)
    counts = [log.traces[step.__name__], log.compiles[step.__name__]]
    found += [f"traces and compiles: {counts}"] if counts != [1, 1] else []
    return found + (["the placement changed"] if mesh_tests.placement(sharded) != placement else [])


def of_optimizer(name: str) -> list[str]:
    """BatchNorm, dropout and an average, with one optimizer."""
    step, single = mesh_tests.dropping_step(OPTIMIZERS[name]), mesh_tests.dropping_carry(OPTIMIZERS[name])
    sharded = spread(single, mesh_tests.by_shape(LINE, single))
    return held(step, single, sharded, BATCH, fed(BATCH, LINE), 2e-4)


def of_model(name: str) -> list[str]:
    """One model, with momentum and an average."""
    apply, variables = MODELS[name]()
    params, state = fs.split_params(variables)
    state |= fs.rng_state(dropout=jax.random.key(1)) if name == "Dropping" else {}
    single = fs.init_carry(params, state | {"ema": params}, SGD)
    step = fs.with_ema(fs.with_optimizer(loss_of(apply), SGD), decay=0.9)
    sharded = spread(single, mesh_tests.by_shape(LINE, single))
    return held(step, single, sharded, BATCH, fed(BATCH, LINE), 2e-4)


def of_place(place: str, way: str) -> list[str]:
    """Adam and an average, with microbatches or several steps in one dispatch."""
    single = mesh_tests.dropping_carry(TX)
    sharded = spread(single, PLACES[place](single))
    step = mesh_tests.dropping_step(TX, microbatches=4 if way == "microbatches" else 1)
    mesh = sharded.step.sharding.mesh
    if way == "scan":
        return held(fs.scan_steps(step), single, sharded, STACKED, fed(STACKED, mesh, 1), 2e-3)
    return held(step, single, sharded, BATCH, fed(BATCH, mesh), 2e-4)


def of_shard_map() -> list[str]:
    """Per-device BatchNorm synced by name, gradients averaged."""
    model, whole = mesh_tests.MLP(axis_name="data"), mesh_tests.MLP(axis_name=None)
    params, state = fs.split_params(whole.init(jax.random.key(0), BATCH[0]))
    single = fs.init_carry(params, state | {"ema": params}, SGD)

    def step_of(model: Any, axis_name: str | None) -> Any:
        loss_fn = mesh_tests.named(fs.with_mutable(model))
        return fs.with_ema(fs.with_optimizer(loss_fn, SGD, axis_name=axis_name), decay=0.9)

    step: Any = jax.shard_map(step_of(model, "data"), mesh=LINE, in_specs=(P(), P("data")), out_specs=(P(), P()))
    step.__name__ = "shard_map"
    sharded = spread(single, jax.tree.map(lambda _: on(LINE), single))
    return held(step, single, sharded, BATCH, fed(BATCH, LINE), 2e-4, alone=step_of(whole, None))


def of_init_carry() -> list[str]:
    """What init_carry makes of params on a mesh of several processes: every leaf there, each like its param."""
    single = mesh_tests.dropping_carry(TX)
    params = spread(single.params, mesh_tests.by_shape(LINE, single.params))
    carry = fs.init_carry(params, single.state, TX)
    moments = (carry.opt_state[0].mu, carry.opt_state[0].nu)
    expected = single._replace(params=mesh_tests.by_shape(LINE, single.params))
    follow = all(mesh_tests.placement(tree) == mesh_tests.placement(params) for tree in moments)
    found = [] if follow else ["the moments do not follow their params"]
    others = {leaf.sharding for leaf in jax.tree.leaves((carry.step, carry.state, carry.opt_state[0].count))}
    assert jax.tree.structure(expected) == jax.tree.structure(carry)
    return found + ([] if others == {on(LINE)} else [f"{others}"]) + wrong(carry, single, 0)


def of_unequal_keys() -> list[str]:
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


def cases() -> Iterator[tuple[str, Callable[[], list[str]]]]:
    """Every case by name, in the same order in every process."""
    yield "init_carry", of_init_carry
    yield "unequal keys", of_unequal_keys
    for name in OPTIMIZERS:
        yield f"optimizer {name}", lambda name=name: of_optimizer(name)
    for name in MODELS:
        yield f"model {name}", lambda name=name: of_model(name)
    for place, way in (("replicated", "microbatches"), ("fsdp", "scan"), ("2-D", "microbatches")):
        yield f"{place} {way}", lambda place=place, way=way: of_place(place, way)
    yield "shard_map", of_shard_map


def main() -> None:
    """Goes through the cases; one that raises ends this process, since the others would wait for it."""
    for name, case in cases():
        began = time.monotonic()
        found = case()
        took = f"({time.monotonic() - began:.1f} s)"
        print(f"wrong {name} {took}: {'; '.join(found)}" if found else f"ok {name} {took}", flush=True)
    print("all cases", flush=True)


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
