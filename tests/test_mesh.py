"""Law 8: on a mesh of eight devices a step equals the single-device step to rounding, and compiles once."""

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
from .models import MLP, Dropping, X, Y, structure
from .test_traces import MODELS, loss_of

pytestmark = needs_jit
KEY = jax.random.key(0)
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
LINE = jax.make_mesh((8,), ("data",), axis_types=(AUTO,))
GRID = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AUTO, AUTO))
BATCH = (X, Y)
TX = optax.adam(1e-2)


def on(mesh: Mesh, *spec: str | None) -> NamedSharding:
    """A placement."""
    return NamedSharding(mesh, P(*spec))


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


def placement(carry: Any) -> list[Any]:
    """Where every leaf lives."""
    return [leaf.sharding for leaf in jax.tree.leaves(carry)]


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


# No bias before BatchNorm: it cancels it, and optimizers that divide by the gradient's size would blow up the rounding
UNBIASED = Dropping(use_bias=False)
SGD = optax.sgd(0.05, momentum=0.9)


def dropping_step(tx: optax.GradientTransformation, **options: Any) -> Any:
    """A step over BatchNorm, dropout and an average."""
    apply = fs.with_rngs(fs.vmap_stateful(fs.with_mutable(UNBIASED)))
    return fs.with_ema(fs.with_optimizer(loss_of(apply), tx, **options), decay=0.9)


def dropping_carry(tx: optax.GradientTransformation) -> fs.Carry:
    """Its carry."""
    params, state = fs.split_params(UNBIASED.init(KEY, X[0], train=False))
    return fs.init_carry(params, state | fs.rng_state(dropout=jax.random.key(1)) | {"ema": params}, tx)


# Sharded jit: the mesh is seen by XLA only


@pytest.mark.parametrize("name", some.OPTIMIZERS)
def test_every_optimizer_on_a_mesh(name: str) -> None:
    tx = some.OPTIMIZERS[name]
    step, single = dropping_step(tx), dropping_carry(tx)
    sharded = jax.device_put(single, by_shape(LINE, single))
    assert sharded.params["head"]["kernel"].sharding.spec == P("data")
    sharded, loss = run(step, sharded, jax.device_put(BATCH, on(LINE, "data")), like=sharded)
    single, expected = run(step, single, BATCH)
    assert_close((sharded, loss), (single, expected))


def averaged(name: str) -> tuple[Any, Any]:
    """The step and the carry of one model, with momentum and an average."""
    apply, variables = MODELS[name]()
    params, state = fs.split_params(variables)
    state |= fs.rng_state(dropout=jax.random.key(1)) if name == "Dropping" else {}
    step = fs.with_ema(fs.with_optimizer(loss_of(apply), SGD), decay=0.9)
    return step, fs.init_carry(params, state | {"ema": params}, SGD)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_on_a_mesh(name: str) -> None:
    step, single = averaged(name)
    sharded = jax.device_put(single, by_shape(LINE, single))
    sharded, loss = run(step, sharded, jax.device_put(BATCH, on(LINE, "data")), like=sharded)
    single, expected = run(step, single, BATCH)
    assert_close((sharded, loss), (single, expected))


PLACES = {
    "replicated": lambda tree: jax.tree.map(lambda leaf: on(LINE), tree),
    "fsdp": lambda tree: by_shape(LINE, tree),
    "2-D": lambda tree: jax.tree.map(
        lambda leaf: on(GRID, None, "model") if leaf.ndim == 2 and leaf.shape[1] % 2 == 0 else on(GRID), tree
    ),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("way", ["step", "microbatches", "scan"])
def test_one_compile_for_every_placement(place: str, way: str) -> None:
    single = dropping_carry(TX)
    sharded = jax.device_put(single, PLACES[place](single))
    mesh = sharded.step.sharding.mesh
    batch, spec = (
        (jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), BATCH), (None, "data"))
        if way == "scan"
        else (BATCH, ("data",))
    )
    step = dropping_step(TX, microbatches=4 if way == "microbatches" else 1)
    step = fs.scan_steps(step) if way == "scan" else step
    sharded, loss = run(step, sharded, jax.device_put(batch, on(mesh, *spec)), count=20, like=sharded)
    single, expected = run(step, single, batch, count=20)
    assert int(sharded.step) == (60 if way == "scan" else 20)
    np.testing.assert_allclose(loss, expected, rtol=5e-3, atol=1e-5)


