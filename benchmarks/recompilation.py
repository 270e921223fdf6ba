"""Of all ways to write a step, flaxsplit's compiles once wherever one compile is possible.

Compiles over 20 steps, counted by `fs.compile_log`: situations that are known to compile again, by implementation. Two
are unavoidable where two things are computed: train and eval, a static flag that changes, a last batch of another size.
"""

import io
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flaxsplit as fs

from . import _nets as nets
from ._measure import HAND, OURS, Effort, Row, Tell, elsewhere
from ._peers import (
    BEST,
    CACHED,
    EQUINOX,
    GUIDE,
    HAIKU,
    NNX,
    PARTIAL,
    PEERS,
    SAID,
    SUBSTRAX,
    TRAIN_STATE,
    TREE,
    USUAL,
    Peer,
    Task,
    build,
    check_agree,
    losses_of,
    missing,
    present,
    refusal,
)

STEPS, DEVICES, WIDTH, MESH = 20, 8, 8, "mesh of 8 devices"
LINEN = (OURS, HAND, GUIDE, TRAIN_STATE, TRAIN_STATE + BEST)
NNX_ONES = (NNX, NNX + BEST, TREE + BEST, CACHED + BEST, PARTIAL + BEST, SUBSTRAX + BEST)
OTHERS = (EQUINOX, EQUINOX + BEST, HAIKU, HAIKU + BEST)


def noise(size: int = 16) -> Any:
    """A batch in NumPy, as a loader gives it."""
    chance = np.random.default_rng(0)
    return chance.normal(size=(size, WIDTH)).astype(np.float32), chance.normal(size=(size, 1)).astype(np.float32)


BATCH, RAGGED = noise(), noise(5)


def adam() -> optax.GradientTransformation:
    """An optimizer with state, so that there is something to place; and a small one, since it is compiled often."""
    return optax.adam(1e-2)


def task(*before: Any, **options: Any) -> Task:
    """The network: one layer is enough to see what compiles."""
    return Task((*before, *nets.mlp(1, WIDTH)), (WIDTH,), make_tx=adam, **options)


@dataclass(frozen=True)
class Scenario:
    """One situation.

    Attributes:
        task: what the step is of.
        one: why one compile is enough.
        more: what compiles again; what changed in the arguments is told behind it.
        ours: what flaxsplit offers here.
        turn: `(peer, held, i) -> held`, the i-th step.
        possible: the fewest compiles that there can be.
        absent: where there is no such thing, and why.
    """

    task: Task
    one: str
    more: str
    ours: str
    turn: Callable[[Peer, Any, int], Any] = lambda peer, held, i: peer.step(held, BATCH)[0]
    possible: int = 1
    absent: Mapping[str, str] = field(default_factory=dict)


def anew(**what: bool) -> Callable[[Peer, Any, int], Any]:
    """Four loops of five steps, each of which begins with new objects."""
    return lambda peer, held, i: peer.step(peer.fresh(**what) if i in (5, 10, 15) else held, BATCH)[0]


def alternating(peer: Peer, held: Any, i: int) -> Any:
    """A step and an evaluation."""
    held = peer.step(held, BATCH)[0]
    peer.evaluate(held, BATCH[0])
    return held


def interrupted(peer: Peer, held: Any, i: int) -> Any:
    """Through a file, in the middle."""
    return peer.step(peer.restored(held) if i == 10 else held, BATCH)[0]


def in_turn_committed(peer: Peer, held: Any, i: int) -> Any:
    """Every other batch comes by `jax.device_put` to a device, as from a loader that prefetches."""
    return peer.step(held, jax.device_put(BATCH, jax.devices()[0]) if i % 2 else BATCH)[0]


def ending_ragged(peer: Peer, held: Any, i: int) -> Any:
    """The last batch is smaller."""
    return peer.step(held, RAGGED if i == STEPS - 1 else BATCH)[0]


