"""`jit_step(batch=...)`: a batch is cut over the mesh as it arrives, and no device computes another one's rows."""

import logging
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flaxsplit as fs

from .flags import needs_jit, needs_x32
from .meshes import AUTO, EXPLICIT, KINDS, line

pytestmark = needs_jit
TX = optax.adam(0.1)
ROWS, WIDTH = 64, 32
HOST = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)


def loss_fn(params: Any, state: Any, batch: Any, scale: Any = 1.0) -> Any:
    """A layer's loss; a batch may hold more than is asked for."""
    x = batch["x"] if isinstance(batch, dict) else batch
    out, state = fs.with_mutable(nn.Dense(WIDTH))(params, state, x)
    return scale * (out**2).mean(), state


def carry_on(mesh: Any) -> fs.Carry:
    """A carry that every device has whole."""
    variables = nn.Dense(WIDTH).init(jax.random.key(0), HOST)
    return fs.init_carry(*fs.split_params(variables), TX, sharding=NamedSharding(mesh, P()))


@KINDS
@pytest.mark.parametrize("microbatches", [1, 2])
def test_each_device_computes_its_share_of_a_host_batch(kind: AxisType, microbatches: int) -> None:
    step = fs.with_optimizer(loss_fn, TX, microbatches=microbatches)
    flops = {}
    for name, mesh in {"whole": line(AUTO), "cut": line(kind)}.items():
        carry, cut = carry_on(mesh), NamedSharding(mesh, P("data"))
        options: Any = {"batch": cut} if name == "cut" else {}
        compiled = fs.jit_step(step, like=carry, donate=False, **options).lower(carry, HOST).compile()
        found: Any = compiled.cost_analysis()
        flops[name] = (found[0] if isinstance(found, list) else found)["flops"]
        given = compiled.input_shardings[0][1]
        assert given.is_equivalent_to(cut, 2) == (name == "cut")
        assert "all-gather" not in str(compiled.as_text())
    update = 16 * WIDTH * WIDTH  # Adam's own, on each device, generously
    assert flops["cut"] <= flops["whole"] / 8 + update


@KINDS
def test_every_axis_of_a_leaf_may_be_named(kind: AxisType) -> None:
    """Also the only one, as of labels."""

    def step(carry: Any, batch: Any) -> Any:
        return carry + batch.sum(), batch * 2

    mesh = line(kind, 2)
    carry = jax.device_put(jnp.zeros(()), NamedSharding(mesh, P()))
    _, out = fs.jit_step(step, batch=NamedSharding(mesh, P("data")))(carry, np.arange(4.0, dtype=np.float32))
    assert out.sharding.shard_shape(out.shape) == (2,)


@KINDS
def test_a_mesh_of_one_device_is_that_device(kind: AxisType) -> None:
    mesh = line(kind, 1)
    carry, batch = (jax.device_put(jnp.zeros(2), place) for place in (jax.devices()[0], NamedSharding(mesh, P())))
    step: Any = fs.jit_step(lambda carry, batch: (carry + 1, batch), like=carry)
    assert step(carry, batch)[0].tolist() == [1, 1]


@KINDS
def test_the_log_says_that_a_batch_is_whole_on_every_device(kind: AxisType, capfd: Any) -> None:
    """Nobody else notices. It says nothing of what was placed, whole or split, and of a single device."""
    if kind is EXPLICIT and jax.__version_info__ < (0, 7):
        pytest.skip("such a batch is refused there, by name: test_mesh")
    fix = "jit_step(step, like=carry, batch=sharding) splits a batch"
    words = f"loss_fn: f32[{ROWS},{WIDTH}]: whole on each of 2 devices; {fix}"
    step, mesh = fs.with_optimizer(loss_fn, TX), line(kind, 2)
    rows, logger = NamedSharding(mesh, P("data")), logging.getLogger("jax._src.interpreters.pxla")
    alone = fs.init_carry(*fs.split_params(nn.Dense(WIDTH).init(jax.random.key(0), HOST)), TX)
    before = logger.level, [*logger.filters]
    cases: list[tuple[Any, Any, Any, list[str]]] = [
        (carry_on(mesh), HOST, {}, [words]),
        (carry_on(mesh), HOST, {"batch": rows}, []),
        (carry_on(mesh), jax.device_put(HOST, rows), {}, []),
        (alone, HOST, {}, []),
        (alone, HOST, {"like": None}, []),
        (jax.device_get(alone), HOST, {"like": None}, []),
    ]
    for carry, batch, options, expected in cases:
        with fs.compile_log() as outer, fs.compile_log() as inner:
            fs.jit_step(step, **{"like": carry, "donate": False} | options)(carry, batch)
        for log in (outer, inner):
            assert str(log).splitlines()[1 + len(log.traces | log.compiles) :] == expected
    with fs.compile_log() as log:  # on one device first, under the same name
        fs.jit_step(step, like=alone, donate=False)(alone, HOST)
        fs.jit_step(step, like=carry_on(mesh))(carry_on(mesh), HOST)
    assert [*log.unplaced] == ["loss_fn"]
    assert (logger.level, [*logger.filters]) == before
    assert "Compiling" not in capfd.readouterr().err


