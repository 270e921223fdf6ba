"""Law 8: on a mesh of eight devices a step equals the single-device step to rounding, and compiles once."""

import functools
import math
import pathlib
import re
from collections import Counter
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import flaxsplit as fs

from . import strategies as some
from .flags import needs_donation, needs_jit
from .meshes import AUTO, EXPLICIT, KINDS, grid, line, on, placement, reshard, told
from .models import MLP, UNBIASED, X, Y, structure
from .test_traces import MODELS, loss_of

pytestmark = needs_jit
KEY = jax.random.key(0)
LINE = line(AUTO)
BATCH = (X, Y)
TX = optax.adam(1e-2)


def by_shape(mesh: Mesh, tree: Any) -> Any:
    """FSDP without metadata, in one line: whatever the first axis of the mesh divides is split along it."""
    axis, size = next(iter(mesh.shape.items()))
    divides: Any = lambda leaf: leaf.ndim and leaf.shape[0] % size == 0  # noqa: E731
    return jax.tree.map(lambda leaf: on(mesh, axis) if divides(leaf) else on(mesh), tree)


def assert_close(left: Any, right: Any, tolerance: float = 2e-4) -> None:
    """Compares two trees to rounding; keys and counters exactly."""
    assert structure(left) == structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        if jnp.issubdtype(a.dtype, jnp.inexact):
            np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=tolerance, atol=tolerance)
        elif jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(jax.random.key_data(a), jax.random.key_data(b))
        else:
            np.testing.assert_array_equal(a, b)


def run(step: Any, carry: fs.Carry, batch: Any, count: int = 4, **options: Any) -> tuple[fs.Carry, Any]:
    """Takes some steps: one trace, one compile, placement kept."""
    name, before = step.__name__, placement(carry)
    carry = jax.tree.map(jnp.copy, carry)  # jax.device_put may share a buffer with what it was given
    jitted = fs.jit_step(fs.assert_max_traces(step), **options)
    out: Any = None
    with fs.compile_log() as log:
        for _ in range(count):
            carry, out = jitted(carry, batch)
    assert (log.traces[name], log.compiles[name]) == (1, 1)
    assert placement(carry) == before
    return carry, out


SGD = optax.sgd(0.05, momentum=0.9)


def dropping_step(tx: optax.GradientTransformation, mesh: Mesh = LINE, **options: Any) -> Any:
    """A step over BatchNorm, dropout and an average."""
    apply = fs.with_rngs(fs.vmap_stateful(fs.with_mutable(UNBIASED)))
    return fs.with_ema(fs.with_optimizer(told(loss_of(apply), mesh), tx, **options), decay=0.9)


def dropping_carry(tx: optax.GradientTransformation) -> fs.Carry:
    """Its carry."""
    params, state = fs.split_params(UNBIASED.init(KEY, X[0], train=False))
    return fs.init_carry(params, state | fs.rng_state(dropout=jax.random.key(1)) | {"ema": params}, tx)


# Sharded jit: the mesh is seen by XLA only


@KINDS
def test_stopped_on_a_mesh_of_one_kind_it_goes_on_over_one_of_the_other(kind: AxisType) -> None:
    """Another kind of axes, another shape of the mesh; through the files' NumPy, to rounding, one compile each."""
    start, meshes = dropping_carry(SGD), (line(kind), grid(EXPLICIT if kind is AUTO else AUTO))
    carries = [jax.device_put(start, by_shape(mesh, start)) for mesh in meshes]
    batches = [jax.device_put(BATCH, on(mesh, "data")) for mesh in meshes]
    steps = [dropping_step(SGD, mesh) for mesh in meshes]
    halfway, _ = run(steps[0], carries[0], batches[0], 2, like=carries[0])
    kept = fs.adopt_carry(jax.tree.map(np.asarray, saved(halfway)), carries[1])
    assert placement(kept) == placement(carries[1])
    ended, loss = run(steps[1], kept, batches[1], 2, like=carries[1])
    expected, alone_loss = run(dropping_step(SGD), start, BATCH, 4)
    assert_close(ended, expected)
    np.testing.assert_allclose(loss, alone_loss, rtol=1e-4)


def saved(carry: fs.Carry) -> fs.Carry:
    """As a file has it, in which keys are their bits."""
    is_key: Any = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    tree: fs.Carry = jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, carry)
    return tree


@functools.cache
def alone(name: str) -> tuple[fs.Carry, Any]:
    """Where one device ends with an optimizer."""
    return run(dropping_step(some.OPTIMIZERS[name]), dropping_carry(some.OPTIMIZERS[name]), BATCH)


@KINDS
@pytest.mark.parametrize("name", some.OPTIMIZERS)
def test_every_optimizer_on_a_mesh(name: str, kind: AxisType) -> None:
    tx, mesh = some.OPTIMIZERS[name], line(kind)
    sharded = jax.device_put(dropping_carry(tx), by_shape(mesh, dropping_carry(tx)))
    assert sharded.params["head"]["kernel"].sharding.spec == P("data")
    batch = jax.device_put(BATCH, on(mesh, "data"))
    sharded, loss = run(dropping_step(tx, mesh), sharded, batch, like=sharded)
    assert_close((sharded, loss), alone(name))


def averaged(name: str, mesh: Mesh = LINE) -> tuple[Any, Any]:
    """The step and the carry of one model, with momentum and an average."""
    apply, variables = MODELS[name]()
    params, state = fs.split_params(variables)
    state |= fs.rng_state(dropout=jax.random.key(1)) if name == "Dropping" else {}
    step = fs.with_ema(fs.with_optimizer(told(loss_of(apply), mesh), SGD), decay=0.9)
    return step, fs.init_carry(params, state | {"ema": params}, SGD)