def flagged(peer: Peer, held: Any, i: int) -> Any:
    """Batch statistics are frozen for the second half."""
    return peer.step(held, BATCH, train=i < STEPS // 2)[0]


def on_mesh(peer: Peer, held: Any, i: int) -> Any:
    """Params replicated over 8 devices, the batch split over them."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    held = peer.placed(NamedSharding(mesh, P())) if i == 0 else held
    return peer.step(held, jax.device_put(BATCH, NamedSharding(mesh, P("data"))))[0]


SCENARIOS: dict[str, Scenario] = {
    "steady state": Scenario(
        task(), "every call has the types of the first", "the first call differs from the rest", "nothing is needed"
    ),
    "shape drift": Scenario(
        task(nets.Drift()),
        "the state keeps its shape",
        "the guide's BiasAdderWithRunningMean returns its mean as [1, n] where it got [n]",
        "settle_state broadcasts the first state to the shape that it is going to have",
    ),
    "weak type": Scenario(
        task(nets.Weak()),
        "the library makes the param a strong float32",
        "a param that starts as a Python number is weakly typed, and the optimizer returns it strong",
        "init_carry makes every leaf strong",
    ),
    "bf16": Scenario(
        task(dtype=jnp.bfloat16),
        "the running statistics keep their dtype",
        "statistics cast to bf16 with the params come back as float32",
        "settle_state casts the first state to the dtype that it is going to have",
    ),
    "new module per loop": Scenario(
        task(),
        "no module is among the arguments of the compiled function, or equal ones compare equal",
        "model.apply of a new module is another static value, though the module is equal",
        "the module is no argument of the step; a new loop makes a new carry only",
        anew(module=True),
    ),
    "new optimizer object": Scenario(
        task(),
        "the optimizer is closed over, and only its state is an argument",
        "the optimizer's functions are static values, compared by identity",
        "the optimizer is no argument of the step; a new loop makes a new carry only",
        anew(new_tx=True),
    ),
    "FrozenDict": Scenario(
        task(frozen=True),
        "FrozenDicts come back as such",
        "FrozenDicts go in, and Flax gives back dicts",
        "split_params gives plain dicts, whatever Mapping went in",
        absent=dict.fromkeys((*NNX_ONES, *OTHERS), "has no FrozenDict"),
    ),
    "sown values": Scenario(
        task(nets.Sow()),
        "sown values are taken out at each step, as the documentation says",
        "a sown collection that is fed back grows by a leaf at each step",
        "with_mutable(capture=...) gives them out beside the result, and never into the state",
        absent=dict.fromkeys(OTHERS, "has no sown values"),
    ),
    "train/eval alternation": Scenario(
        task(),
        "",
        "train and eval are two functions, each compiled once",
        "with_mutable(mutable=False) evaluates; two functions, each compiled once",
        alternating,
        possible=2,
    ),
    "restored checkpoint": Scenario(
        task(),
        "what came from the file has the types of what was saved",
        "a leaf came back in another type",
        "adopt_carry gives every leaf the type and place of the carry's",
        interrupted,
    ),
    "committed inputs": Scenario(
        task(pinned=True),
        "every argument is put in one place, or its place does not matter to the compiled function",
        "jax.jit compiles for each mixture of arguments with and without a device of their own",
        "jit_step(like=carry) pins every argument to the carry's device",
        in_turn_committed,
    ),
    MESH: Scenario(
        task(pinned=True),
        "every leaf is placed on the mesh before the first step",
        "leaves that were left on one device (Adam's count) come back replicated",
        "init_carry places every leaf on the mesh, and jit_step(like=carry) keeps it there",
        on_mesh,
    ),
    "ragged last batch": Scenario(
        task(),
        "",
        "two shapes are two programs; drop or pad the last batch for one",
        "two shapes are two programs; drop or pad the last batch for one (stack_batches keeps it apart in a scan)",
        ending_ragged,
        possible=2,
    ),
    "a static flag that changes": Scenario(
        task(static=True),
        "",
        "each value of the flag is a program of its own",
        "each value of the flag is a step of its own, made by jit_step",
        flagged,
        possible=2,
    ),
}


def count(name: str, scenario: Scenario, watch: Any = lambda fn: fn) -> tuple[int, int]:
    """Traces and compiles of the step, and of the evaluation."""
    peer = build(name, scenario.task, watch)
    with fs.compile_log() as log:
        held = peer.fresh() if scenario.turn is not on_mesh else None
        for i in range(STEPS):
            held = scenario.turn(peer, held, i)
    names = (peer.traced, "evaluate")
    return sum(log.traces[each] for each in names), sum(log.compiles[each] for each in names)


def reason(name: str, scenario: Scenario) -> str:
    """What changed at the second trace, from flaxsplit's own table."""
    try:
        count(name, scenario, fs.assert_max_traces)
    except Exception as error:
        found: Any = error
        while found is not None and not isinstance(found, fs.RetraceError):
            found = found.__cause__ or found.__context__
        if found is not None and found.leaves[0] != "no argument changed":
            return str(found.leaves[0])
    return ""


def said_by_jax(name: str, scenario: Scenario) -> str:
    """What `jax_explain_cache_misses` logs of the second trace."""
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logger, before = logging.getLogger("jax"), logging.getLogger("jax").propagate
    logger.addHandler(handler)
    logger.propagate = False
    jax.config.update("jax_explain_cache_misses", True)
    try:
        count(name, scenario)
    finally:
        jax.config.update("jax_explain_cache_misses", False)
        logger.removeHandler(handler)
        logger.propagate = before
    text = log.getvalue().partition("closest previous key:")[2].partition("CACHE MISS")[0].rpartition("\n")[0]
    changes = re.findall(r"\* (?:at )?(.*?)(?=https?:|$)", text, re.MULTILINE)
    return str(changes[0]) if changes else text.strip().rpartition("\n")[2].strip()


def said(scenario: Scenario, counted: Mapping[str, Any]) -> dict[str, str]:
    """What JAX and what `assert_max_traces` say of one situation, of the plainest step that compiles again in it."""
    for name in (HAND, GUIDE, TRAIN_STATE):
        numbers, _ = counted.get(name, (None, ""))
        if numbers and sum(numbers) > 2:
            told = name, said_by_jax(name, scenario), reason(name, scenario)
            return {key: words or "nothing" for key, words in zip(SAID, told, strict=True)}
    return {}


def cell(name: str, scenario: Scenario, thorough: bool) -> tuple[tuple[int, int] | None, str]:
    """Traces and compiles, and the sentence that explains them; what changed in the arguments if `thorough`."""
    if name in scenario.absent:
        return None, scenario.absent[name]
    try:
        traces, compiles = count(name, scenario)
    except Exception as error:  # whatever another library says of the situation
        return None, refusal(error)
    if name == OURS and compiles == scenario.possible:
        return (traces, compiles), scenario.ours
    if compiles <= 1 or compiles == scenario.possible:
        return (traces, compiles), scenario.one if compiles == 1 else scenario.more
    why = reason(name, scenario) if thorough and traces > scenario.possible else ""
    return (traces, compiles), scenario.more + (f": `{why}`" if why else "")


Cells = dict[str, dict[str, Any]]


def cells_of(titles: Sequence[str], names: Sequence[str], thorough: bool, tell: Tell) -> Cells:
    """Each scenario by each implementation."""
    found: Cells = {}
    for title in titles:
        tell(title)
        found[title] = {name: cell(name, SCENARIOS[title], thorough) for name in names}
        if thorough and HAND in names:
            found[title] |= {key: (None, words) for key, words in said(SCENARIOS[title], found[title]).items()}
    return found


def beside(titles: Sequence[str], names: Sequence[str], thorough: bool, flags: str = "") -> Cells:
    """The same in a process of its own, on the CPU."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    found: Cells = elsewhere(__name__, json.dumps([titles, names, thorough]), JAX_PLATFORMS="cpu", XLA_FLAGS=flags)
    return found


def measure(effort: Effort, tell: Tell) -> Iterator[Row]:
    """Every scenario by every implementation that is there; a quick run looks at the usual form of each."""
    names = present(effort.of(smoke=[OURS, HAND], quick=USUAL, full=PEERS))
    absent, thorough = missing() if effort.name != "smoke" else {}, effort.name == "full"
    if effort.planned:  # one after the other, so that it can stop between two
        for title in SCENARIOS:
            if effort.wants(title):
                mesh = [title], names, thorough, f"--xla_force_host_platform_device_count={DEVICES}"
                found = beside(*mesh) if title == MESH else cells_of([title], names, thorough, tell)
                yield from rows_of(title, found[title], absent)
        return
    if not effort.wants("every situation"):
        return
    tell("the same losses")
    plain = {name: build(name, task()) for name in names}
    check_agree({name: losses_of(peer.step, peer.fresh(), BATCH) for name, peer in plain.items()})
    titles = [title for title in SCENARIOS if title != MESH]
    half = (len(names) + 1) // 2 if jax.default_backend() == "cpu" else len(names)
    with ThreadPoolExecutor(1) as other:  # nothing here is timed, so that both cores may work
        rest = other.submit(beside, titles, names[half:], thorough)
        placed = other.submit(beside, [MESH], names, thorough, f"--xla_force_host_platform_device_count={DEVICES}")
        own = cells_of(titles, names[:half], thorough, tell)
        tell("what the process beside counts")
        found = {title: {**own[title], **rest.result()[title]} for title in titles} | placed.result()
    for title in SCENARIOS:
        yield from rows_of(title, found[title], absent)


def rows_of(title: str, found: dict[str, Any], absent: dict[str, str]) -> Iterator[Row]:
    """Traces and compiles of one situation, with a sentence for each implementation."""
    notes = {name: words for name, (_, words) in found.items()} | absent
    for i, unit in ((0, "traces"), (1, "compiles")):
        samples = {name: [float(count[i])] for name, (count, _) in found.items() if count}
        yield Row(title, unit, samples, OURS, notes=notes, work={"possible": SCENARIOS[title].possible})


if __name__ == "__main__":
    asked_titles, asked_names, in_full = json.loads(sys.argv[1])
    print(json.dumps(cells_of(asked_titles, asked_names, in_full, lambda words: None)))