def test_the_log_of_jax_shows_what_it_showed_and_a_record_of_another_form_says_nothing(caplog: Any) -> None:
    name = "jax._src.interpreters.pxla"
    logger = logging.getLogger(name)
    with caplog.at_level(logging.INFO, name), fs.compile_log() as log:
        for level in (logging.INFO, logging.DEBUG):
            for args in (("jit(f)", [HOST], None), ("jit(f)", None, [None]), ("jit(f)", 3)):
                logger.log(level, "%s " * len(args), *args)
    assert [record.levelno for record in caplog.records if record.name == name] == [logging.INFO] * 3
    assert log.unplaced == {}


@KINDS
def test_it_equals_the_step_on_one_device_and_compiles_once(kind: AxisType) -> None:
    mesh = line(kind, 2)
    carry = carry_on(mesh)
    places = {"x": NamedSharding(mesh, P("data")), "note": None}
    step: Any = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(loss_fn, TX)), like=carry, batch=places)
    alone = fs.init_carry(*fs.split_params(nn.Dense(WIDTH).init(jax.random.key(0), HOST)), TX)
    one = fs.jit_step(fs.with_optimizer(loss_fn, TX))
    compiles = []
    for i in range(20):
        batch = {"x": np.roll(HOST, i, 1), "note": jax.random.key(i)}
        with fs.compile_log() as log:
            carry, loss = step(carry, batch, scale=jnp.float32(i))
        compiles.append(log.compiles["loss_fn"])
        alone, expected = one(alone, batch, scale=jnp.float32(i))
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert compiles == [1] + 19 * [0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), carry.params, alone.params)


@KINDS
def test_stacked_batches_are_cut_behind_the_steps(kind: AxisType) -> None:
    mesh = line(kind)
    carry, stacked = carry_on(mesh), np.stack([HOST, HOST])
    many = fs.scan_steps(fs.with_optimizer(loss_fn, TX))
    compiled = fs.jit_step(many, like=carry, batch=NamedSharding(mesh, P(None, "data"))).lower(carry, stacked).compile()
    assert compiled.input_shardings[0][1].shard_shape(stacked.shape) == (2, 8, WIDTH)
    assert "all-gather" not in str(compiled.as_text())


def test_without_a_mesh_it_changes_nothing() -> None:
    carry = fs.init_carry(*fs.split_params(nn.Dense(WIDTH).init(jax.random.key(0), HOST)), TX)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    step = fs.with_optimizer(loss_fn, TX)
    left, _ = fs.jit_step(step, batch=place, donate=False)(carry, HOST)
    right, _ = fs.jit_step(step, donate=False)(carry, HOST)
    jax.tree.map(np.testing.assert_array_equal, left, right)


@needs_x32
@KINDS
def test_what_the_mesh_does_not_divide_is_named(kind: AxisType) -> None:
    mesh = line(kind)
    carry, cut = carry_on(mesh), NamedSharding(mesh, P("data"))
    step = fs.jit_step(fs.with_optimizer(loss_fn, TX), batch=cut)
    with pytest.raises(fs.SignatureError) as caught:
        step(carry, {"x": HOST[:12], "scale": np.float32(1)})
    assert caught.value.leaves == ("batch['scale']: f32[], along data=8", "batch['x']: f32[12,32], along data=8")
    assert not carry.params["kernel"].is_deleted()


@needs_x32
@KINDS
def test_places_of_another_batch(kind: AxisType) -> None:
    mesh = line(kind)
    carry, cut = carry_on(mesh), NamedSharding(mesh, P("data"))
    step: Any = fs.jit_step(fs.with_optimizer(loss_fn, TX), batch={"y": cut})
    with pytest.raises(fs.SignatureError) as caught:
        step(carry, {"x": HOST})
    assert caught.value.leaves == ("batch['x']: f32[64,32]",)
    with pytest.raises(fs.SignatureError) as caught:
        step(carry, batch={"y": HOST})
    assert caught.value.leaves == ("positional arguments: 1", "by name: ['batch']")
    wrong: list[Any] = [P("data"), mesh, "data"]
    for each in wrong:
        with pytest.raises(fs.SignatureError) as caught:
            fs.jit_step(fs.with_optimizer(loss_fn, TX), batch=each)
        assert caught.value.where == "jit_step(batch=...)"