@functools.cache
def model_alone(name: str) -> tuple[fs.Carry, Any]:
    """Where one device ends with a model."""
    return run(*averaged(name), BATCH)


@KINDS
@pytest.mark.parametrize("name", MODELS)
def test_every_model_on_a_mesh(name: str, kind: AxisType) -> None:
    mesh = line(kind)
    step, single = averaged(name, mesh)
    sharded = jax.device_put(single, by_shape(mesh, single))
    sharded, loss = run(step, sharded, jax.device_put(BATCH, on(mesh, "data")), like=sharded)
    assert_close((sharded, loss), model_alone(name))


def by_columns(mesh: Mesh, tree: Any) -> Any:
    """The columns of each matrix split."""
    divides: Any = lambda leaf: leaf.ndim == 2 and leaf.shape[1] % 2 == 0  # noqa: E731
    return jax.tree.map(lambda leaf: on(mesh, None, "model") if divides(leaf) else on(mesh), tree)


PLACES: dict[str, Any] = {
    "replicated": lambda tree, kind=AUTO: jax.tree.map(lambda leaf: on(line(kind)), tree),
    "fsdp": lambda tree, kind=AUTO: by_shape(line(kind), tree),
    "2-D": lambda tree, kind=AUTO: by_columns(grid(kind), tree),
}


@KINDS
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("way", ["step", "microbatches", "scan"])
def test_one_compile_for_every_placement(place: str, way: str, kind: AxisType) -> None:
    if kind is EXPLICIT and way == "microbatches" and jax.__version_info__ < (0, 7):
        pytest.skip("jax-ml/jax#29859: a reshape of an Explicit axis fails beside an axis of size 1")
    single = dropping_carry(TX)
    sharded = jax.device_put(single, PLACES[place](single, kind))
    mesh = sharded.step.sharding.mesh
    batch, spec = (
        (jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), BATCH), (None, "data"))
        if way == "scan"
        else (BATCH, ("data",))
    )
    steps = [dropping_step(TX, each, microbatches=4 if way == "microbatches" else 1) for each in (mesh, LINE)]
    step, one = map(fs.scan_steps, steps) if way == "scan" else steps
    sharded, loss = run(step, sharded, jax.device_put(batch, on(mesh, *spec)), count=20, like=sharded)
    single, expected = run(one, single, batch, count=20)
    assert int(sharded.step) == (60 if way == "scan" else 20)
    np.testing.assert_allclose(loss, expected, rtol=5e-3, atol=1e-5)


@KINDS
def test_optimizer_state_follows_its_params(kind: AxisType) -> None:
    params, state = fs.split_params(MLP().init(KEY, X[0]))
    carry = fs.init_carry(jax.device_put(params, by_shape(line(kind), params)), state, TX)
    for moment in (carry.opt_state[0].mu, carry.opt_state[0].nu):
        assert placement(moment) == placement(carry.params)
    assert placement(carry.params["Dense_1"]["kernel"]) == [on(line(kind), "data")]
    assert {*placement((carry.step, carry.state, carry.opt_state[0].count))} == {on(line(kind))}


@KINDS
@pytest.mark.parametrize("box", ["Partitioned", "LogicallyPartitioned"])
def test_metadata_yields_the_shardings_and_survives(box: str, kind: AxisType, tmp_path: pathlib.Path) -> None:
    mesh, logical = grid(kind), box == "LogicallyPartitioned"
    boxed = nn.with_logical_partitioning if logical else nn.with_partitioning
    names = ("embed", "hidden") if logical else (None, "model")
    rules = (("embed", None), ("hidden", "model"))

    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> Any:
            x = nn.Dense(16, use_bias=False, kernel_init=boxed(nn.initializers.lecun_normal(), names))(x)
            return nn.Dense(1)(nn.relu(nn.BatchNorm(use_running_average=False)(x)))

    def init(key: jax.Array) -> Any:
        params, state = fs.split_params(Boxed().init(key, X))
        return fs.init_carry(params, state | {"ema": params}, TX)

    # abstract first, then straight into shards: no device ever holds a whole leaf that is split
    abstract = jax.eval_shape(init, KEY)
    specs = nn.get_partition_spec(abstract)
    shardings = nn.spmd.logical_to_mesh_sharding(specs, mesh, rules) if logical else nn.get_sharding(abstract, mesh)
    carry = jax.jit(init, out_shardings=shardings)(KEY)

    loss_fn = loss_of(fs.with_mutable(Boxed()))
    step = fs.with_ema(fs.with_optimizer(told(loss_fn, mesh), TX), decay=0.9)
    batch = jax.device_put(BATCH, on(mesh, "data"))
    carry, _ = run(step, carry, batch, like=carry)
    carry, _ = run(fs.scan_steps(step), carry, jax.tree.map(lambda leaf: leaf[None], batch), 1, like=carry)
    single = jax.tree.map(jnp.copy, jax.device_put(init(KEY), jax.devices()[0]))
    single, _ = run(fs.with_ema(fs.with_optimizer(loss_fn, TX), decay=0.9), single, BATCH, 5)
    assert_close(carry, single)
    for tree in (carry.params, carry.state["ema"], carry.opt_state[0].mu, carry.opt_state[0].nu):
        kernel = tree["Dense_0"]["kernel"]
        assert type(kernel).__name__ == box
        assert kernel.names == names
        assert kernel.value.sharding.spec == P(None, "model")
    merged = fs.merge_state(*fs.split_params(fs.merge_state(carry.params, carry.state), trainable="Dense_1/*"))
    assert merged["params"]["Dense_0"]["kernel"].value is carry.params["Dense_0"]["kernel"].value

    if jax.__version_info__ < (0, 7):  # what orbax of today calls there, jax.sharding.set_mesh, was another thing
        return
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "carry", carry)
        checkpointer.wait_until_finished()
        adopted = fs.adopt_carry(checkpointer.restore(tmp_path / "carry", carry), carry)
    assert placement(adopted) == placement(carry)
    run(step, adopted, batch, 1, like=adopted)


