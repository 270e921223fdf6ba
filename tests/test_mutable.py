"""`with_mutable` over everything in Flax that can be applied."""

import functools
import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxsplit as fs

from .flags import needs_jit
from .models import MLP, Block, Coder, Dropping, Sowing, Two, X, structure

KEY = jax.random.key(0)


def assert_equal(left: Any, right: Any) -> None:
    """Compares two trees bit for bit, plain dicts on both sides."""
    assert structure(left) == structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def plain(tree: Any) -> Any:
    """Turns a FrozenDict into a dict."""
    return nn.unbox(dict(tree)) if not isinstance(tree, dict) else tree


MODEL = MLP(axis_name=None)
VARIABLES = MODEL.init(KEY, X)
WAYS: dict[str, Any] = {
    "module": MODEL,
    "module.apply": MODEL.apply,
    "partial": functools.partial(MODEL.apply, train=True),
    "nn.apply": nn.apply(lambda module, x, train: module(x, train=train), MODEL),
    "nn.apply with mutable": nn.apply(lambda module, x, train: module(x, train=train), MODEL, mutable=["batch_stats"]),
    "a function": lambda variables, x, train, mutable: MODEL.apply(variables, x, train=train, mutable=mutable),
    "jax.jit": jax.jit(MODEL.apply, static_argnames=("train", "mutable")),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_apply_gives_the_same(way: str) -> None:
    params, state = fs.split_params(VARIABLES)
    out, new_state = fs.with_mutable(WAYS[way])(params, state, X, train=True)
    expected, updated = MODEL.apply(VARIABLES, X, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)  # jax.jit fuses
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), new_state, plain(updated))
    assert (new_state["batch_stats"]["BatchNorm_0"]["mean"] != 0).any()


CODER = Coder()
CODER_VARIABLES = CODER.init(KEY, X)
METHODS: dict[str, Any] = {
    "function": fs.with_mutable(CODER, method=Coder.encode),
    "name": fs.with_mutable(CODER, method="encode"),
    "partial": fs.with_mutable(functools.partial(CODER.apply, method=Coder.encode)),
    "at the call": lambda *args: fs.with_mutable(CODER.apply)(*args, method="encode"),
    "apply": fs.with_mutable(CODER.apply, method=Coder.encode),
    "bound": fs.with_mutable(CODER, method=CODER.encode),
}


@pytest.mark.parametrize("how", METHODS)
def test_methods_other_than_call(how: str) -> None:
    out, new_state = METHODS[how](*fs.split_params(CODER_VARIABLES), X)
    expected, updated = CODER.apply(CODER_VARIABLES, X, method="encode", mutable=["batch_stats"])
    assert_equal(out, expected)
    assert_equal(new_state, plain(updated))


LIFTED: dict[str, Any] = {
    "nn.jit": (nn.jit(Coder)(), {}, (X,)),
    "nn.remat": (nn.remat(Coder)(), {}, (X,)),
    "nn.scan": (
        nn.scan(Block, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3)(),
        {},
        (X, None),
    ),
    "nn.vmap": (
        nn.vmap(
            Coder, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, in_axes=None, axis_size=3
        )(),
        {},
        (X,),
    ),
}


@pytest.mark.parametrize("lift", LIFTED)
def test_lifted_modules(lift: str) -> None:
    model, kwargs, args = LIFTED[lift]
    variables = model.init(KEY, *args)
    out, new_state = fs.with_mutable(model)(*fs.split_params(variables), *args, **kwargs)
    expected, updated = model.apply(variables, *args, **kwargs, mutable=["batch_stats"])
    assert_equal(out, expected)
    assert_equal(new_state, plain(updated))


def test_a_model_without_state() -> None:
    model = nn.Dense(3)
    params, state = fs.split_params(model.init(KEY, X))
    out, new_state = fs.with_mutable(model)(params, state, X)
    assert state == new_state == {}
    assert_equal(out, model.apply({"params": params}, X))