def test_optimizer_state_follows_its_params() -> None:
    params, state = fs.split_params(MLP().init(KEY, X[0]))
    carry = fs.init_carry(jax.device_put(params, by_shape(LINE, params)), state, TX)
    for moment in (carry.opt_state[0].mu, carry.opt_state[0].nu):
        assert placement(moment) == placement(carry.params)
    assert carry.params["Dense_1"]["kernel"].sharding.spec == P("data")
    assert {sharding.spec for sharding in placement((carry.step, carry.state, carry.opt_state[0].count))} == {P()}


@pytest.mark.parametrize("kind", ["Partitioned", "LogicallyPartitioned"])
def test_metadata_yields_the_shardings_and_survives(kind: str, tmp_path: pathlib.Path) -> None:
    logical = kind == "LogicallyPartitioned"
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
    shardings = nn.spmd.logical_to_mesh_sharding(specs, GRID, rules) if logical else nn.get_sharding(abstract, GRID)
    carry = jax.jit(init, out_shardings=shardings)(KEY)

    step = fs.with_ema(fs.with_optimizer(loss_of(fs.with_mutable(Boxed())), TX), decay=0.9)
    batch = jax.device_put(BATCH, on(GRID, "data"))
    carry, _ = run(step, carry, batch, like=carry)
    carry, _ = run(fs.scan_steps(step), carry, jax.tree.map(lambda leaf: leaf[None], batch), 1, like=carry)
    single = jax.tree.map(jnp.copy, jax.device_put(init(KEY), jax.devices()[0]))
    single, _ = run(step, single, BATCH, 5)
    assert_close(carry, single)
    for tree in (carry.params, carry.state["ema"], carry.opt_state[0].mu, carry.opt_state[0].nu):
        kernel = tree["Dense_0"]["kernel"]
        assert type(kernel).__name__ == kind
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


def test_a_checkpoint_moves_to_another_mesh() -> None:
    single = dropping_carry(TX)
    line = jax.device_put(single, by_shape(LINE, single))
    line, _ = run(dropping_step(TX), line, jax.device_put(BATCH, on(LINE, "data")), like=line)
    grid = jax.device_put(single, PLACES["2-D"](single))
    adopted = fs.adopt_carry(line, grid)
    assert placement(adopted) == placement(grid)
    assert_close(adopted, line, 0)
    run(dropping_step(TX), adopted, jax.device_put(BATCH, on(GRID, "data")), like=grid)


def test_explicit_axis_types() -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(EXPLICIT,))
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