@KINDS
def test_a_checkpoint_moves_to_another_mesh_of_the_other_kind(kind: AxisType) -> None:
    left, right = line(kind), grid(AUTO if kind is EXPLICIT else EXPLICIT)
    single = dropping_carry(TX)
    held = jax.device_put(single, by_shape(left, single))
    held, _ = run(dropping_step(TX, left), held, jax.device_put(BATCH, on(left, "data")), like=held)
    wanted = jax.device_put(single, by_columns(right, single))
    adopted = fs.adopt_carry(held, wanted)
    assert placement(adopted) == placement(wanted)
    assert_close(adopted, held, 0)
    moved, loss = run(dropping_step(TX, right), adopted, jax.device_put(BATCH, on(right, "data")), like=wanted)
    stayed, expected = run(dropping_step(TX, left), held, jax.device_put(BATCH, on(left, "data")), like=held)
    assert_close((moved, loss), (stayed, expected), 2e-3)


def test_linen_as_it_is_on_explicit_axes() -> None:
    """Nothing wraps the loss, as nothing does on Auto axes in all the tests above."""
    mesh = line(EXPLICIT)
    params, state = fs.split_params(MLP(axis_name=None).init(KEY, X))

    def loss_fn(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
        out, state = fs.with_mutable(MLP(axis_name=None))(params, state, batch[0], train=True)
        return optax.l2_loss(out, batch[1]).mean(), state

    single = fs.init_carry(params, state, SGD)
    params, state = jax.device_put((params, state), on(mesh))
    carry = fs.init_carry(params, state, SGD)
    step = fs.with_optimizer(loss_fn, SGD)
    carry, loss = run(step, carry, jax.device_put(BATCH, on(mesh, "data")), 20, like=carry)
    single, expected = run(step, single, BATCH, 20)
    assert_close((carry, loss), (single, expected), 1e-3)


# microbatches: each device keeps its own rows

ROWS, IN, HIDDEN, OUT = 1024, 64, 512, 8
LAYOUTS: dict[str, tuple[Any, P, P]] = {
    "DP": (line, P(), P()),
    "FSDP": (line, P("data"), P("data")),
    "2-D": (grid, P(None, "model"), P("model")),
}


def two_layers(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
    """Two layers, so that rows stand in four of five products of matrices."""
    x, y = batch
    return ((jnp.tanh(x @ params["a"]) @ params["b"] - y) ** 2).mean(), state


def laid(layout: str, mesh: Mesh) -> Any:
    """The two layers, and what a layout must say: where weights are gathered; of Explicit axes, where a sum goes."""
    explicit = EXPLICIT in mesh.axis_types
    gather = reshard if explicit else jax.lax.with_sharding_constraint

    def loss_fn(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
        if layout == "FSDP":
            params = jax.tree.map(lambda leaf: gather(leaf, on(mesh)), params)
        if layout != "2-D" or not explicit:
            return two_layers(params, state, batch)
        hidden = jnp.tanh(batch[0] @ params["a"])
        out = jnp.einsum("rh,ho->ro", hidden, params["b"], out_sharding=on(mesh, "data"))
        return ((out - batch[1]) ** 2).mean(), state

    return loss_fn


def laid_out(layout: str, mesh: Mesh) -> tuple[fs.Carry, Any]:
    """The carry and the batch of the two layers, each in its place."""
    params = {"a": jnp.full((IN, HIDDEN), 0.01), "b": jnp.full((HIDDEN, OUT), 0.01)}
    places = dict(zip("ab", (NamedSharding(mesh, spec) for spec in LAYOUTS[layout][1:]), strict=True))
    batch = jax.device_put((jnp.ones((ROWS, IN)), jnp.ones((ROWS, OUT))), on(mesh, "data"))
    return fs.init_carry(jax.device_put(params, places), {}, TX), batch


def products(text: str) -> list[tuple[int, ...]]:
    """Each product of matrices that one device computes: rows, columns, and the size that is summed over."""
    shapes = {name: shape.split(",") for name, shape in re.findall(r"(%[\w.-]+)(?: =|:) f32\[([\d,]+)\]", text)}
    local = re.findall(r"(%[\w.-]+): f32\[([\d,]+)\]", text)
    shapes |= {name: shape.split(",") for name, shape in local}
    found = re.findall(r"= f32\[(\d+),(\d+)\]\S* dot\((?:f32\S* )?(%[\w.-]+),.*?lhs_contracting_dims={(\d)}", text)
    return [(int(rows), int(columns), int(shapes[left][int(axis)])) for rows, columns, left, axis in found]


def collectives_of(text: str) -> list[tuple[str, str]]:
    """What the devices send each other: the kind, and the type of what comes out."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    return [(kind, type_) for type_, kind in re.findall(rf" = (.*?) ({kinds})(?:-start)?\(", text)]


@KINDS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_each_device_computes_its_own_rows_of_a_microbatch(layout: str, count: int, kind: AxisType) -> None:
    mesh: Mesh = LAYOUTS[layout][0](kind)
    carry, batch = laid_out(layout, mesh)
    loss_fn = laid(layout, mesh)
    step = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(loss_fn, TX, microbatches=count)), like=carry)
    text = step.lower(carry, batch).compile().as_text() or ""
    rows, hidden = ROWS // mesh.shape["data"] // count, HIDDEN // mesh.shape.get("model", 1)
    forward, gradients = [(rows, hidden, IN), (rows, OUT, hidden)], [(OUT, hidden, rows), (hidden, IN, rows)]
    assert sorted(products(text)) == sorted([*forward, (rows, hidden, OUT), *gradients])
    assert 8 * count * sum(map(math.prod, products(text))) == ROWS * HIDDEN * (2 * IN + 3 * OUT)  # not one FLOP twice
    sent = collectives_of(text)
    weights = {f"f32[{IN},{HIDDEN}]", f"f32[{HIDDEN},{OUT}]"}
    assert {kind for kind, _ in sent} <= {"all-reduce", "all-gather"}
    gathered = {type_.split("{")[0] for kind, type_ in sent if kind == "all-gather"}
    assert gathered == (weights if layout == "FSDP" else set())  # and never the batch
    sums = [type_ for kind, type_ in sent if kind == "all-reduce"]
    reduced = sum(f"{hidden},{IN}]" in type_ or f"{OUT},{hidden}]" in type_ for type_ in sums)
    assert reduced in (1, 2)  # of two gradients, once for each microbatch; older XLA does not join them
    for _ in range(3):
        carry, _ = step(carry, batch)


@KINDS
def test_under_shard_map_gradients_are_reduced_once_a_step(kind: AxisType) -> None:
    mesh = line(kind)
    carry, batch = laid_out("DP", mesh)
    step = fs.with_optimizer(two_layers, TX, microbatches=4, axis_name="data")
    text = jax.jit(sharded_map(step, mesh)).lower(carry, batch).compile().as_text() or ""
    loops, entry = text.split("ENTRY ")
    assert not collectives_of(loops)
    assert {kind for kind, _ in collectives_of(entry)} == {"all-reduce"}


def test_fsdp_that_does_not_say_where_weights_are_gathered() -> None:
    """XLA then gathers activations instead, where a microbatch of them is smaller; on Explicit axes JAX asks."""
    carry, batch = laid_out("FSDP", LINE)
    step = fs.jit_step(fs.with_optimizer(two_layers, TX, microbatches=4), like=carry)
    text = step.lower(carry, batch).compile().as_text() or ""
    assert any(type_.startswith(f"f32[{ROWS // 4},") for kind, type_ in collectives_of(text) if kind == "all-gather")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_of_rows_would_gather_the_batch(layout: str) -> None:
    """What the tests above guard against: the split that first comes to mind. Explicit axes JAX lets nobody cut so."""
    mesh: Mesh = LAYOUTS[layout][0](AUTO)
    loss_fn = laid(layout, mesh)

    def in_blocks(params: Any, batch: Any) -> Any:
        parts = jax.tree.map(lambda leaf: leaf.reshape(4, ROWS // 4, -1), batch)
        return jax.lax.scan(lambda _, part: ((), loss_fn(params, {}, part)[0]), (), parts)[1].mean()

    carry, batch = laid_out(layout, mesh)
    text = jax.jit(jax.grad(in_blocks)).lower(carry.params, batch).compile().as_text() or ""
    assert 8 * 4 * sum(map(math.prod, products(text))) > 1.5 * ROWS * HIDDEN * (2 * IN + 3 * OUT)


def test_rows_that_leave_a_device_without_some() -> None:
    """Where axes are Explicit: of Auto ones no type says over how many devices the rows are spread."""
    mesh = line(EXPLICIT)
    batch = jax.device_put((jnp.ones((32, 64)), jnp.ones((32, 8))), on(mesh, "data"))
    carry = fs.init_carry({"a": jnp.ones((64, 4)), "b": jnp.ones((4, 8))}, {}, TX, sharding=on(mesh))
    with pytest.raises(fs.SignatureError) as caught:
        fs.jit_step(fs.with_optimizer(two_layers, TX, microbatches=8))(carry, batch)
    assert str(caught.value) == (
        "value_and_grad(loss_fn, microbatches=...): each of 8 microbatches must give every device of its mesh axes the "
        "same number of rows\n"
        "  got:\n"
        "    batch[0]: f32[32@data,64], 4 rows a microbatch on 8 devices\n"
        "    batch[1]: f32[32@data,8], 4 rows a microbatch on 8 devices\n"
        "  likely cause: the batch is too small for so many microbatches on so many devices\n"
        "  fix: as many rows as a multiple of 8 times the size of those axes, or fewer microbatches"
    )


EXPLICIT_FIX = (
    "  fix: with_optimizer(jax.sharding.auto_axes(loss_fn, out_sharding=NamedSharding(mesh, PartitionSpec())), tx); "
    "or jax.make_mesh(..., axis_types=(AxisType.Auto,))"
)
UNTOLD = "value_and_grad(loss_fn): on a mesh of Explicit axes each operation of the loss must say where its result lies"


@pytest.mark.parametrize("mapped", [False, True], ids=["whole", "vmap"])
def test_weights_that_nothing_says_to_gather_are_named(mapped: bool) -> None:
    mesh, model = line(EXPLICIT), nn.Dense(8)
    apply: Any = fs.vmap_stateful(fs.with_mutable(model)) if mapped else fs.with_mutable(model)
    variables = model.init(KEY, X)
    carry = fs.init_carry(*fs.split_params(jax.device_put(variables, by_shape(mesh, variables))), TX)
    batch = jax.device_put(BATCH, on(mesh, "data"))

    def loss_fn(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
        out, state = apply(params, state, batch[0])
        return (out**2).mean(), state

    with pytest.raises(fs.SignatureError) as caught:
        fs.jit_step(fs.with_optimizer(loss_fn, TX)).lower(carry, batch)
    assert str(caught.value) == (
        f"{UNTOLD}\n"
        "  got:\n"
        "    params['bias']: f32[8@data]\n"
        "    batch[0]: f32[32@data,10]\n"
        "    batch[1]: f32[32@data,1]\n"
        f"    {type(caught.value.__cause__).__name__} in loss_fn\n"
        "  likely cause: params are split along an axis of the mesh, and nothing says where they are gathered\n"
        f"{EXPLICIT_FIX}"
    )
    fs.jit_step(fs.with_optimizer(told(loss_fn, mesh), TX), like=carry).lower(carry, batch)


def untold(mesh: Mesh) -> tuple[fs.Carry, Any, Any]:
    """A loss with Linen's dropout over the whole batch, which draws its mask on no axis."""
    model = nn.Dropout(0.5, deterministic=False)
    apply = fs.with_rngs(fs.with_mutable(model))

    def loss_fn(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
        out, state = apply({}, state, batch[0] * params["w"])
        return optax.l2_loss(out.mean(-1, keepdims=True), batch[1]).mean(), state

    carry = fs.init_carry({"w": jnp.ones(10)}, fs.rng_state(dropout=KEY), TX, sharding=on(mesh))
    return carry, loss_fn, jax.device_put(BATCH, on(mesh, "data"))


@pytest.mark.skipif(jax.__version_info__ < (0, 7), reason="google/flax#5209: its mask is not refused there")
def test_a_mask_that_lies_elsewhere_is_named() -> None:
    carry, loss_fn, batch = untold(line(EXPLICIT))
    with pytest.raises(fs.SignatureError) as caught:
        fs.jit_step(fs.with_optimizer(loss_fn, TX)).lower(carry, batch)
    assert str(caught.value) == (
        f"{UNTOLD}\n"
        "  got:\n"
        "    batch[0]: f32[32@data,10]\n"
        "    batch[1]: f32[32@data,1]\n"
        "    ShardingTypeError in loss_fn\n"
        "  likely cause: a mask lies elsewhere than what it masks, as that of nn.Dropout does (google/flax#5209)\n"
        f"{EXPLICIT_FIX}"
    )
    fs.jit_step(fs.with_optimizer(told(loss_fn, line(EXPLICIT)), TX), like=carry).lower(carry, batch)


def test_a_mean_over_a_mapped_axis_that_is_split_is_not_lowered_by_jax() -> None:
    """By hand too: `jax.vmap(lambda x: jax.lax.pmean(x, "batch"), axis_name="batch")`. The day it is, docs change."""
    x = jax.device_put(jnp.ones((8, 4)), on(line(EXPLICIT), "data"))
    mapped = jax.jit(jax.vmap(lambda row: jax.lax.pmean(row, "batch"), axis_name="batch"))
    with pytest.raises(ValueError, match=r"sharding\.spec|Sharding spec"):
        mapped.lower(x)


@KINDS
def test_a_loss_that_fails_of_itself_is_not_spoken_of(kind: AxisType) -> None:
    def loss_fn(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
        raise KeyError("my own")

    carry, batch = laid_out("DP", line(kind))
    with pytest.raises(KeyError, match="my own"):
        fs.with_optimizer(loss_fn, TX)(carry, batch)


# shard_map: the axis has a name, per-device BatchNorm is synced by it, gradients are averaged over it


def sharded_map(step: Any, mesh: Mesh = LINE, **options: Any) -> Any:
    """A step over each device's own part of the batch."""
    return jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P()), **options)


def named(apply: Any) -> Any:
    """The loss function of an apply function, on a part of the batch."""

    def loss_fn(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
        out, state = apply(params, state, batch[0], train=True)
        return optax.l2_loss(out, batch[1]).mean(), state

    return loss_fn


SYNCED = {
    "batched": fs.with_mutable(MLP(axis_name="data")),
    "vmapped": fs.vmap_stateful(fs.with_mutable(MLP(axis_name=("data", "batch"))), axis_name="batch"),
}


@KINDS
@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("form", SYNCED)
def test_batch_norm_synced_under_shard_map(form: str, microbatches: int, kind: AxisType) -> None:
    def whole(params: Any, state: Any, batch: Any) -> Any:
        return named(fs.with_mutable(MLP(axis_name=None)))(params, state, batch)

    params, state = fs.split_params(MLP(axis_name=None).init(KEY, X))
    start = fs.init_carry(params, state | {"ema": params}, SGD)
    local = fs.with_optimizer(named(SYNCED[form]), SGD, axis_name="data", microbatches=microbatches)
    # JAX marks what varies along a mesh axis, not along vmap's: one pmean over both fails that check, and needs it off
    mesh = line(kind)
    step = sharded_map(fs.with_ema(local, decay=0.9), mesh, check_vma=form == "batched")
    step.__name__ = "shard_map"
    carry = jax.tree.map(jnp.copy, jax.device_put(start, on(mesh)))
    jitted = fs.jit_step(step, like=carry)
    loss: Any = None
    with fs.compile_log() as log:
        for _ in range(20):
            carry, loss = jitted(carry, jax.device_put(BATCH, on(mesh, "data")))
    assert log.compiles["shard_map"] == 1
    single, expected = run(
        fs.with_ema(fs.with_optimizer(whole, SGD, microbatches=microbatches), decay=0.9), start, BATCH, 20
    )
    assert_close((carry, loss), (single, expected), 2e-3)


@KINDS
def test_scan_under_shard_map(kind: AxisType) -> None:
    mesh = line(kind)
    params, state = fs.split_params(MLP(axis_name="data").init(KEY, X, train=False))
    step = fs.with_optimizer(named(SYNCED["batched"]), SGD, axis_name="data")
    scanned = jax.shard_map(fs.scan_steps(step), mesh=mesh, in_specs=(P(), P(None, "data")), out_specs=(P(), P()))
    stacked = jax.device_put(jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), BATCH), on(mesh, None, "data"))
    batch = jax.device_put(BATCH, on(mesh, "data"))
    start = fs.init_carry(params, state, SGD)
    carry, losses = jax.jit(scanned)(jax.device_put(start, on(mesh)), stacked)
    loop, loss = jax.device_put(start, on(mesh)), None
    for _ in range(3):
        loop, loss = jax.jit(sharded_map(step, mesh))(loop, batch)
    assert_close((carry, losses[-1]), (loop, loss))


@KINDS
@pytest.mark.parametrize("axis_name", [None, "data"])
def test_dropout_under_shard_map_draws_per_device_where_told_to(axis_name: str | None, kind: AxisType) -> None:
    apply = fs.with_rngs(fs.with_mutable(nn.Dropout(0.5, deterministic=False)), axis_name=axis_name)
    state = fs.rng_state(dropout=jax.random.key(1))

    def draw(state: Any, x: jax.Array) -> Any:
        return apply({}, state, x)

    specs: Any = {"mesh": line(kind), "in_specs": (P(), P("data")), "out_specs": (P("data"), P())}
    rows = jax.device_put(jnp.ones((8, 64)), on(line(kind), "data"))
    masks, new_state = jax.jit(jax.shard_map(draw, **specs))(jax.device_put(state, on(line(kind))), rows)
    assert len(np.unique(np.asarray(masks), axis=0)) == (8 if axis_name else 1)
    expected = jax.random.split(state["rngs"]["dropout"])[0]
    assert new_state["rngs"]["dropout"] == expected  # one stream for all


# What the devices say to each other is what they would say by hand, and nothing is copied

_COLLECTIVE = re.compile(r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def compiled(step: Any, carry: fs.Carry, batch: Any) -> Any:
    """The optimized executable of a step with the carry's placement pinned."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, carry)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)).lower(carry, batch).compile()


def by_hand(carry: fs.Carry, batch: Any, mesh: Mesh = LINE) -> tuple[fs.Carry, jax.Array]:
    """The guide's step over the same carry."""

    def objective(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, **state}
        out, updated = MLP(axis_name=None).apply(variables, batch[0], train=True, mutable=["batch_stats"])
        return optax.l2_loss(out, batch[1]).mean(), updated

    objective = told(objective, mesh)
    (loss, updated), grads = jax.value_and_grad(objective, has_aux=True)(carry.params, carry.state, batch)
    updates, opt_state = TX.update(grads, carry.opt_state, carry.params)
    return fs.Carry(carry.step + 1, optax.apply_updates(carry.params, updates), dict(updated), opt_state), loss


@needs_donation
@KINDS
@pytest.mark.parametrize("place", PLACES)
def test_collectives_are_those_of_the_step_by_hand_and_the_carry_is_aliased(place: str, kind: AxisType) -> None:
    params, state = fs.split_params(MLP(axis_name=None).init(KEY, X))
    single = fs.init_carry(params, state, TX)
    carry = jax.device_put(single, PLACES[place](single, kind))
    mesh = carry.step.sharding.mesh
    batch = jax.device_put(BATCH, on(mesh, "data"))
    loss_fn = told(named(fs.with_mutable(MLP(axis_name=None))), mesh)
    ours = compiled(fs.with_optimizer(loss_fn, TX), carry, batch)
    hand = compiled(functools.partial(by_hand, mesh=mesh), carry, batch)
    found = [Counter(_COLLECTIVE.findall(each.as_text())) for each in (ours, hand)]
    assert found[0] == found[1]
    assert found[0].total() > 0
    on_one_device = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(carry)
        for shard in leaf.addressable_shards
        if shard.device.id == 0
    )
    assert ours.memory_analysis().alias_size_in_bytes == on_one_device
    assert hand.memory_analysis().alias_size_in_bytes == on_one_device


# Bad input. What only shows at a dispatch is said by JAX, which names the leaf too


def regression(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
    """A linear loss."""
    return ((batch[0] @ params["w"] - batch[1]) ** 2).mean(), state


def carry_on(mesh: Mesh) -> fs.Carry:
    """A carry of one matrix."""
    return fs.init_carry(jax.device_put({"w": jnp.ones((10, 1))}, on(mesh)), {}, TX)


@pytest.mark.skipif(not hasattr(jax.sharding, "reshard"), reason="the page says it as newer JAX does")
def test_the_lines_that_the_page_shows() -> None:
    page = (pathlib.Path(__file__).parent.parent / "docs" / "sharding.md").read_text()
    lines = dict(re.findall(r"<!-- test: (\w+) -->\n```python\n(.*?)```", page, re.DOTALL))
    mesh = line(EXPLICIT)
    names: dict[str, Any] = {"fs": fs, "jax": jax, "NamedSharding": NamedSharding, "P": P, "mesh": mesh, "tx": TX}
    exec(lines["gathered"], names)  # noqa: S102 (the page's own code)
    gathered = fs.with_optimizer(names["loss_fn"], TX, microbatches=2)
    names["loss_fn"] = lambda params, state, batch: (((batch @ params["w"]) ** 2).mean(), state)
    exec(lines["told"], names)  # noqa: S102
    carry = fs.init_carry({"w": jax.device_put(jnp.ones((8, 4)), on(mesh, "data"))}, {}, TX)
    for step in (gathered, names["step"]):
        after, loss = jax.jit(step)(carry, jax.device_put(jnp.ones((32, 8)), on(mesh, "data")))
        assert after.params["w"].sharding.is_equivalent_to(on(mesh, "data"), 2)
        assert float(loss) == 64


@KINDS
def test_an_axis_that_does_not_exist(kind: AxisType) -> None:
    step = fs.with_optimizer(regression, TX, axis_name="dta")
    batch = jax.device_put(BATCH, on(line(kind), "data"))
    with pytest.raises(fs.SignatureError) as caught:
        jax.jit(sharded_map(step, line(kind)))(carry_on(line(kind)), batch)
    assert str(caught.value) == (
        "value_and_grad(axis_name=...): the axis must be bound by an enclosing shard_map, vmap or pmap\n"
        "  got:\n"
        "    axis_name: 'dta' is not bound here\n"
        "  likely cause: the name is misspelt, or the call is in a plain jit, where the mesh needs no name\n"
        "  fix: jax.shard_map(step, mesh=mesh, ...) over a mesh with that axis; or no axis_name"
    )
    with pytest.raises(fs.SignatureError, match=r"^with_rngs\(axis_name=\.\.\.\): the axis must be bound"):
        fs.with_rngs(fs.with_mutable(nn.Dense(1)), axis_name="data")({}, fs.rng_state(dropout=KEY), X)


@KINDS
def test_a_batch_that_the_mesh_does_not_divide(kind: AxisType) -> None:
    step = fs.with_optimizer(regression, TX, axis_name="data")
    with pytest.raises(ValueError, match=r"args\[1\]\[0\] of shape float32\[30,10\].*parameter 'batch\b"):
        jax.jit(sharded_map(step, line(kind)))(carry_on(line(kind)), jax.tree.map(lambda leaf: leaf[:30], BATCH))


def stepped(kind: AxisType, carry: fs.Carry, batch: Any) -> Any:
    """A step whose carry is to stay on all devices."""
    return fs.jit_step(fs.with_optimizer(regression, TX), like=carry_on(line(kind)))(carry, batch)


@KINDS
def test_a_carry_on_another_mesh_than_like(kind: AxisType) -> None:
    carry, like = carry_on(line(kind, 4)), carry_on(line(kind))
    with pytest.raises(fs.SignatureError) as caught:
        stepped(kind, carry, jax.device_put(BATCH, on(line(kind, 4), "data")))
    assert str(caught.value) == (
        "jit_step(like=...): the carry must come on the mesh of like (carry -> like)\n"
        "  got:\n"
        "    carry.step: i32[], mesh(data=4) -> mesh(data=8)\n"
        "    carry.params['w']: f32[10,1], mesh(data=4) -> mesh(data=8)\n"
        "    carry.opt_state[0].count: i32[], mesh(data=4) -> mesh(data=8)\n"
        "    carry.opt_state[0].mu['w']: f32[10,1], mesh(data=4) -> mesh(data=8)\n"
        "    carry.opt_state[0].nu['w']: f32[10,1], mesh(data=4) -> mesh(data=8)\n"
        "  likely cause: the carry was made or restored on another mesh than like\n"
        "  fix: carry = adopt_carry(carry, like)"
    )
    stepped(kind, fs.adopt_carry(carry, like), jax.device_put(BATCH, on(line(kind), "data")))
    with pytest.raises(fs.SignatureError) as alone:  # a step that returns its carry alone
        fs.jit_step(lambda carry, batch: carry._replace(step=carry.step + 1), like=like)(carry, ())
    assert alone.value.leaves == caught.value.leaves


BY_NAME = fs.with_optimizer(regression, TX, axis_name="data")
MADE = "init_carry(params, state, tx, sharding=NamedSharding(mesh, PartitionSpec()))"


@KINDS
@pytest.mark.parametrize("mapped", [True, False], ids=["shard_map", "jit"])
def test_like_on_one_device_for_a_step_on_a_mesh(kind: AxisType, mapped: bool) -> None:
    mesh = line(kind, 2)
    step: Any = fs.with_optimizer(regression, TX)
    if mapped:
        step = jax.shard_map(BY_NAME, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P()))
    params, state, batch = {"w": jnp.ones((10, 1))}, dict[str, Any](), jax.device_put(BATCH, on(mesh, "data"))
    carry = fs.init_carry(params, state, TX)
    with pytest.raises(fs.SignatureError) as caught:
        fs.jit_step(step, like=carry)(carry, batch)
    if kind == AUTO or mapped:  # of Explicit axes, value_and_grad says it first
        assert str(caught.value) == (
            "jit_step(like=...): like must lie on the mesh that the step runs on (like -> the step)\n"
            "  got:\n"
            "    like.step: i32[], cpu:0 -> mesh(data=2)\n"
            "    like.params['w']: f32[10,1], cpu:0 -> mesh(data=2)\n"
            "    like.opt_state[0].count: i32[], cpu:0 -> mesh(data=2)\n"
            "    like.opt_state[0].mu['w']: f32[10,1], cpu:0 -> mesh(data=2)\n"
            "    like.opt_state[0].nu['w']: f32[10,1], cpu:0 -> mesh(data=2)\n"
            "  likely cause: the carry was made for one device; the batch, or a shard_map in the step, is on a mesh\n"
            f"  fix: {MADE}"
        )
    names: dict[str, Any] = {"params": params, "state": state, "tx": TX, "mesh": mesh, "PartitionSpec": P}
    carry = eval(MADE, names | {"init_carry": fs.init_carry, "NamedSharding": NamedSharding})  # noqa: S307 (as printed)
    run(step, carry, batch)


def test_a_carry_made_for_one_device_in_a_jit_of_ones_own() -> None:
    """`init_carry` commits: JAX then refuses a mapped step by the leaf's name, and nothing of ours runs before it."""
    mesh = line(AUTO, 2)
    mapped: Any = jax.shard_map(BY_NAME, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P()))
    carry = fs.init_carry({"w": jnp.ones((10, 1))}, {}, TX)
    with pytest.raises(ValueError, match=r"incompatible devices.* carry\.step "):
        jax.jit(mapped)(carry, BATCH)
    with pytest.raises(fs.SignatureError) as caught:
        fs.explain_step(mapped, carry, BATCH)
    assert str(caught.value) == (
        "explain_step(step): carry, batch and step must be on the same devices\n"
        "  got:\n"
        "    carry.step: i32[], cpu:0\n"
        "    carry.params['w']: f32[10,1], cpu:0\n"
        "    carry.opt_state[0].count: i32[], cpu:0\n"
        "    carry.opt_state[0].mu['w']: f32[10,1], cpu:0\n"
        "    carry.opt_state[0].nu['w']: f32[10,1], cpu:0\n"
        "  likely cause: the carry was made for one device; the batch, or a shard_map in the step, is on a mesh\n"
        f"  fix: {ONTO}"
    )
    carry = jax.device_put(carry, NamedSharding(mesh, P()))  # the fix
    assert fs.explain_step(mapped, carry, BATCH).devices == 2
    jax.jit(mapped)(carry, BATCH)


APART = "value_and_grad(loss_fn): on a mesh of Explicit axes the carry and the batch must lie on one mesh"
ONTO = "carry = jax.device_put(carry, NamedSharding(mesh, PartitionSpec()))"


@pytest.mark.parametrize("carry_place", ["half", "one device"])
def test_a_carry_that_does_not_lie_on_the_mesh_of_the_batch(carry_place: str) -> None:
    mesh, is_half = line(EXPLICIT), carry_place == "half"
    batch = jax.device_put(BATCH, on(mesh, "data"))
    carry = carry_on(line(EXPLICIT, 4)) if is_half else fs.init_carry({"w": jnp.ones((10, 1))}, {}, TX)
    with pytest.raises(fs.SignatureError) as caught:
        fs.jit_step(fs.with_optimizer(regression, TX), donate=False)(carry, batch)
    assert str(caught.value) == (
        f"{APART}\n"
        "  got:\n"
        "    batch[0]: f32[32@data,10], mesh(data=8)\n"
        "    batch[1]: f32[32@data,1], mesh(data=8)\n"
        f"    params['w']: f32[10,1], {'mesh(data=4)' if is_half else 'no mesh'}\n"
        "  likely cause: the carry was "
        f"{'placed on another mesh than the batch' if is_half else 'made on one device, and not placed on the mesh'}\n"
        f"  fix: {ONTO}"
    )
    names: dict[str, Any] = {"carry": carry, "jax": jax, "mesh": mesh, "NamedSharding": NamedSharding}
    names["PartitionSpec"] = P
    exec(ONTO, names)  # noqa: S102 (the fix as it is printed)
    run(fs.with_optimizer(regression, TX), names["carry"], batch)


@pytest.mark.skipif(jax.__version_info__ >= (0, 7), reason="newer JAX places such a batch on every device")
def test_a_batch_on_no_mesh() -> None:
    mesh = line(EXPLICIT)
    carry, step = carry_on(mesh), fs.with_optimizer(regression, TX)
    with pytest.raises(fs.SignatureError) as caught:
        fs.jit_step(step, donate=False)(carry, BATCH)
    assert str(caught.value) == (
        f"{APART}\n"
        "  got:\n"
        "    batch[0]: f32[32,10], no mesh\n"
        "    batch[1]: f32[32,1], no mesh\n"
        "    params['w']: f32[10,1], mesh(data=8)\n"
        "  likely cause: the batch was left on one device\n"
        "  fix: jit_step(step, like=carry, batch=NamedSharding(mesh, PartitionSpec('data')))"
    )
    fs.jit_step(step, like=carry, batch=on(mesh, "data"), donate=False)(carry, BATCH)


@KINDS
def test_a_batch_left_on_one_device(kind: AxisType) -> None:
    batch = jax.device_put(BATCH, on(line(kind), "data"))
    with pytest.raises(ValueError, match=r"batch\[1\]"):
        stepped(kind, carry_on(line(kind)), (batch[0], jax.device_put(Y, jax.devices()[1])))


def test_a_leaf_of_the_carry_left_on_one_device() -> None:
    batch, alone = jax.device_put(BATCH, on(LINE, "data")), jax.device_put(jnp.ones((10, 1)), jax.devices()[1])
    with pytest.raises(ValueError, match=r"carry\.params\['w'\]"):
        stepped(AUTO, carry_on(LINE)._replace(params={"w": alone}), batch)


@KINDS
def test_init_carry_takes_a_leaf_left_on_one_device_to_the_mesh(kind: AxisType) -> None:
    w, b = jax.device_put(jnp.ones((10, 1)), on(line(kind))), jax.device_put(jnp.ones(1), jax.devices()[1])
    assert {*placement(fs.init_carry({"w": w, "b": b}, {}, TX))} == {on(line(kind))}
