"""`make soak`: a long run: nothing grows, compiles again or drifts from the loop by hand; and eight threads.

100,000 steps by default; what was watched is written to `build/soak.json`.
"""

import argparse
import ctypes
import gc
import json
import pathlib
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import flaxsplit as fs  # noqa: E402 (found beside this folder, where it is not installed)
from benchmarks._measure import about  # noqa: E402

SIZES = (8, 64, 512)
"""Sizes of a batch, in turn; each is a program of its own."""
LOOKS = 20
"""How often memory is looked at; in between, batches are kept, ever more, and let go of."""
MAY_GROW = 4 * 2**20
"""Bytes that host memory may grow by; over 100,000 steps, 56 a step are more."""


class Net(nn.Module):
    """Dense, BatchNorm and dropout."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Maps `[batch, 8]` to `[batch, 1]`."""
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x))
        return nn.Dense(1)(nn.Dropout(0.1, deterministic=not train)(nn.relu(x)))


def start(tx: optax.GradientTransformation) -> Any:
    """The first carry, buffers of its own at each call."""
    params, state = fs.split_params(Net().init(jax.random.key(0), jnp.ones((2, 8), jnp.float32), train=False))
    return fs.init_carry(params, state | fs.rng_state(dropout=jax.random.key(1)), tx)


def ours(tx: optax.GradientTransformation) -> Any:
    """The step out of combinators, allowed one trace for each size of a batch."""
    apply = fs.with_rngs(fs.with_mutable(Net()))

    def loss_fn(params: Any, state: Any, batch: jax.Array) -> Any:
        pred, state = apply(params, state, batch)
        return jnp.mean((pred - batch.sum(-1, keepdims=True)) ** 2), state

    return fs.jit_step(fs.assert_max_traces(fs.with_optimizer(loss_fn, tx), len(SIZES)))


def by_hand(tx: optax.GradientTransformation) -> Any:
    """The same step written out."""

    def step(carry: Any, batch: jax.Array) -> Any:
        count, params, state, opt_state = carry
        key, used = jax.random.split(state["rngs"]["dropout"])

        def objective(params: Any) -> Any:
            variables = {"params": params, "batch_stats": state["batch_stats"]}
            pred, new = Net().apply(variables, batch, mutable=["batch_stats"], rngs={"dropout": used})
            return jnp.mean((pred - batch.sum(-1, keepdims=True)) ** 2), new

        (loss, new), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        new_state = {**new, "rngs": {"dropout": key}}
        return fs.Carry(count + 1, optax.apply_updates(params, updates), new_state, opt_state), loss

    return jax.jit(step, donate_argnums=0)


