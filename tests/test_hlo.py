"""A step costs not one instruction more than by hand: the optimized HLO is compared, opcode for opcode."""

import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import flaxsplit as fs

from .flags import needs_donation, needs_jit
from .models import MLP, Dropping, X, Y

pytestmark = needs_jit
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([\w-]+)\(")


def instructions(step: Any, *args: Any) -> Counter[tuple[str, str]]:
    """Counts the instructions of the optimized module by opcode and shape (layout included), fused ones too."""
    one_name = jax.jit(lambda *args: step(*args), donate_argnums=0)  # equal programs of one name are compiled once
    text = one_name.lower(*args).compile().as_text() or ""
    found = [_INSTRUCTION.match(line) for line in text.splitlines()]
    counted = Counter((match[2], match[1]) for match in found if match)
    assert counted.total() > 20, "the parser no longer reads this HLO"
    return counted


def by_hand_mlp(model: Any, tx: optax.GradientTransformation) -> Any:
    """The guide's update step over the same carry, without flaxsplit."""

    def step(carry: fs.Carry, batch: Any) -> tuple[fs.Carry, jax.Array]:
        x, y = batch

        def loss(params: Any) -> tuple[jax.Array, Any]:
            def one(x: jax.Array) -> Any:
                return model.apply({"params": params, **carry.state}, x, train=True, mutable=["batch_stats"])

            pred, updated = jax.vmap(one, out_axes=(0, None), axis_name="batch")(x)
            return optax.l2_loss(pred, y).mean(), updated

        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(carry.params)
        updates, opt_state = tx.update(grads, carry.opt_state, carry.params)
        return fs.Carry(carry.step + 1, optax.apply_updates(carry.params, updates), dict(state), opt_state), value

    return step


def loss_of(model: Any, rngs: bool) -> Any:
    """The loss function of the steps here, built from combinators."""
    apply = fs.vmap_stateful(fs.with_mutable(model), axis_name="batch")
    apply = fs.with_rngs(apply) if rngs else apply

    def loss_fn(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
        x, y = batch
        pred, state = apply(params, state, x, train=True)
        return optax.l2_loss(pred, y).mean(), state

    return loss_fn


def with_flaxsplit(model: Any, tx: optax.GradientTransformation, rngs: bool = False) -> Any:
    """The same step, built from combinators."""
    return fs.with_optimizer(loss_of(model, rngs), tx)


def by_hand_dropping(model: Any, tx: optax.GradientTransformation) -> Any:
    """As `by_hand_mlp`, with a dropout key that is split per step and per example."""

    def step(carry: fs.Carry, batch: Any) -> tuple[fs.Carry, jax.Array]:
        x, y = batch
        key, drawn = jax.random.split(carry.state["rngs"]["dropout"])
        keys = jax.random.split(drawn, len(x))

        def loss(params: Any) -> tuple[jax.Array, Any]:
            def one(key: jax.Array, x: jax.Array) -> Any:
                variables = {"params": params, "batch_stats": carry.state["batch_stats"]}
                return model.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key})

            pred, updated = jax.vmap(one, out_axes=(0, None), axis_name="batch")(keys, x)
            return optax.l2_loss(pred, y).mean(), updated

        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(carry.params)
        updates, opt_state = tx.update(grads, carry.opt_state, carry.params)
        new_state = {**state, "rngs": {"dropout": key}}
        return fs.Carry(carry.step + 1, optax.apply_updates(carry.params, updates), new_state, opt_state), value

    return step


CASES = {
    "mlp-adam": (MLP(), optax.adam(1e-3), False),
    "mlp-clip": (MLP(), optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9)), False),
    "dropout-adamw": (Dropping(), optax.adamw(1e-3), True),
}


def prepare(case: str) -> tuple[Any, Any, Any]:
    """Gives a hand-written step, a flaxsplit step, and what both take."""
    model, tx, rngs = CASES[case]
    variables = model.init(jax.random.key(0), X[0], train=False)
    params, state = fs.split_params(variables)
    state |= fs.rng_state(dropout=jax.random.key(1)) if rngs else {}
    batch = (X, jnp.zeros((32, 2)) if rngs else Y)
    by_hand = (by_hand_dropping if rngs else by_hand_mlp)(model, tx)
    return by_hand, with_flaxsplit(model, tx, rngs), (fs.init_carry(params, state, tx), batch)


@pytest.mark.parametrize("case", CASES)
def test_a_step_has_the_instructions_of_the_hand_written_one(case: str) -> None:
    by_hand, ours, args = prepare(case)
    assert instructions(ours, *args) == instructions(by_hand, *args)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_law_0_holds_instruction_for_instruction(case: str, count: int) -> None:
    model, tx, rngs = CASES[case]
    _, _, args = prepare(case)
    loss_fn = loss_of(model, rngs)

    def composed(carry: fs.Carry, batch: Any) -> tuple[fs.Carry, jax.Array]:
        (loss, grads), state = fs.value_and_grad(loss_fn, microbatches=count)(carry.params, carry.state, batch)
        return fs.apply_gradients(tx, carry, grads, state, value=loss), loss

    assert instructions(fs.with_optimizer(loss_fn, tx, microbatches=count), *args) == instructions(composed, *args)


def test_one_multiplication_more_is_seen() -> None:
    by_hand, ours, args = prepare("mlp-adam")

    def slower(carry: fs.Carry, batch: Any) -> tuple[fs.Carry, jax.Array]:
        carry, loss = ours(carry, batch)
        return carry, loss * loss  # by a constant, XLA would fold it into the mean

    assert instructions(slower, *args) != instructions(by_hand, *args)


def test_combinators_that_only_watch_add_nothing() -> None:
    by_hand, ours, args = prepare("mlp-adam")
    assert instructions(fs.assert_max_traces(ours, 1), *args) == instructions(by_hand, *args)


@needs_donation
def test_the_donated_carry_is_aliased_and_the_peak_is_the_hand_written_one() -> None:
    by_hand, ours, args = prepare("dropout-adamw")
    stats: list[Any] = [fs.jit_step(step).lower(*args).compile().memory_analysis() for step in (by_hand, ours)]
    assert stats[0].alias_size_in_bytes == stats[1].alias_size_in_bytes > 0
    assert stats[0].temp_size_in_bytes == stats[1].temp_size_in_bytes


def test_jit_step_returns_what_jax_jit_returns() -> None:
    ours: Any = fs.jit_step(lambda carry, batch: (carry, batch))
    assert type(ours) is type(jax.jit(lambda x: x))