@pytest.mark.parametrize(
    ("mutable", "expected"),
    [
        (..., (1, 32)),
        (True, (1, 32)),
        (False, (0, 0)),
        ("calls", (1, 0)),
        (["examples"], (0, 32)),
        (("calls", "examples"), (1, 32)),
        (nn.DenyList("calls"), (0, 32)),
        ([], (0, 0)),
    ],
    ids=str,
)
def test_only_what_is_mutable_changes(mutable: Any, expected: Any) -> None:
    model = Two()
    params, state = fs.split_params(model.init(KEY, X))
    _, new_state = fs.with_mutable(model, mutable=mutable)(params, state, X)
    assert (int(new_state["calls"]["n"]), int(new_state["examples"]["n"])) == expected


def test_what_is_not_mutable_passes_through_untouched() -> None:
    model = MLP(axis_name=None)
    params, state = fs.split_params(VARIABLES, trainable="Dense_1/*")
    state |= {"ema": {"w": jnp.ones(2)}, **fs.rng_state(dropout=KEY)}
    _, new_state = fs.with_mutable(model)(params, state, X, train=True)
    assert new_state.keys() == state.keys()
    for name in ("params", "ema", "rngs"):
        assert new_state[name] is state[name]


def test_captured_values_never_enter_the_state() -> None:
    model = Sowing()
    variables = model.init(KEY, X)  # Flax keeps what was sown into 'losses' here
    assert "losses" in variables
    params, state = fs.split_params(variables)
    apply = fs.with_mutable(model, capture=("intermediates", "losses"))
    for _ in range(3):
        (out, captured), new_state = apply(params, state, X)
        assert structure(new_state) == structure(state)
        assert_equal(captured["intermediates"], {"hidden": (out,)})
        assert len(captured["losses"]["l2"]) == 1
        state = new_state
    (out, captured), _ = fs.with_mutable(model, mutable=["batch_stats"], capture="intermediates")(
        params, {"batch_stats": state["batch_stats"]}, X
    )
    assert captured.keys() == {"intermediates"}


def test_capture_intermediates_of_every_layer() -> None:
    params, state = fs.split_params(VARIABLES)
    apply = fs.with_mutable(MODEL.apply, capture="intermediates")
    (_, captured), _ = apply(params, state, X, train=True, capture_intermediates=True)
    assert captured["intermediates"].keys() == {"Dense_0", "Dense_1", "BatchNorm_0", "__call__"}


@needs_jit
def test_autoregressive_decoding_step_by_step() -> None:
    model = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8, decode=True)
    tokens = jax.random.normal(KEY, (2, 5, 8))
    params, state = fs.split_params(model.init(KEY, tokens))  # the cache has the length of the sequence
    apply = jax.jit(fs.assert_max_traces(fs.with_mutable(model)))
    outs = []
    for i in range(5):
        out, state = apply(params, state, tokens[:, i : i + 1])
        outs.append(out)
    full = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)
    expected = full.apply({"params": params}, tokens, mask=nn.make_causal_mask(tokens[..., 0]))
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), expected, rtol=2e-4, atol=2e-5)
    assert int(state["cache"]["cache_index"]) == 5


def test_the_signature_is_the_models_own() -> None:
    assert str(inspect.signature(fs.with_mutable(MODEL))) == "(params, state, /, x: Any, train: bool = False)"
    for how in ("function", "name", "apply", "bound"):
        assert str(inspect.signature(METHODS[how])) == "(params, state, /, x: Any, scale: float = 1.0)", how
    apply = fs.with_rngs(fs.vmap_stateful(fs.with_mutable(Dropping())))
    assert str(inspect.signature(apply)) == "(params, state, /, x: Any, train: bool = True)"
    named: Any = fs.with_mutable(MODEL)
    assert named.__name__ == "MLP"
    assert named.__wrapped__ is MODEL
