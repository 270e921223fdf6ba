"""What the laws are tried on: variable trees of every kind that Flax makes, filters, optimizers."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import FrozenDict
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

MESH = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
SHARDED = NamedSharding(MESH, PartitionSpec("data"))
NAMES = ["Dense_0", "kernel", "bias", "a", "ß", "0", "head"]
COLLECTIONS = ["batch_stats", "cache", "ema", "mine"]


class CustomMapping(Mapping):
    """A Mapping that is neither dict nor pytree; only what the ABC asks for."""

    def __init__(self, items):
        self._items = dict(items)

    def __getitem__(self, key):
        return self._items[key]

    def __iter__(self):
        return iter(self._items)

    def __len__(self):
        return len(self._items)


LEAVES = [
    jnp.arange(3.0),
    jnp.ones((2, 2), jnp.bfloat16),
    jnp.int32(3),
    jnp.array([True, False]),
    jax.random.key(0),
    jax.random.PRNGKey(1),
    np.float32(1.5) * np.ones(2, np.float32),
    jax.device_put(jnp.arange(8.0), SHARDED),
    nn.Partitioned(jnp.ones((2, 3)), names=("in", "out")),
    nn.LogicallyPartitioned(jnp.zeros(4), names=("embed",)),
    (jnp.ones(1), jnp.zeros(2)),  # as sown values are kept
]


def leaves():
    """One leaf of any kind. They are shared: what is equal but not the same object would be a copy."""
    return st.sampled_from(LEAVES)


def trees(leaf=None, names=NAMES, max_leaves=8):
    """Nested dicts of any depth, empty branches included."""
    branch = lambda child: st.dictionaries(st.sampled_from(names), child, max_size=4)  # noqa: E731
    return branch(st.recursive(leaf if leaf is not None else leaves(), branch, max_leaves=max_leaves))


def variables(leaf=None):
    """Flax's whole mapping, in plain dicts."""
    rest = st.dictionaries(st.sampled_from(COLLECTIONS), trees(leaf), max_size=3)
    return st.builds(lambda params, state: {"params": params, **state}, trees(leaf), rest)


def dressed(tree, kind):
    """The same tree as FrozenDict, as a custom Mapping, or as it is."""
    if kind is FrozenDict:
        return FrozenDict(tree)
    if kind is CustomMapping:
        return CustomMapping({k: dressed(v, kind) if isinstance(v, dict) else v for k, v in tree.items()})
    return tree


KINDS = st.sampled_from([dict, FrozenDict, CustomMapping])


def flat(tree, path=()):
    """Leaves by path, as the tests see them: written again, so as not to trust the library's own."""
    found = {}
    for key in tree:
        value = tree[key]
        found |= flat(value, (*path, key)) if isinstance(value, Mapping) else {(*path, key): value}
    return found


@st.composite
def trainables(draw, params):
    """A `trainable` of every kind that matches something in `params`."""
    paths = sorted(flat(params))
    if not paths:
        return None
    chosen = draw(st.sets(st.sampled_from(paths), min_size=1))
    joined = {"/".join(path) for path in chosen}
    one = "/".join(draw(st.sampled_from(paths)))
    kind = draw(st.sampled_from(["none", "glob", "predicate", "mask", "prefix", "list"]))
    mask = {}
    for path in paths:
        branch = mask
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = path in chosen
    return {
        "none": None,
        "glob": one[: len(one) // 2 + 1].replace("[", "?") + "*",
        "predicate": lambda path, leaf: path in joined,
        "mask": mask,
        "prefix": {name: True for name in params if flat({name: params[name]} if isinstance(params, dict) else {})},
        "list": [one, lambda path, leaf: path in joined],
    }[kind]


def optimizers():
    """The optimizers of the design's laws, by name."""
    return {
        "sgd": optax.sgd(0.1),
        "momentum": optax.sgd(0.1, momentum=0.9),
        "adam": optax.adam(1e-2),
        "adamw": optax.adamw(1e-2),
        "lion": optax.lion(1e-3),
        "clip": optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1)),
        "MultiSteps": optax.MultiSteps(optax.adam(1e-2), every_k_schedule=2).gradient_transformation(),
        "inject_hyperparams": optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
        "reduce_on_plateau": optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1, cooldown=1)),
        "masked": optax.masked(optax.adam(1e-2), lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)),
        "apply_if_finite": optax.apply_if_finite(optax.adam(1e-2), max_consecutive_errors=2),
    }