def resident() -> int:
    """Bytes of memory that this process holds, as Linux counts them (0 elsewhere), once it gave back what was freed."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    statm = pathlib.Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * 4096 if statm.exists() else 0


def leaves(carry: Any) -> list[np.ndarray]:
    """A carry on the host."""
    keys = jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, carry)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(keys)]


def same(a: Any, b: Any) -> bool:
    """Whether two carries are equal, bit for bit."""
    return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def on_device() -> int:
    """Bytes of live arrays: as the device counts them, or where it does not, as JAX does."""
    stats = jax.devices()[0].memory_stats()
    return int(stats["bytes_in_use"]) if stats else sum(array.nbytes for array in jax.live_arrays())


def wave(step: Any, hand: Any, carries: Any, draw: np.random.Generator, half: int) -> tuple[Any, int]:
    """Takes the same steps in both loops, keeping more and more, then less; gives the most bytes on the device too."""
    carry, plain = carries
    kept: deque[Any] = deque()
    most = 0
    for i in range(2 * half):
        batch = jnp.array(draw.normal(size=(SIZES[i % len(SIZES)], 8)), jnp.float32)
        carry, loss = step(carry, batch)
        plain, loss_by_hand = hand(plain, batch)
        kept.append((batch, loss, loss_by_hand))
        if i >= half:  # one comes, two go
            kept.popleft()
            kept.popleft()
        elif i == half - 1:
            most = on_device()
    return (carry, plain), most


def soak(steps: int) -> dict[str, Any]:
    """Takes the steps in lockstep with the loop by hand; says what it watched, and stops where the two differ."""
    tx = optax.adam(1e-3)
    step, hand = ours(tx), by_hand(tx)
    carries = start(tx), start(tx)
    seen: dict[str, list[int]] = {"arrays": [], "device": [], "host": [], "most on device": []}
    draw = np.random.default_rng(0)
    half = steps // LOOKS // 2
    with fs.compile_log() as log:
        for look in range(1, LOOKS + 1):
            carries, most = wave(step, hand, carries, draw, half)
            seen["most on device"].append(most)
            if not same(*carries):
                raise SystemExit(f"soak: after {2 * half * look} steps the carry differs from that of the loop by hand")
            seen["arrays"].append(len(jax.live_arrays()))
            seen["device"].append(on_device())
            seen["host"].append(resident())
            print(
                f"soak: {2 * half * look} of {steps} steps; on the device {seen['most on device'][-1]:,} bytes, then "
                f"{seen['device'][-1]:,}; on the host {seen['host'][-1] / 2**20:.1f} MiB",
                flush=True,
            )
    counts = {"traces": log.traces["loss_fn"], "compiles": log.compiles["loss_fn"]}
    return {"steps": 2 * half * LOOKS, "sizes": SIZES, **counts, "seen": seen}


def faults(found: dict[str, Any]) -> list[str]:
    """What grew, or was traced again."""
    seen, quarter = found["seen"], LOOKS // 4
    grown = max(seen["host"][-quarter:]) - max(seen["host"][quarter : 2 * quarter])
    said = {
        f"traced {found['traces']} times, compiled {found['compiles']} times for {len(SIZES)} sizes of a batch": (
            found["traces"] != len(SIZES) or found["compiles"] != len(SIZES)
        ),
        f"live arrays: {seen['arrays']}": len(set(seen["arrays"])) != 1,
        f"bytes on the device: {seen['device']}": len(set(seen["device"])) != 1,
        f"host memory: {grown / 2**20:+.1f} MiB from the second quarter to the last": grown > MAY_GROW,
        "live memory did not grow and shrink": min(seen["most on device"]) <= max(seen["device"]),
    }
    return [sentence for sentence, wrong in said.items() if wrong]


def threads(callers: int = 8, steps: int = 200) -> dict[str, Any]:
    """Many threads call one jitted step, each with its own carry; stops where one ends elsewhere than one alone."""
    tx = optax.adam(1e-3)
    step = ours(tx)
    batches = [jax.random.normal(jax.random.key(size), (size, 8), jnp.float32) for size in SIZES]

    def run(_: int) -> Any:
        carry = start(tx)
        for i in range(steps):
            carry, _ = step(carry, batches[i % len(SIZES)])
        return carry

    with fs.compile_log() as log, ThreadPoolExecutor(callers) as pool:
        ended = list(pool.map(run, range(callers)))
    alone = run(0)
    if not all(same(carry, alone) for carry in ended):
        raise SystemExit("soak: threads that share a step differ from one alone")
    return {"callers": callers, "steps": steps, "traces": log.traces["loss_fn"], "compiles": log.compiles["loss_fn"]}


def main() -> int:
    """The long run, then the threads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000, help=f"a multiple of {2 * LOOKS}")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "build" / "soak.json", help="where figures go")
    args = parser.parse_args()
    found = soak(args.steps)
    found["threads"] = threads()
    command = f"python tools/soak.py --steps {args.steps}"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"about": about() | {"command": command}, **found}, indent=1) + "\n")
    for fault in faults(found):
        print(f"soak: {fault}")
    if faults(found):
        print("soak: failed")
        return 1
    print(
        f"soak: done, {args.steps} steps and {found['threads']['callers']} threads of {found['threads']['steps']}: "
        f"{found['compiles']} compiles for {len(SIZES)} sizes of a batch, equal to the loop by hand, nothing grew"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
