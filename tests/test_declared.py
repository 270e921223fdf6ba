"""Shapes that users declare with jaxtyping: one size for each name, and one `batch` in a loss and its models."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, Generic, NamedTuple, TypedDict, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import Array
from jaxtyping import Float, Int, Key, Shaped

import flaxsplit as fs
from flaxsplit import _declared

from .test_messages import whole

TX = optax.sgd(0.1)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: Float[Array, "batch d"], mask: Float[Array, " d"] | None = None) -> Float[Array, "batch 2"]:
        return nn.Dense(2)(x if mask is None else x * mask)

    @nn.compact
    def narrow(self, x: Float[Array, "batch dim"]) -> Float[Array, "batch 3"]:
        return nn.Dense(2)(x)


class Batch(NamedTuple):
    x: Float[Array, "batch dim"]
    y: Int[Array, " batch"]


class Named(TypedDict):
    x: Float[Array, "batch dim"]
    y: Int[Array, " batch"]


@dataclasses.dataclass
class Record:
    x: Float[Array, "batch dim"]
    y: Int[Array, " batch"]


T = TypeVar("T")


class Pair(NamedTuple, Generic[T]):
    first: T
    second: T


def loss_of(rows: slice) -> Any:
    apply = fs.with_mutable(Net())

    def loss_fn(params: fs.Params, state: fs.State, batch: Batch) -> tuple[Float[Array, ""], fs.State]:
        logits, state = apply(params, state, batch.x[rows])
        return logits.mean() + 0 * batch.y.sum(), state

    return loss_fn


@pytest.fixture(autouse=True)
def on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_declared, "TYPECHECKER", "typeguard")


def batch_of(x: tuple[int, ...], y: int, kind: Any = int) -> Batch:
    return Batch(jnp.ones(x), jnp.zeros(y, kind))


def carry_of() -> fs.Carry:
    return fs.init_carry(*fs.split_params(Net().init(jax.random.key(0), jnp.ones((1, 3)))), TX)


def refused(fn: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(fs.SignatureError) as caught:
        fn(*args, **kwargs)
    return str(caught.value)


def test_two_sizes_of_one_name_in_a_batch() -> None:
    step = fs.with_optimizer(loss_of(slice(None)), TX)
    assert refused(step, carry_of(), batch_of((8, 3), 7)) == whole("""
    value_and_grad(loss_fn): arrays must be as their annotations say, with one size for each name
      got:
        batch.x: f32[8,3], declared Float[..., 'batch dim']
        batch.y: i32[7], declared Int[..., 'batch']
      likely cause: another array was passed, an axis is missing, or one is too many
      fix: the arrays that are declared; or in the annotation another name, where sizes may differ
    """)


def test_another_batch_in_the_model_than_in_the_loss() -> None:
    step = fs.jit_step(fs.with_optimizer(loss_of(slice(4)), TX), donate=False)
    assert refused(step, carry_of(), batch_of((8, 3), 8)) == whole("""
    with_mutable(fn): arrays must be as their annotations say, with one size for each name
      got:
        batch.x: f32[8,3], declared Float[..., 'batch dim']
        batch.y: i32[8], declared Int[..., 'batch']
        x: f32[4,3], declared Float[..., 'batch d']
      likely cause: another array was passed, an axis is missing, or one is too many
      fix: the arrays that are declared; or in the annotation another name, where sizes may differ
    """)


@pytest.mark.parametrize("wrong", [batch_of((8, 3, 1), 8), batch_of((8, 3), 8, float)], ids=["axes", "dtype"])
def test_another_form_than_declared(wrong: Batch) -> None:
    assert "value_and_grad(loss_fn): arrays must be" in refused(fs.value_and_grad(loss_of(slice(None))), {}, {}, wrong)


def test_what_comes_out_is_looked_at_too() -> None:
    carry, x = carry_of(), jnp.ones((8, 3))
    narrow = fs.with_mutable(Net(), method=Net.narrow)
    assert "out: f32[8,2], declared Float[..., 'batch 3']" in refused(narrow, carry.params, {}, x)

    def loss_fn(params: Any, state: Any, batch: Float[Array, "batch dim"]) -> tuple[Float[Array, " batch"], Any]:
        return (params["Dense_0"]["kernel"] * batch.mean()).sum(), state

    assert "out[0]: f32[], declared Float[..., 'batch']" in refused(fs.value_and_grad(loss_fn), carry.params, {}, x)


def test_a_model_alone_and_its_optional_arguments() -> None:
    params, apply = carry_of().params, fs.with_mutable(Net())
    loosely: Any = apply
    assert loosely(params, {}, np.ones((8, 3), np.float32), mask=None)[0].shape == (8, 2)  # an array of NumPy is one
    assert apply(params, {}, jnp.ones((8, 3)), jnp.ones(3))[0].shape == (8, 2)
    assert "mask: f32[1], declared Float[..., 'd']" in refused(apply, params, {}, jnp.ones((8, 3)), mask=jnp.ones(1))
    assert "fn takes (params, state, x, mask)" in refused(apply, params, {}, jnp.ones((8, 3)), musk=jnp.ones(1))


def test_an_nnx_module() -> None:
    class Linear(nnx.Linear):
        def __call__(self, inputs: Float[Array, "batch 3"], out_sharding: Any = None) -> Float[Array, "batch 2"]:
            return super().__call__(inputs)

    fn, params, state = fs.from_nnx(Linear(3, 2, rngs=nnx.Rngs(0)))
    assert fn(params, state, jnp.ones((8, 3)))[0].shape == (8, 2)
    assert "from_nnx(module): arrays must be" in refused(fn, params, state, jnp.ones((8, 4)))


@pytest.mark.parametrize(
    ("hint", "make", "path"),
    [
        (Named, lambda x, y: {"x": x, "y": y}, "batch['y']"),
        (Record, Record, "batch.y"),  # no pytree: only looked at
        (tuple[Float[Array, "batch dim"], Int[Array, " batch"]], lambda x, y: (x, y), "batch[1]"),
        (tuple[Shaped[Array, "batch ..."], ...], lambda x, y: (x, y), "batch[1]"),
        (list[Shaped[Array, "batch ..."]], lambda x, y: [x, y], "batch[1]"),
        (dict[str, Shaped[Array, "batch ..."]], lambda x, y: {"x": x, "y": y}, "batch['y']"),
        (Mapping[str, Shaped[Array, "batch ..."]], lambda x, y: {"x": x, "y": y}, "batch['y']"),
    ],
    ids=["TypedDict", "dataclass", "pair", "tuple", "list", "dict", "Mapping"],
)
def test_batches_of_every_form(hint: Any, make: Any, path: str) -> None:
    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        return params["w"], state

    loss_fn.__annotations__["batch"] = hint
    grads_of = fs.value_and_grad(loss_fn)
    params = {"w": jnp.ones(())}
    assert grads_of(params, {}, make(jnp.ones((8, 3)), jnp.zeros(8, int)))[0][0] == 1
    assert f"{path}: i32[7], declared" in refused(grads_of, params, {}, make(jnp.ones((8, 3)), jnp.zeros(7, int)))


def test_other_names_are_local_to_a_function() -> None:
    """As in jaxtyping: a second layer may say `dim` of another size."""
    apply, params = fs.with_mutable(Net()), carry_of().params

    def loss_fn(params: Any, state: Any, batch: Float[Array, "batch dim"]) -> tuple[Float[Array, ""], Any]:
        out, state = apply(params, state, batch[:, :3])
        return out.mean(), state

    assert jnp.isfinite(fs.value_and_grad(loss_fn)(params, {}, jnp.ones((8, 5)))[0][0])


def test_through_vmap_scan_and_microbatches() -> None:
    class One(nn.Module):
        @nn.compact
        def __call__(self, x: Float[Array, " dim"]) -> Float[Array, " 2"]:
            return nn.Dense(2)(x)

    apply = fs.vmap_stateful(fs.with_mutable(One()))

    def loss_fn(params: fs.Params, state: fs.State, batch: Batch, key: Key[Array, ""]) -> tuple[Float[Array, ""], Any]:
        out, state = apply(params, state, batch.x)
        return out.mean(), state

    many = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), batch_of((8, 3), 8))
    step = fs.jit_step(fs.scan_steps(fs.with_optimizer(loss_fn, TX, microbatches=2)), donate=False)
    assert step(carry_of(), many, jax.random.key(0))[1].shape == (2,)
    assert "batch.y: i32[3], declared" in refused(step, carry_of(), many._replace(y=many.y[:, :6]), jax.random.key(0))


def test_what_declares_nothing_is_left_as_it_is() -> None:
    def loss_fn(params: Any, state: Any, batch: Array) -> Any:
        return params["w"] * batch.sum(), state

    def unknown(params: Any, state: Any, batch: Any) -> Any:
        return params["w"], state

    unknown.__annotations__["batch"] = "KnownToCheckersAlone"
    sums: Any = lambda params, state, batch: (params["w"], state)  # noqa: E731
    sums.__annotations__["batch"] = Float[Array, " batch+more"]
    for each in (loss_fn, unknown):
        assert _declared.declaring(each, "f") is each
    assert fs.value_and_grad(sums)({"w": jnp.ones(())}, {}, jnp.ones(3))[0][0] == 1  # `more` is not known


UNKNOWN: Any = dataclasses.make_dataclass("Unknown", [("first", "KnownToCheckersAlone")])


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (tuple[()], ()),
        (Pair[Array], Pair(jnp.ones(2), jnp.ones(3))),
        (UNKNOWN, (jnp.ones(2),)),
        (Batch, (jnp.ones((8, 3)), jnp.ones(7))),
        (Named, {"x": jnp.ones((3, 4))}),
    ],
)
def test_what_is_not_declared_or_of_another_form_is_not_looked_at(hint: Any, value: Any) -> None:
    def loss_fn(params: Any, state: Any, batch: Any, other: Any) -> Any:
        del other
        return params["w"] * batch.sum(), state

    loss_fn.__annotations__ |= {"batch": Float[Array, " batch"], "other": hint}
    assert fs.value_and_grad(loss_fn)({"w": jnp.ones(())}, {}, jnp.ones(3), value)[0][0] == 3


def test_a_function_that_is_looked_at_keeps_its_signature() -> None:
    assert [*inspect.signature(fs.with_mutable(Net())).parameters] == ["params", "state", "x", "mask"]


def test_a_class_that_is_a_field_of_itself() -> None:
    """`Module.apply` is one: a Linen module's parent is a module."""
    apply = fs.with_mutable(Net().apply)
    params = carry_of().params
    assert apply(params, {}, jnp.ones((8, 3)))[0].shape == (8, 2)


def test_off_nothing_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_declared, "TYPECHECKER", "")
    loss_fn = loss_of(slice(None))
    assert _declared.declaring(loss_fn, "f") is loss_fn
