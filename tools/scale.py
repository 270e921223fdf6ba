"""`tests/test_scale.py`: what a step of a 7B-parameter transformer carries and sends, read off the compiled HLO.

Compiles full-width steps of few layers over 256 virtual CPU devices, from shapes alone (nothing of it is ever
allocated), reads their collectives, and takes what one more layer adds times the layers. `--write` puts the tables into
`docs/scale.md`; with `--node` those of eight devices, in microbatches and with ZeRO-1. `--small` does it all with a
small model on eight devices and looks that the extrapolation is exact.
"""

import argparse
import math
import os
import pathlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "scale.md"
sys.path[:0] = [str(ROOT)]
SMALL = "--small" in sys.argv or "--node" in sys.argv
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={8 if SMALL else 256}"

import flax.linen as nn  # noqa: E402 (JAX reads the variables above when it is imported)
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax.sharding import Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import flaxsplit as fs  # noqa: E402

# From the vendors' data sheets: dense bf16 FLOP/s, bytes of memory, bytes/s to each other device in a node and beyond.
H100 = {"flops": 989e12, "memory": 80e9, "inside": 450e9, "beyond": 50e9}
TX = optax.adam(1e-4)


class Size(NamedTuple):
    """A decoder-only transformer and the tokens of one device's share of a batch."""

    layers: int
    width: int
    hidden: int
    heads: int
    words: int
    length: int


FULL = Size(layers=32, width=4096, hidden=11008, heads=32, words=32000, length=4096)
TINY = Size(layers=4, width=64, hidden=128, heads=4, words=128, length=16)


class Layout(NamedTuple):
    """A mesh, and how a step is laid over it: parameters over `data`, and over `model` where that is more than one.

    With `zero_1` params are whole on every device, and what the optimizer and the average keep is laid so.
    """

    data: int
    model: int
    sequences: int  # in the whole batch
    microbatches: int = 1
    zero_1: bool = False

    def __str__(self) -> str:
        axes = f"data {self.data} x model {self.model}" if self.model > 1 or self.data > 8 else f"data {self.data}"
        parts = f", {self.microbatches} microbatches" if self.microbatches > 1 else ""
        return f"{self.data * self.model:,} devices: {axes}{', ZeRO-1' if self.zero_1 else ''}{parts}"


class Transformer(nn.Module):
    """RMSNorm, causal attention and a gated MLP, computed in bf16 from f32 params; activations are kept on the mesh."""

    size: Size
    place: Callable[[jax.Array, P], jax.Array]

    @nn.compact
    def __call__(self, words: jax.Array) -> jax.Array:
        """Maps `[batch, length]` to logits."""
        embed = nn.Embed(self.size.words, self.size.width, dtype=jnp.bfloat16, name="embed")
        x = self.place(embed(words), P("data", None, None))
        for i in range(self.size.layers):
            x = nn.remat(Layer)(self.size, self.place, name=f"layer_{i}")(x)
        return nn.Dense(self.size.words, use_bias=False, dtype=jnp.bfloat16, name="head")(nn.RMSNorm(name="norm")(x))


