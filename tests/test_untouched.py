"""State that a call was to update and did not: told by collection and layer, and never where a program is right."""

import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import flaxsplit as fs

from .flags import needs_x32

KEY = jax.random.key(0)
X = jnp.arange(12.0).reshape(4, 3)


class Two(nn.Module):
    """A body and a head, each with statistics, and a counter; what is in eval mode is said by name."""

    still: tuple[str, ...] = ()
    counts: bool = False

    @nn.compact
    def __call__(self, x: Any) -> Any:
        n = self.variable("counts", "n", lambda: jnp.zeros(()))
        if self.counts:
            n.value += 1
        for name in ("body", "head"):
            x = nn.Dense(3, name=name)(x)
            x = nn.BatchNorm(use_running_average=name in self.still, use_scale=name == "body", name=f"{name}_norm")(x)
        return x


VARIABLES = Two().init(KEY, X)
PARAMS, STATE = fs.split_params(VARIABLES)
HEAD = ["head/*", "head_norm/*"]


def told(fn: Any, *args: Any) -> list[str]:
    """What the warnings of a call name."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fn(*args)
    assert all(each.filename == __file__ for each in caught)
    return [leaf for each in caught for leaf in getattr(each.message, "leaves", ())]


def at_layers(*names: str) -> list[str]:
    return [f"state['batch_stats']['{name}_norm']: no leaf written" for name in names]


@pytest.mark.parametrize("around", [lambda fn: fn, jax.jit, jax.checkpoint], ids=["eager", "jit", "checkpoint"])
@pytest.mark.parametrize(
    ("model", "leaves"),
    [
        (Two(), []),
        (Two(counts=True), []),
        (Two(("body",)), at_layers("body")),
        (Two(("head",), counts=True), at_layers("head")),
        (Two(("body", "head"), counts=True), at_layers("body", "head")),
        (Two(("body", "head")), ["batch_stats: no leaf written", "counts: no leaf written"]),
    ],
    ids=str,
)
def test_each_layer_in_eval_mode_is_told(model: Any, leaves: list[str], around: Any) -> None:
    assert sorted(told(around(fs.with_mutable(model)), PARAMS, STATE, X)) == leaves


@needs_x32
def test_what_is_said_of_a_layer() -> None:
    with pytest.warns(fs.UntouchedStateWarning) as caught:
        fs.with_mutable(Two(("body",), counts=True))(PARAMS, STATE, X)
    assert str(caught[0].message) == (
        "with_mutable(fn): each layer that keeps batch statistics should write them, where the call writes others\n"
        "  got:\n"
        "    state['batch_stats']['body_norm']: no leaf written\n"
        "  likely cause: train=True (or use_running_average=False) was forgotten, or does not reach these layers\n"
        "  fix: fn(params, state, x, train=True), handed on to each layer. Where they are to stay as they are: "
        "split_params(variables, trainable=...) that freezes them, or "
        "with_mutable(fn, mutable=['batch_stats', 'counts'])"
    )


def test_it_is_told_in_a_step_and_in_lanes_at_the_users_own_line() -> None:
    apply, tx = fs.with_mutable(Two(("body",))), optax.sgd(0.1)

    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        out, state = apply(params, state, batch)
        return out.mean(), state

    step = fs.jit_step(fs.with_optimizer(loss_fn, tx, microbatches=2))
    assert set(told(step, fs.init_carry(PARAMS, STATE, tx), X)) == {*at_layers("body")}
    lanes = fs.vmap_stateful(apply, state_axes={"batch_stats": 0, "counts": 0})
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), STATE)
    assert told(lanes, PARAMS, stacked, X) == at_layers("body")


def test_a_call_that_needs_what_it_does_not_make_reads_it() -> None:
    class Centred(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return x - self.get_variable("batch_stats", "mean")

    assert told(fs.with_mutable(Centred()), {}, {"batch_stats": {"mean": X}}, X) == ["batch_stats: no leaf written"]


def test_a_model_without_params_has_nothing_frozen() -> None:
    norm = nn.BatchNorm(use_running_average=True, use_scale=False, use_bias=False)
    assert told(fs.with_mutable(norm), *fs.split_params({"params": {}} | norm.init(KEY, X)), X) == [
        "batch_stats: no leaf written"
    ]


# Right programs: warnings are errors in these tests


def test_a_norm_without_params_in_a_model_that_is_frozen_whole_is_right() -> None:
    norm = nn.BatchNorm(use_running_average=True, use_scale=False, use_bias=False)
    model = nn.Sequential([nn.Dense(3), norm])
    fs.with_mutable(model)({}, model.init(KEY, X), X)


def test_a_frozen_body_in_eval_mode_is_right() -> None:
    params, state = fs.split_params(VARIABLES, trainable=HEAD)
    fs.with_mutable(Two(("body",)))(params, state, X)
    fs.with_mutable(Two(("body",), counts=True))(params, state, X)
    assert told(fs.with_mutable(Two(("head",))), params, state, X) == at_layers("head")
    # the whole body, where the head keeps no statistics
    one = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True), nn.Dense(1)])
    params, state = fs.split_params(one.init(KEY, X), trainable="layers_2/*")
    fs.with_mutable(one)(params, state, X)


def test_a_norm_without_params_is_frozen_with_the_module_around_it() -> None:
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            norm = nn.BatchNorm(use_running_average=True, use_scale=False, use_bias=False)
            return norm(nn.Dense(3)(x))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.BatchNorm(use_running_average=False)(Body(name="body")(x))

    variables = Net().init(KEY, X)
    fs.with_mutable(Net())(*fs.split_params(variables, trainable="BatchNorm_0/*"), X)
    assert told(fs.with_mutable(Net()), *fs.split_params(variables), X) == [
        "state['batch_stats']['body']['BatchNorm_0']: no leaf written"
    ]


@pytest.mark.parametrize(
    ("model", "mutable"),
    [
        (Two(("body",)), ["batch_stats"]),
        (Two(("body", "head"), counts=True), "counts"),
        (Two(("body", "head"), counts=True), ["counts", "batch_stats"]),
        (Two(("body", "head")), False),
    ],
)
def test_naming_what_is_written_says_that_the_rest_stays(model: Any, mutable: Any) -> None:
    fs.with_mutable(model, mutable=mutable)(PARAMS, STATE, X)


def test_all_is_no_name() -> None:
    assert told(fs.with_mutable(Two(("body",)), mutable=True), PARAMS, STATE, X) == at_layers("body")


def test_a_part_of_a_model_that_a_method_does_not_run_is_no_mistake() -> None:
    class Coder(nn.Module):
        def setup(self) -> None:
            self.first, self.second = (nn.BatchNorm(use_running_average=False) for _ in range(2))

        def __call__(self, x: Any) -> Any:
            return self.second(self.first(x))

        def encode(self, x: Any) -> Any:
            return self.first(x)

    params, state = fs.split_params(Coder().init(KEY, X))
    _, new_state = fs.with_mutable(Coder(), method=Coder.encode)(params, state, X)
    assert new_state["batch_stats"]["second"]["mean"] is state["batch_stats"]["second"]["mean"]


@pytest.mark.parametrize(
    "mine", [{"target": PARAMS}, {"counters": {"n": jnp.zeros(())}}, {"memory": {"h": (X, X)}}], ids=str
)
def test_a_collection_that_no_layer_reads_is_no_mistake(mine: Any) -> None:
    params, state = fs.split_params(nn.Dense(2).init(KEY, X))
    _, new_state = fs.with_mutable(nn.Dense(2))(params, state | mine, X)
    assert new_state == state | mine
    model = nn.BatchNorm(use_running_average=True)
    params, state = fs.split_params(model.init(KEY, X))
    assert told(fs.with_mutable(model), params, state | mine, X) == ["batch_stats: no leaf written"]


def test_a_constant_is_no_mistake_beside_what_is_written() -> None:
    class Net(nn.Module):
        still: bool

        @nn.compact
        def __call__(self, x: Any) -> Any:
            table = self.variable("tables", "wave", lambda: jnp.ones(3))
            return nn.BatchNorm(use_running_average=self.still)(x * table.value)

    params, state = fs.split_params(Net(False).init(KEY, X))
    fs.with_mutable(Net(False))(params, state, X)
    fs.with_mutable(Net(True), mutable=False)(params, state, X)


@needs_x32
def test_a_collection_of_the_models_own_that_it_only_reads() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(2)(x * self.variable("tables", "wave", lambda: jnp.ones(3)).value)

    params, state = fs.split_params(Net().init(KEY, X))
    with pytest.warns(fs.UntouchedStateWarning) as caught:
        fs.with_mutable(Net())(params, state, X)
    assert str(caught[0].message) == (
        "with_mutable(fn): at least one leaf of the mutable collections should be written\n"
        "  got:\n"
        "    tables: no leaf written\n"
        "  likely cause: train=True was forgotten, or what the model reads there is constant\n"
        "  fix: fn(params, state, x, train=True), or with_mutable(fn, mutable=False) to only read"
    )
    fs.with_mutable(Net(), mutable=False)(params, state, X)


def test_statistics_stay_while_a_model_decodes() -> None:
    class Decoder(nn.Module):
        train: bool

        @nn.compact
        def __call__(self, x: Any) -> Any:
            self.variable("cache", "index", lambda: jnp.zeros((), jnp.int32)).value += 1
            return nn.BatchNorm(use_running_average=not self.train)(x)

    params, state = fs.split_params(Decoder(True).init(KEY, X))
    fs.with_mutable(Decoder(False))(params, state, X)
    fs.with_mutable(Decoder(True))(params, state, X)


@pytest.mark.parametrize("lifted", [nn.remat, nn.jit, lambda layer: layer], ids=["remat", "jit", "plain"])
def test_lifted_layers_that_are_written_raise_no_warning(lifted: Any) -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            for i in range(2):
                x = lifted(nn.BatchNorm)(use_running_average=False, name=f"norm_{i}")(x)
            return x

    params, state = fs.split_params(Net().init(KEY, X))
    fs.with_mutable(Net())(params, state, X)
    jax.jit(fs.with_mutable(Net()))(params, state, X)


def test_it_is_told_of_each_model() -> None:
    models = [fs.with_mutable(Two(("body",))), fs.with_mutable(Two(("head",)))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for apply in models:
            apply(PARAMS, STATE, X)
    assert len(caught) == 2