def two_layers(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
    """Two layers, so that rows stand in four of five products of matrices."""
    x, y = batch
    return ((jnp.tanh(x @ params["a"]) @ params["b"] - y) ** 2).mean(), state


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_each_device_computes_its_own_rows_of_a_microbatch(kind: Any, count: int) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    params = {"a": jnp.full((64, 512), 0.01), "b": jnp.full((512, 8), 0.01)}
    batch = jax.device_put((jnp.ones((1024, 64)), jnp.ones((1024, 8))), on(mesh, "data"))
    carry = fs.init_carry(params, {}, TX, sharding=on(mesh))
    step = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(two_layers, TX, microbatches=count)), like=carry)
    text = step.lower(carry, batch).compile().as_text() or ""
    rows = [int(found) for found in re.findall(r"= f32\[(\d+),\d+\]\S* dot\(", text)]
    assert sorted(rows) == sorted([1024 // 8 // count] * 3 + [8, 512])  # those of 8 and 512 are gradients
    assert not re.search(r" (all-gather|all-to-all|collective-permute)\(", text)
    assert len(re.findall(r" all-reduce\(", text)) in (1, 3)  # of two gradients and a loss; older XLA joins them not
    for _ in range(3):
        carry, _ = step(carry, batch)


def test_blocks_of_rows_would_gather_the_batch() -> None:
    """What the test above guards against: the split that first comes to mind."""

    def in_blocks(params: Any, batch: Any) -> Any:
        parts = jax.tree.map(lambda leaf: leaf.reshape(4, 256, -1), batch)
        return jax.lax.scan(lambda _, part: ((), two_layers(params, {}, part)[0]), (), parts)[1].mean()

    params = jax.device_put({"a": jnp.full((64, 512), 0.01), "b": jnp.full((512, 8), 0.01)}, on(LINE))
    batch = jax.device_put((jnp.ones((1024, 64)), jnp.ones((1024, 8))), on(LINE, "data"))
    text = jax.jit(jax.grad(in_blocks)).lower(params, batch).compile().as_text() or ""
    rows = [int(found) for found in re.findall(r"= f32\[(\d+),\d+\]\S* dot\(", text)]
    assert max(each for each in rows if each != 512) > 1024 // 8 // 4


def test_rows_that_leave_a_device_without_some() -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(EXPLICIT,))
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
        "  fix: a number of rows that 8 times the size of those axes divides, or fewer microbatches"
    )


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


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("form", SYNCED)
def test_batch_norm_synced_under_shard_map(form: str, microbatches: int) -> None:
    def whole(params: Any, state: Any, batch: Any) -> Any:
        return named(fs.with_mutable(MLP(axis_name=None)))(params, state, batch)

    params, state = fs.split_params(MLP(axis_name=None).init(KEY, X))
    start = fs.init_carry(params, state | {"ema": params}, SGD)
    local = fs.with_optimizer(named(SYNCED[form]), SGD, axis_name="data", microbatches=microbatches)
    # JAX marks what varies along a mesh axis, not along vmap's: one pmean over both fails that check, and needs it off
    step = sharded_map(fs.with_ema(local, decay=0.9), check_vma=form == "batched")
    step.__name__ = "shard_map"
    carry = jax.tree.map(jnp.copy, jax.device_put(start, on(LINE)))
    jitted = fs.jit_step(step, like=carry)
    loss: Any = None
    with fs.compile_log() as log:
        for _ in range(20):
            carry, loss = jitted(carry, jax.device_put(BATCH, on(LINE, "data")))
    assert max(log.compiles.values()) == 1
    single, expected = run(
        fs.with_ema(fs.with_optimizer(whole, SGD, microbatches=microbatches), decay=0.9), start, BATCH, 20
    )
    assert_close((carry, loss), (single, expected), 2e-3)


def test_scan_under_shard_map() -> None:
    params, state = fs.split_params(MLP(axis_name="data").init(KEY, X, train=False))
    step = fs.with_optimizer(named(SYNCED["batched"]), SGD, axis_name="data")
    scanned = jax.shard_map(fs.scan_steps(step), mesh=LINE, in_specs=(P(), P(None, "data")), out_specs=(P(), P()))
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), BATCH)
    start = fs.init_carry(params, state, SGD)
    carry, losses = jax.jit(scanned)(jax.device_put(start, on(LINE)), stacked)
    loop, loss = jax.device_put(start, on(LINE)), None
    for _ in range(3):
        loop, loss = jax.jit(sharded_map(step))(loop, BATCH)
    assert_close((carry, losses[-1]), (loop, loss))


@pytest.mark.parametrize("axis_name", [None, "data"])
def test_dropout_under_shard_map_draws_per_device_where_told_to(axis_name: str | None) -> None:
    apply = fs.with_rngs(fs.with_mutable(nn.Dropout(0.5, deterministic=False)), axis_name=axis_name)
    state = fs.rng_state(dropout=jax.random.key(1))

    def draw(state: Any, x: jax.Array) -> Any:
        return apply({}, state, x)

    specs: Any = {"mesh": LINE, "in_specs": (P(), P("data")), "out_specs": (P("data"), P())}
    masks, new_state = jax.jit(jax.shard_map(draw, **specs))(state, jnp.ones((8, 64)))
    assert len(np.unique(np.asarray(masks), axis=0)) == (8 if axis_name else 1)
    expected = jax.random.split(state["rngs"]["dropout"])[0]
    assert new_state["rngs"]["dropout"] == expected  # one stream for all


# What the devices say to each other is what they would say by hand, and nothing is copied

