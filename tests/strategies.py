"""What the laws are tried on: variable trees of every kind that Flax makes, filters, optimizers, models, stacks."""

import json
import os
import pathlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.core import DenyList, FrozenDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky, UnsatisfiedAssumption
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks._measure import about

from . import drawn_models as drawn
from .meshes import AUTO, line, on

Path: TypeAlias = tuple[str, ...]
Strategy: TypeAlias = st.SearchStrategy[Any]
Kind: TypeAlias = Callable[[dict[str, Any]], Mapping[str, Any]]

MESH = line(AUTO)
SHARDED = on(MESH, "data")
NAMES = ["Dense_0", "kernel", "bias", "a", "ß", "0", "head", "Head"]
DEEPER = [*NAMES, "params", "batch_stats"]  # right below the collection these read as variables passed by mistake
COLLECTIONS = ["batch_stats", "cache", "ema", "mine"]


def examples(count: int) -> settings:
    """As `settings(max_examples=count)`, but the profile `deep` multiplies it."""
    return settings(max_examples=max(count, count * settings().max_examples // 25))


class TimeIsUp(BaseException):
    """Ends a test's examples: hypothesis lets pass what is no Exception."""


class Budget:
    """How long a test may draw examples, and how many it tried."""

    def __init__(self, name: str, least: int = 3) -> None:
        self.name, self.least, self.tried, self.failed = name, least, 0, False
        self.seconds = float(os.environ.get("FUZZ_SECONDS", 8))
        self.started = self.said = time.monotonic()

    def next(self) -> None:
        """Begins an example."""
        now = time.monotonic()
        self.tried += 1
        if self.tried % 50 == 0:
            jax.clear_caches()  # thousands of programs would fill the memory
        if now - self.said > 10:
            self.said = now
            print(f"fuzz: {self.name}: {self.tried} examples, {now - self.started:.0f} s", flush=True)

    def end(self) -> None:
        """Ends an example that drew all it draws, and the test if time is up; what failed is shrunk to the end."""
        if time.monotonic() - self.started > self.seconds and self.tried >= self.least and not self.failed:
            raise TimeIsUp

    def spend(self, test: Callable[[], object]) -> None:
        """Runs a test of hypothesis to its end or until time is up, and writes down how many examples it tried."""
        try:
            test()
        except TimeIsUp:
            pass
        except Flaky as error:  # the same example passed before time was up
            if not isinstance(error.__context__, TimeIsUp):
                raise
        finally:
            print(f"fuzz: {self.name}: {self.tried} examples, done", flush=True)
            if "FUZZ_REPORT" in os.environ:
                path = pathlib.Path(os.environ["FUZZ_REPORT"])
                path.parent.mkdir(parents=True, exist_ok=True)
                found = json.loads(path.read_text())["examples"] if path.exists() else {}
                command = {"command": f"make fuzz SECONDS={self.seconds:g}"}
                told = {"about": about() | command, "examples": found | {self.name: self.tried}}
                path.write_text(json.dumps(told, indent=1) + "\n")
        assert self.tried >= self.least


def fuzzed(**drawn_from: Strategy) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """As `given`, but for as many examples as fit into `FUZZ_SECONDS`."""

    def decorate(test: Callable[..., None]) -> Callable[[], None]:
        def timed() -> None:
            budget = Budget(test.__name__)

            @settings(max_examples=max(1000, settings().max_examples))
            @given(**drawn_from)
            def example(**values: Any) -> None:
                budget.next()
                try:
                    test(**values)
                except Exception as error:
                    budget.failed = not isinstance(error, UnsatisfiedAssumption)
                    raise
                budget.end()

            budget.spend(example)

        timed.__name__, timed.__module__ = test.__name__, test.__module__
        return timed

    return decorate


class CustomMapping(Mapping[str, Any]):
    """A Mapping that is neither dict nor pytree; only what the ABC asks for."""

    def __init__(self, items: Mapping[str, Any]) -> None:
        self._items = dict(items)

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


LOCAL = [
    jnp.arange(3.0),
    jnp.ones((2, 2), jnp.bfloat16),
    jnp.full((1, 3), 0.5, jnp.float16),
    jnp.array([1 + 2j, 3j]),
    jnp.int32(3),
    jnp.arange(4, dtype=jnp.uint8),
    jnp.array([True, False]),
    jnp.zeros((0, 2)),
    jax.random.key(0),
    jax.random.split(jax.random.key(2, impl="rbg"), 2),
    jax.random.PRNGKey(1),
    np.full(2, 1.5, np.float32),
    nn.Partitioned(jnp.ones((2, 3)), names=("in", None)),
    nn.Partitioned(jnp.ones(5, jnp.bfloat16), names=("data",), mesh=MESH),
    nn.LogicallyPartitioned(jnp.zeros(4), names=("embed",), rules=(("embed", "data"),)),
    nn.LogicallyPartitioned(jax.random.key(3), names=()),
    (jnp.ones(1), jnp.zeros(2)),  # as sown values are kept
]
PLACED = [
    jax.device_put(jnp.arange(8.0), SHARDED),
    jax.device_put(jnp.arange(16, dtype=jnp.int32).reshape(8, 2), SHARDED),
    jax.device_put(jnp.ones(3, jnp.bfloat16), NamedSharding(MESH, PartitionSpec())),
    nn.Partitioned(jax.device_put(jnp.ones((8, 1)), SHARDED), names=("data", None), mesh=MESH),
]


def leaves() -> Strategy:
    """One leaf of any kind, on one device or on a mesh."""
    return st.sampled_from([*LOCAL, *PLACED])


def floats() -> Strategy:
    """One leaf that can be optimized."""
    return st.tuples(st.integers(0, 3), st.floats(-2, 2, width=16)).map(lambda pair: jnp.full(*pair, jnp.float32))


def trees(leaf: Strategy | None = None, names: list[str] = NAMES, max_leaves: int = 8) -> Strategy:
    """Nested dicts of any depth, empty branches included."""

    def branch(child: Strategy, names: list[str] = DEEPER) -> Strategy:
        return st.dictionaries(st.sampled_from(names), child, max_size=4)

    return branch(st.recursive(leaf if leaf is not None else leaves(), branch, max_leaves=max_leaves), names)


def variables(leaf: Strategy | None = None) -> Strategy:
    """Flax's whole mapping, in plain dicts."""
    rest = st.dictionaries(st.sampled_from(COLLECTIONS), trees(leaf), max_size=3)
    return st.builds(lambda params, state: {"params": params, **state}, trees(leaf), rest)


def dressed(tree: Mapping[str, Any], kind: Kind) -> Mapping[str, Any]:
    """The same tree as FrozenDict, as a custom Mapping, or as plain dicts of its own."""
    own = {key: dressed(value, kind) if isinstance(value, Mapping) else value for key, value in tree.items()}
    return own if kind is dict else kind(own)


KINDS: list[Kind] = [dict, FrozenDict, CustomMapping]


def kinds() -> st.SearchStrategy[Kind]:
    """One of the mappings that variables may come in."""
    return st.sampled_from(KINDS)


def flat(tree: Mapping[str, Any], path: Path = ()) -> dict[Path, Any]:
    """Leaves by path, as the tests see them: written again, so as not to trust the library's own."""
    found: dict[Path, Any] = {}
    for key in tree:
        value = tree[key]
        found |= flat(value, (*path, key)) if isinstance(value, Mapping) else {(*path, key): value}
    return found


def arrays(tree: Mapping[str, Any]) -> dict[Path, Any]:
    """As `flat`, with the arrays of a tuple one by one; a hole in it is none of them."""
    found: dict[Path, Any] = {}
    for path, leaf in flat(tree).items():
        parts = enumerate(leaf) if isinstance(leaf, tuple) else ()
        found |= {(*path, str(i)): part for i, part in parts if part is not None} or {path: leaf}
    return found


def within(tree: Mapping[str, Any], paths: Collection[Path]) -> set[Path]:
    """The arrays of these leaves."""
    return {path for path in arrays(tree) if path in paths or path[:-1] in paths}


def nested(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """The plain dicts that hold these leaves at these paths."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        branch = tree
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = leaf
    return tree


@st.composite
def prefixes(draw: st.DrawFn, tree: Mapping[str, Any]) -> tuple[dict[str, Any], set[Path]]:
    """A tree of bools of which one may stand for a whole branch, with at least one True, and what it chooses."""

    def grown(branch: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], set[Path]]:
        mask: dict[str, Any] = {}
        chosen: set[Path] = set()
        for key, value in branch.items():
            below = flat(value, (*path, key)) if isinstance(value, Mapping) else {(*path, key): value}
            if not below:
                continue
            if isinstance(value, Mapping) and draw(st.booleans()):
                mask[key], deeper = grown(value, (*path, key))
                chosen |= deeper
            else:
                mask[key] = draw(st.booleans())
                chosen |= below.keys() if mask[key] else set()
        return mask, chosen

    mask, chosen = grown(tree, ())
    if not chosen:
        key = next(iter(mask))
        mask[key], chosen = True, {path for path in flat(tree) if path[0] == key}
    return mask, chosen


@st.composite
def trainables(draw: st.DrawFn, params: Mapping[str, Any]) -> tuple[Any, set[Path]]:
    """A `trainable` of every kind that matches something in `params`, and the paths that it is to choose."""
    whole, single = sorted(flat(params)), arrays(params)
    if not whole:
        return None, set()
    some = draw(st.sets(st.sampled_from(whole), min_size=1))
    one = draw(st.sampled_from(sorted({*whole, *single})))
    word, cut = "/".join(one), draw(st.integers(0, len("/".join(one))))
    kind = type(draw(st.sampled_from([*single.values()])))

    def where(test: Callable[[str], bool]) -> set[Path]:
        return within(params, [path for path in {*whole, *single} if test("/".join(path))])

    mask, chosen_by_mask = nested({path: path in some for path in whole}), within(params, some)
    begun, by_prefix = draw(prefixes(params))
    every: list[tuple[Any, set[Path]]] = [
        (None, set(single)),
        ("*", set(single)),
        (word, within(params, [one])),
        (f"{word[:cut]}*", where(lambda name: name.startswith(word[:cut]))),
        (f"*{word[cut:]}", where(lambda name: name.endswith(word[cut:]))),
        (word[:-1] + "?", where(lambda name: name[:-1] == word[:-1])),
        (lambda path, _: f"{path}/".startswith(f"{word}/"), {path for path in single if path[: len(one)] == one}),
        (lambda _, leaf: type(leaf) is kind, {path for path, leaf in single.items() if type(leaf) is kind}),
        (mask, chosen_by_mask),
        (dressed(mask, draw(kinds())), chosen_by_mask),
        (jax.tree.map(lambda _: True, params), set(single)),  # boxes stay in it
        (begun, within(params, by_prefix)),
    ]
    if draw(st.booleans()):
        alone: tuple[Any, set[Path]] = draw(st.sampled_from(every))
        return alone
    several = draw(st.lists(st.sampled_from(every[1:]), min_size=1, max_size=3))
    filters, chosen = zip(*several, strict=True)
    several_as: Any = draw(st.sampled_from([list, tuple]))
    return several_as(filters), set[Path]().union(*chosen)


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2),
    "lion": optax.lion(1e-3),
    "clip": optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1)),
    "MultiSteps": optax.MultiSteps(optax.adam(1e-2), every_k_schedule=2).gradient_transformation(),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(learning_rate=optax.linear_schedule(1e-2, 1e-3, 4)),
    "reduce_on_plateau": optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1, cooldown=1)),
    "masked": optax.masked(optax.adam(1e-2), lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)),
    "apply_if_finite": optax.apply_if_finite(optax.adam(1e-2), max_consecutive_errors=2),
}
"""The optimizers of the design's laws, by name."""

PARTS = [
    optax.clip(0.5),
    optax.clip_by_global_norm(0.1),
    optax.scale_by_adam(),
    optax.scale_by_rms(),
    optax.trace(0.9, nesterov=True),
    optax.add_decayed_weights(1e-2),
    optax.scale_by_schedule(optax.cosine_decay_schedule(1.0, 10)),
    optax.scale_by_trust_ratio(),
    optax.contrib.reduce_on_plateau(patience=1),
]


def chains() -> st.SearchStrategy[optax.GradientTransformation]:
    """An optax chain of any parts, down the gradient."""
    parts = st.lists(st.integers(0, len(PARTS) - 1), min_size=1, max_size=3, unique=True)
    return parts.map(lambda each: optax.chain(*(PARTS[i] for i in each), optax.scale(-0.1)))


def optimizers() -> st.SearchStrategy[optax.GradientTransformation]:
    """A named one, or a chain."""
    return st.sampled_from(sorted(OPTIMIZERS)).map(OPTIMIZERS.__getitem__) | chains()


@st.composite
def models(
    draw: st.DrawFn, *, rounding: bool = True, dropout: bool = True, cached: bool = True, drifting: bool = False
) -> drawn.Model:
    """Some layers in an order that fits; without `rounding`, in f32 alone, as two programs of one step need.

    With `drifting`, one of them is carried from call to call, perhaps in another shape from its first update on.
    """
    timeless, embedded = draw(st.booleans()), draw(st.booleans())
    precision = st.sampled_from(["float32", "bfloat16", "float16"] if rounding else ["float32"])
    layers: list[Strategy] = [
        st.builds(drawn.Dense, st.booleans(), st.none() | precision, precision),
        st.just(drawn.BatchNorm()),
        st.just(drawn.Sow()),
        st.just(drawn.Remember()),
    ]
    layers += [st.just(drawn.Dropout())] if dropout else []
    if not timeless:
        layers += [st.just(drawn.Conv()), st.builds(drawn.RNN, st.sampled_from(["GRUCell", "LSTMCell"]))]
        layers += [st.builds(drawn.Attention, st.booleans() if cached else st.just(False))]
    some = draw(st.lists(st.one_of(layers), min_size=1, max_size=3))
    if drifting:
        some.insert(draw(st.integers(0, len(some))), drawn.Remember(draw(st.booleans())))
    some = [drawn.Embed(), *some] if embedded else some
    frozen = draw(st.frozensets(st.integers(0, len(some) - 1)))
    return drawn.Model(tuple(some), frozen, timeless)


@st.composite
def stacks(draw: st.DrawFn, model: drawn.Model, microbatches: list[int] | None = None) -> drawn.Stack:
    """Combinators in any order that is valid around this model."""
    functions = ["rngs"] if model.has(drawn.Dropout) else []
    # a cache has the batch axis itself; of two rows that are nearly the same, BatchNorm makes numbers out of rounding
    if not model.cached and not model.has(drawn.BatchNorm) and draw(st.booleans()):
        functions.append("vmap")
    steps = draw(st.lists(st.sampled_from(["ema", "skip", "traced"]), unique=True))
    if {"ema", "skip"} <= {*steps}:
        steps = ["ema", *(name for name in steps if name != "ema")]
    return drawn.Stack(
        tuple(draw(st.permutations(functions))),
        tuple(steps),
        draw(st.booleans()),
        draw(st.sampled_from(["none", "place", "name"])),
        draw(st.integers(1, 3)) if "ema" in steps else 1,
        draw(st.sampled_from(["params", "all"])) if "ema" in steps else "params",
        draw(st.sampled_from(microbatches or [1])) if not model.cached else 1,
        draw(st.booleans()),
        draw(st.booleans()),
    )


def mutables(names: list[str], others: list[str]) -> Strategy:
    """Every form of a filter of Flax that makes these collections of a state mutable, and none of the others."""
    forms: list[Any] = [list(names), tuple(names), frozenset(names), DenyList(list(others))]
    forms += names if len(names) == 1 else []
    forms += [] if names else [False]
    forms += [] if others else [..., True]
    return st.sampled_from(forms)


@st.composite
def batches(draw: st.DrawFn, model: drawn.Model) -> tuple[list[Any], int]:
    """Some batches, of JAX or NumPy, the last of them perhaps smaller; and how many to stack."""
    made = [model.batch(seed) for seed in draw(st.lists(st.integers(0, 99), min_size=1, max_size=3))]
    # a cache has the batch axis itself; of two rows that are nearly the same, BatchNorm makes numbers out of rounding
    if not model.cached and not model.has(drawn.BatchNorm) and draw(st.booleans()):
        made.append(jax.tree.map(lambda leaf: leaf[: drawn.BATCH // 2], made[0]))
    as_numpy = draw(st.booleans())
    return (jax.tree.map(np.asarray, made) if as_numpy else made), draw(st.integers(1, 3))


UPDATED = ("batch_stats", "carried")
"""Collections whose leaves a drawn model makes anew at each call, whatever broadcastable ones it was given."""


@st.composite
def narrowed(draw: st.DrawFn, state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A state of which some leaves have fewer numbers, another dtype, or are NumPy's; and what it is to settle to."""
    start, settled = flat(state), flat(state)
    for path in sorted(path for path in start if path[0] in UPDATED):
        like = start[path]
        leaf = like + jnp.arange(like.size, dtype=like.dtype).reshape(like.shape) / 4  # no two numbers are the same
        cut = draw(st.sampled_from([(), (..., slice(1)), (0,), (0,) * like.ndim]))
        leaf = leaf[cut].astype(draw(st.sampled_from([like.dtype, jnp.float16, jnp.bfloat16, jnp.int32])))
        floats = leaf.ndim == 0 and jnp.result_type(float) == like.dtype  # under JAX_ENABLE_X64 a float is f64
        kinds: list[Any] = [jnp.asarray, np.asarray, *([float] if floats else [])]
        start[path] = draw(st.sampled_from(kinds))(leaf)
        settled[path] = jnp.broadcast_to(leaf, like.shape).astype(like.dtype)
    return nested(start), nested(settled)


@st.composite
def lanes(draw: st.DrawFn, model: drawn.Model, params: Mapping[str, Any], state: Mapping[str, Any]) -> drawn.Lanes:
    """Options of a map over this model of one example, of which none is refused."""
    axis_name = draw(st.sampled_from([None, "batch", "lanes"]))
    apart = {"cache"} if axis_name is not None else {"cache", *UPDATED}  # what nothing averages, each lane has itself
    rngs: str = draw(st.sampled_from(["outside", "inside", "hand", *([] if model.has(drawn.Dropout) else ["none"])]))
    names = [name for name in state if name != "rngs" or rngs != "outside"]  # there the map sees no stream
    axis = st.sampled_from([0, -1])
    state_axes = {name: draw(axis) for name in names if name in apart or draw(st.booleans())}
    params_axes = draw(st.none() | axis | st.fixed_dictionaries({name: st.none() | axis for name in params}))
    dimensions = model.inputs(0).ndim
    x = draw(st.none() | st.integers(-dimensions, dimensions - 1))
    shift: Any = draw(st.sampled_from([None, 0, -1, {"a": 0, "b": None}, {"a": None, "b": 0}]))
    streams = st.dictionaries(st.sampled_from(["dropout", "noise"]), st.booleans())
    known = rngs == "hand" or "rngs" not in state_axes  # else lanes have streams of their own, and none is split
    split = draw(st.booleans() | streams if known else st.booleans())
    mapped = state_axes or jax.tree.leaves((x, shift, params_axes))
    told, out = not mapped or draw(st.booleans()), draw(st.sampled_from([0, 1, -1]))
    return drawn.Lanes(x, shift, out, params_axes, state_axes, axis_name, rngs, split, told)


@st.composite
def nnx_models(draw: st.DrawFn) -> drawn.NnxModel:
    """About half of the layers of NNX in any order, some of them in a row of their own."""
    row = draw(st.lists(st.sampled_from(sorted(drawn.NNX_LAYERS)), min_size=2, max_size=6, unique=True))
    start, end = sorted(draw(st.tuples(*[st.integers(0, len(row))] * 2)))
    return drawn.NnxModel((*row[:start], tuple(row[start:end]), *row[end:]), draw(st.booleans()))


@st.composite
def nnx_trainables(draw: st.DrawFn, module: nnx.Module) -> tuple[Any, set[Path]]:
    """A `trainable` of every kind that `from_nnx` takes, and the paths that it is to choose."""
    paths = sorted(tuple(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param)))
    one, some = draw(st.sampled_from(paths)), draw(st.sets(st.sampled_from(paths), min_size=1))
    word, cut = "/".join(one), draw(st.integers(0, len("/".join(one))))
    adapters = {path for path in paths if path[-1].startswith("lora_")}
    every: list[tuple[Any, set[Path]]] = [
        (nnx.Param, set(paths)),
        (nnx.All(nnx.Param, nnx.Not(nnx.PathContains(one[-1]))), {path for path in paths if one[-1] not in path}),
        (nnx.PathContains("head"), {path for path in paths if "head" in path}),
        (lambda path, _: tuple(map(str, path)) == one, {one}),
        (nnx.LoRAParam, adapters),
        (word, {one}),
        (f"{word[:cut]}*", {path for path in paths if "/".join(path).startswith(word[:cut])}),
        (nested({path: path in some for path in paths}), some),
    ]
    filters, chosen = zip(
        *draw(st.lists(st.sampled_from([each for each in every if each[1]]), min_size=1, max_size=2)), strict=True
    )
    return (filters[0] if len(filters) == 1 else list(filters)), set[Path]().union(*chosen)