class Layer(nn.Module):
    """One block, computed again in the backward pass instead of kept."""

    size: Size
    place: Callable[[jax.Array, P], jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, length, width]` to the same."""
        size, place = self.size, self.place

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, use_bias=False, dtype=jnp.bfloat16, name=name)

        y = nn.RMSNorm(dtype=jnp.bfloat16, name="norm_attention")(x)
        shape = (*x.shape[:2], size.heads, size.width // size.heads)
        query, key, value = (
            place(dense(size.width, name)(y).reshape(shape), P("data", None, "model", None))
            for name in ("query", "key", "value")
        )
        y = jax.nn.dot_product_attention(query, key, value, is_causal=True).reshape(x.shape)
        x = place(x + dense(size.width, "out")(y), P("data", None, None))
        y = nn.RMSNorm(dtype=jnp.bfloat16, name="norm_mlp")(x)
        y = place(nn.silu(dense(size.hidden, "gate")(y)) * dense(size.hidden, "up")(y), P("data", None, "model"))
        return place(x + dense(size.width, "down")(y), P("data", None, None))


def spec_of(path: tuple[Any, ...], leaf: Any) -> P:
    """Where a param lies: into the model's parts by `model`, the other axis by `data`; a vector everywhere."""
    names = jax.tree_util.keystr(path)
    if leaf.ndim < 2:
        return P()
    return P("model", "data") if "out" in names or "down" in names or "embed" in names else P("data", "model")


def abstract_carry(size: Size, layout: Layout, place: Any) -> tuple[Any, Any, fs.Carry]:
    """The model, its mesh, and a carry of shapes that know their place: nothing is allocated."""
    devices = jax.devices()[: layout.data * layout.model]
    mesh = Mesh(np.array(devices).reshape(layout.data, layout.model), ("data", "model"))
    model = Transformer(size, lambda x, spec: place(x, NamedSharding(mesh, spec)))

    def made() -> fs.Carry:
        variables = model.init(jax.random.key(0), jnp.zeros((layout.data, size.length), jnp.int32))
        params, state = fs.split_params(variables)
        return fs.init_carry(params, state | {"ema": params}, TX)

    def placed(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        whole = layout.zero_1 and jax.tree_util.keystr(path).startswith(".params")
        sharding = NamedSharding(mesh, P() if whole else spec_of(path, leaf))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return model, mesh, jax.tree_util.tree_map_with_path(placed, jax.eval_shape(made))


def compiled(size: Size, layout: Layout) -> tuple[Any, fs.Carry]:
    """A training step over that carry: cross entropy, Adam, an average of the weights."""
    model, mesh, carry = abstract_carry(size, layout, jax.lax.with_sharding_constraint)

    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        logits, state = fs.with_mutable(model, mutable=False)(params, state, batch)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch[:, 1:]).mean(), state

    step = fs.with_ema(fs.with_optimizer(loss_fn, TX, microbatches=layout.microbatches), decay=0.999)
    batch = jax.ShapeDtypeStruct(
        (layout.sequences, size.length), jnp.int32, sharding=NamedSharding(mesh, P("data", None))
    )
    return fs.jit_step(step, like=carry).lower(carry, batch).compile(), carry


_COLLECTIVE = re.compile(
    r" = (?P<type>\(?.*?\)?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\(.*?replica_groups=(?P<groups>mesh\[[^]]*\] \{[^}]*\}|\[\d+,\d+\]|\{\{[\d,]+)"
)
_ARRAY = re.compile(r"([a-z]+)(\d+)\[([\d,]*)\]")


def collectives(executable: Any, turns: int) -> Counter[tuple[str, int]]:
    """Bytes that come out of the collectives of one device, by kind and number of devices in a group.

    What is not in the entry is in the loop over microbatches, and happens in each of its turns.
    """
    sent: Counter[tuple[str, int]] = Counter()
    loop, _, entry = executable.as_text().rpartition("\nENTRY ")
    for text, times in ((loop, turns), (entry, 1)):
        for found in _COLLECTIVE.finditer(text):
            for _, bits, shape in _ARRAY.findall(found["type"]):
                count = math.prod(int(each) for each in shape.split(",") if each)
                sent[found["kind"], members_of(found["groups"])] += times * count * int(bits) // 8
    return sent


def members_of(groups: str) -> int:
    """How many devices are in one group; XLA writes groups in three ways."""
    if groups.startswith("mesh"):  # mesh['axis_0'=4,'axis_1'=2] {'axis_0'}
        axes, _, chosen = groups.partition("] {")
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", chosen))
    if groups.startswith("["):  # [2,4]<=[8]: two groups of four
        return int(groups[1:-1].split(",")[1])
    return groups.count(",") + 1  # {{0,1,2,3},{4,5,6,7}}


def read(size: Size, layout: Layout) -> Counter[tuple[str, int]]:
    """The collectives of a step, as they are compiled."""
    return collectives(compiled(size, layout)[0], layout.microbatches)


def grown(size: Size, layout: Layout) -> Counter[tuple[str, int]]:
    """The collectives of all layers: what the third layer adds to a step of two, once for each that is left."""
    two, three = (read(size._replace(layers=layers), layout) for layers in (2, 3))
    kinds = two | three
    return Counter({kind: two[kind] + (size.layers - 2) * (three[kind] - two[kind]) for kind in kinds})


def on_the_wire(kind: str, members: int, size: float) -> float:
    """Bytes that a device sends in a ring: of an all-reduce the sum goes round and then the result."""
    return {"all-reduce": 2.0, "reduce-scatter": members}.get(kind, 1.0) * size * (members - 1) / members


def held(size: Size, layout: Layout, as_compiled: Layout) -> Iterator[tuple[str, float, float]]:
    """What is in the carry: each part's bytes in all, and on one device."""
    carry = abstract_carry(size, as_compiled, _as_is)[2]
    parts = {"params": carry.params, "Adam's moments": carry.opt_state, "the average of the weights": carry.state}
    for name, tree in parts.items():
        total = here = 0.0
        for leaf in jax.tree.leaves(tree):
            nbytes = math.prod(leaf.shape) * leaf.dtype.itemsize
            split = math.prod(layout._asdict()[axis] for axis in leaf.sharding.spec if axis)
            total, here = total + nbytes, here + nbytes / split
        yield name, total, here


def sent(size: Size, layout: Layout, as_compiled: Layout) -> dict[tuple[str, str], tuple[float, float]]:
    """By kind and axis of the mesh: bytes that come out of the collectives, and that a device sends in a ring."""
    found: dict[tuple[str, str], tuple[float, float]] = {}
    for (kind, members), result in grown(size, as_compiled).items():
        axis = "model" if members == as_compiled.model else "data"  # the few over all devices are the loss and such
        group = layout.model if axis == "model" else layout.data
        before = found.get((kind, axis), (0.0, 0.0))
        found[kind, axis] = before[0] + result, before[1] + on_the_wire(kind, group, result)
    return found


def show(size: Size, layouts: list[tuple[Layout, Layout]]) -> Iterator[str]:
    """The tables as Markdown. Each layout comes with the smaller one that it is compiled as."""
    params = abstract_carry(size, layouts[0][1], _as_is)[2].params
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    yield f"{count / 1e9:.2f} billion params, {size.layers} layers, sequences of {size.length:,} tokens."
    for layout, as_compiled in layouts:
        yield from ("", f"### {layout}", "")
        yield from ("| in the carry | in all | per device |", "|---|---|---|")
        for name, total, here in held(size, layout, as_compiled):
            yield f"| {name} | {total / 1e9:.1f} GB | {here / 1e6:,.0f} MB |"
        yield from ("", "| collective | over | result per device | sent per device |", "|---|---|---|---|")
        wire = {"data": 0.0, "model": 0.0}
        for (kind, axis), (result, ring) in sorted(sent(size, layout, as_compiled).items()):
            wire[axis] += ring
            yield f"| {kind} | `{axis}` | {result / 1e9:.2f} GB | {ring / 1e9:.2f} GB |"
        if layout.data * layout.model > 8:
            yield from ("", *times(size, layout, count, wire))


def times(size: Size, layout: Layout, count: int, wire: dict[str, float]) -> Iterator[str]:
    """What a step takes at least, on H100s in nodes of eight: the largest is the bottleneck."""
    tokens = layout.sequences * size.length / (layout.data * layout.model)
    compute = 8 * count * tokens / H100["flops"]  # 2 forward, 4 backward, 2 computed again
    inside, beyond = wire["model"] / H100["inside"], wire["data"] / H100["beyond"]
    yield f"| at least, on H100s | seconds a step, {tokens:,.0f} tokens per device |"
    yield "|---|---|"
    yield f"| compute, at the peak of bf16 | {compute:.3f} |"
    yield f"| collectives over `model`, inside a node | {inside:.3f} |"
    yield f"| collectives over `data`, between nodes | {beyond:.3f} |"


def _as_is(x: Any, _: Any) -> Any:
    return x


def main() -> int:
    """Prints the tables, or puts them into the page; with `--small`, checks the arithmetic against a whole compile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scale.md")
    parser.add_argument("--small", action="store_true", help="eight devices, and a check instead of tables")
    parser.add_argument("--node", action="store_true", help="the tables of eight devices: microbatches and ZeRO-1")
    options = parser.parse_args()
    if options.small:
        exact = True
        for layout in (Layout(4, 2, 8), Layout(8, 1, 32, 2, zero_1=True)):
            reckoned, found = grown(TINY, layout), read(TINY, layout)
            print(f"{TINY.layers} layers on {layout}: reckoned {dict(reckoned)}, compiled {dict(found)}")
            exact = exact and reckoned == found and bool(found)
        return 0 if exact else 1
    layouts = [(Layout(256, 1, 1024), Layout(256, 1, 1024)), (Layout(512, 8, 1024), Layout(32, 8, 64))]
    node = [Layout(8, 1, 128, count, zero_1) for zero_1 in (False, True) for count in (1, 4)]
    text = "\n".join(show(FULL, [(each, each) for each in node] if options.node else layouts))
    print(text)
    if options.write:
        begin, end = (f"<!-- {'node' if options.node else 'scale'}: {word} -->" for word in ("begin", "end"))
        before, _, rest = PAGE.read_text().partition(begin)
        PAGE.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
