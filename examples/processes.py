"""The same training in several processes: `python examples/processes.py --processes 2`.

It starts its own processes, which connect over loopback, each with a few virtual CPU devices. The model is created
directly in its shards, each process feeds its own part of the batch and writes its own shards of the checkpoint. Run it
again with another number of processes or devices, and it continues on the new mesh:

    python examples/processes.py --folder /tmp/run --processes 2 --steps 20
    python examples/processes.py --folder /tmp/run --processes 1 --devices 8 --steps 40

If the processes are on different machines, leave out the part that starts them and pass `jax.distributed.initialize`
the first machine's address; nothing else changes.
"""

import argparse
import inspect
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import flaxsplit as fs

Tree = dict[str, Any]
Loss = Callable[[Tree, Tree, tuple[jax.Array, jax.Array]], tuple[jax.Array, Tree]]
BATCH, FEATURES = 64, 16


class Net(nn.Module):
    """Batch statistics over the whole batch, wherever its rows are, and dropout."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Maps `[batch, features]` to `[batch, 1]`."""
        x = nn.Dense(64, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(1)(x)


apply = fs.with_rngs(fs.with_mutable(Net()))
tx = optax.adam(1e-2)


def loss_fn(params: Tree, state: Tree, batch: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Tree]:
    pred, state = apply(params, state, batch[0], train=True)
    return optax.l2_loss(pred, batch[1]).mean(), state


def told(mesh: Mesh) -> Loss:
    """Says where the loss lies: on Explicit axes, JAX's default, Linen's dropout does not say where its mask does."""
    if AxisType.Explicit not in mesh.axis_types:
        return loss_fn
    auto_axes: Any = jax.sharding.auto_axes
    inside: Loss = auto_axes(loss_fn, out_sharding=NamedSharding(mesh, P()))
    return inside


def start() -> fs.Carry:
    """Step 0. Only ever traced: each device computes its own shards, and none holds the whole model."""
    variables = Net().init(jax.random.key(0), jnp.zeros((1, FEATURES)), train=False)
    params, state = fs.split_params(variables)
    return fs.init_carry(params, state | fs.rng_state(dropout=jax.random.key(1)) | {"ema": params}, tx)


def fully_sharded(tree: Any, mesh: Mesh) -> Any:
    """Splits each leaf's first axis over all devices where they divide it; the rest is replicated."""
    divides = {True: NamedSharding(mesh, P("data")), False: NamedSharding(mesh, P())}
    return jax.tree.map(lambda leaf: divides[bool(leaf.ndim) and leaf.shape[0] % mesh.size == 0], tree)


def my_part(step: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of this step's batch that this process feeds; a loader would read no others."""
    rows = BATCH // jax.process_count()
    chance = np.random.default_rng(step)
    x = chance.normal(size=(BATCH, FEATURES)).astype(np.float32)
    mine = slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)
    return x[mine], np.tanh(x[mine].sum(1, keepdims=True))


def train(folder: pathlib.Path, steps: int) -> None:
    """Trains from the newest checkpoint, or from the start, to that step."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    shardings = fully_sharded(jax.eval_shape(start), mesh)
    carry = jax.jit(start, out_shardings=shardings)()
    averaged = fs.with_ema(fs.with_optimizer(told(mesh), tx), decay=0.9)
    step = fs.jit_step(fs.assert_max_traces(averaged), like=carry)
    rows = NamedSharding(mesh, P("data"))
    with ocp.CheckpointManager(folder / "steps", options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
        if manager.latest_step() is not None:
            restored = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(carry))
            carry = fs.adopt_carry(restored, carry)
        say(f"process {os.getpid()}: from {int(carry.step)} on {mesh.size} devices of {jax.process_count()} processes")
        with fs.compile_log() as log:
            for i in range(int(carry.step), steps):
                batch = jax.tree.map(lambda part: jax.make_array_from_process_local_data(rows, part), my_part(i))
                carry, loss = step(carry, batch)
                manager.save(i + 1, args=ocp.args.StandardSave(carry))
                say(f"step {i + 1} loss {float(loss):.6f}")
        manager.wait_until_finished()
    keys = jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, carry)
    whole = multihost_utils.process_allgather(keys, tiled=True)
    if jax.process_index() == 0:
        leaves, _ = jax.tree_util.tree_flatten_with_path(whole)
        named: dict[str, Any] = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
        np.savez(folder / "end.npz", **named)
    say(f"done: {log.traces['loss_fn']} trace, {log.compiles['loss_fn']} compile")


def is_key(leaf: jax.Array) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def say(words: str) -> None:
    sys.stdout.write(f"[{jax.process_index()}] {words}\n")  # at one go: print would let lines of two processes mix
    sys.stdout.flush()


def join(address: str, count: int, rank: int, timeout: int) -> None:
    """Meets the other processes. One that dies is noticed by the others after `timeout` seconds at most.

    Before jax 0.7 the time-out could not be chosen: there the others wait, and `launch` ends them.
    """
    known = inspect.signature(jax.distributed.initialize).parameters
    wanted = {"heartbeat_timeout_seconds": timeout, "shutdown_timeout_seconds": timeout}
    limits: dict[str, Any] = {name: value for name, value in wanted.items() if name in known}
    # Where the first process listens is told as well: by default it is on every interface of the machine
    jax.distributed.initialize(address, count, rank, coordinator_bind_address=address, **limits)


def launch(options: argparse.Namespace) -> int:
    """Starts the processes and waits; when one ends badly the rest have the time-out to end, and then are ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={options.devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, *sys.argv, "--folder", str(options.folder), "--address", address]
    workers = [subprocess.Popen([*command, "--rank", str(i)], env=environment) for i in range(options.processes)]
    try:
        while all(worker.poll() is None for worker in workers):
            time.sleep(0.1)
        failed = any(worker.poll() for worker in workers)
        until = time.monotonic() + options.timeout + 10
        while any(worker.poll() is None for worker in workers) and not (failed and time.monotonic() > until):
            failed = failed or any(worker.poll() for worker in workers)
            time.sleep(0.1)
    finally:
        for worker in workers:
            worker.kill()
    codes = [worker.wait() for worker in workers]
    if any(codes):
        print(f"a process failed (exit codes {codes}); run it again to go on from the last checkpoint")
        return 1
    print(f"processes: {options.steps} steps done, checkpoints in {options.folder}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="how many")
    parser.add_argument("--devices", type=int, default=2, help="virtual devices of each")
    parser.add_argument("--steps", type=int, default=20, help="up to which step to train")
    parser.add_argument("--timeout", type=int, default=20, help="seconds after which a dead process is noticed")
    parser.add_argument("--folder", type=pathlib.Path, help="where checkpoints are; a new one if left out")
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder = options.folder or pathlib.Path(tempfile.mkdtemp(prefix="flaxsplit-"))
    if options.rank is None:
        return launch(options)
    join(options.address, options.processes, options.rank, options.timeout)
    train(options.folder.absolute(), options.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