_COLLECTIVE = re.compile(r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def compiled(step: Any, carry: fs.Carry, batch: Any) -> Any:
    """The optimized executable of a step with the carry's placement pinned."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, carry)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)).lower(carry, batch).compile()


def by_hand(carry: fs.Carry, batch: Any) -> tuple[fs.Carry, jax.Array]:
    """The guide's step over the same carry."""

    def objective(params: Any) -> tuple[jax.Array, Any]:
        out, updated = MLP(axis_name=None).apply(
            {"params": params, **carry.state}, batch[0], train=True, mutable=["batch_stats"]
        )
        return optax.l2_loss(out, batch[1]).mean(), updated

    (loss, updated), grads = jax.value_and_grad(objective, has_aux=True)(carry.params)
    updates, opt_state = TX.update(grads, carry.opt_state, carry.params)
    return fs.Carry(carry.step + 1, optax.apply_updates(carry.params, updates), dict(updated), opt_state), loss


@needs_donation
@pytest.mark.parametrize("place", PLACES)
def test_collectives_are_those_of_the_step_by_hand_and_the_carry_is_aliased(place: str) -> None:
    params, state = fs.split_params(MLP(axis_name=None).init(KEY, X))
    single = fs.init_carry(params, state, TX)
    carry = jax.device_put(single, PLACES[place](single))
    batch = jax.device_put(BATCH, on(carry.step.sharding.mesh, "data"))
    ours = compiled(fs.with_optimizer(named(fs.with_mutable(MLP(axis_name=None))), TX), carry, batch)
    hand = compiled(by_hand, carry, batch)
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


def test_an_axis_that_does_not_exist() -> None:
    step = fs.with_optimizer(regression, TX, axis_name="dta")
    with pytest.raises(fs.SignatureError) as caught:
        jax.jit(sharded_map(step))(carry_on(LINE), BATCH)
    assert str(caught.value) == (
        "value_and_grad(axis_name=...): the axis must be bound by an enclosing shard_map, vmap or pmap\n"
        "  got:\n"
        "    axis_name: 'dta' is not bound here\n"
        "  likely cause: the name is misspelt, or the call is in a plain jit, where the mesh needs no name\n"
        "  fix: jax.shard_map(step, mesh=mesh, ...) over a mesh with that axis; or no axis_name"
    )
    with pytest.raises(fs.SignatureError, match=r"^with_rngs\(axis_name=\.\.\.\): the axis must be bound"):
        fs.with_rngs(fs.with_mutable(nn.Dense(1)), axis_name="data")({}, fs.rng_state(dropout=KEY), X)


def test_a_batch_that_the_mesh_does_not_divide() -> None:
    step = fs.with_optimizer(regression, TX, axis_name="data")
    with pytest.raises(ValueError, match=r"args\[1\]\[0\] of shape float32\[30,10\].*parameter 'batch\b"):
        jax.jit(sharded_map(step))(carry_on(LINE), jax.tree.map(lambda leaf: leaf[:30], BATCH))


def test_a_carry_on_another_mesh_than_like() -> None:
    half = jax.make_mesh((4,), ("data",), axis_types=(AUTO,), devices=jax.devices()[:4])
    step = fs.jit_step(fs.with_optimizer(regression, TX), like=carry_on(LINE))
    with pytest.raises(ValueError, match=r"incompatible devices.*carry\.step"):
        step(carry_on(half), jax.device_put(BATCH, on(half, "data")))


@pytest.mark.parametrize("where", ["batch", "carry"])
def test_a_leaf_left_on_one_device(where: str) -> None:
    carry, batch = carry_on(LINE), jax.device_put(BATCH, on(LINE, "data"))
    alone = jax.devices()[1]
    if where == "batch":
        batch = (batch[0], jax.device_put(Y, alone))
    else:
        carry = carry._replace(params=jax.device_put(jax.device_get(carry.params), alone))
    with pytest.raises(ValueError, match=r"batch\[1\]" if where == "batch" else r"carry\.params\['w'\]"):
        fs.jit_step(fs.with_optimizer(regression, TX), like=carry_on(LINE))(carry, batch)


def test_init_carry_takes_a_leaf_left_on_one_device_to_the_mesh() -> None:
    carry = fs.init_carry(
        {"w": jax.device_put(jnp.ones((10, 1)), on(LINE)), "b": jax.device_put(jnp.ones(1), jax.devices()[1])}, {}, TX
    )
    assert {leaf.sharding for leaf in jax.tree.leaves(carry)} == {on(LINE)}
