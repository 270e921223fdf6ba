"""`tests/test_optimizers.py`: every public name of optax, tried in a step, for `docs/optimizers.md`.

`--write` writes the page. A transformation goes through where the step traces to the jaxpr of the loop by hand, and its
carry comes out in the types in which it went in: one compile serves all steps.
"""

import inspect
import pathlib
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

import flaxsplit as fs
from flaxsplit._describe import same_structure

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from tools.written import written  # noqa: E402 (found beside this folder)

PAGE = ROOT / "docs" / "optimizers.md"
BEGIN, END = "<!-- optimizers: begin -->", "<!-- optimizers: end -->"

PARAMS = {"dense": {"bias": jnp.linspace(-0.5, 0.5, 3), "kernel": jnp.linspace(-1, 1, 12).reshape(4, 3)}}
BATCH = jnp.sin(jnp.arange(32.0)).reshape(8, 4), jnp.cos(jnp.arange(24.0)).reshape(8, 3)
MEASURE = "lambda updates: updates['dense']['bias'].sum()"
MASK = "{'dense': {'bias': False, 'kernel': True}}"
# What each transformation is made with here, by the name of its argument.
ARGUMENTS = {
    "learning_rate": "0.1", "clipping": "0.1", "eta": "0.1", "gamma": "0.5", "decay": "0.9", "step_size": "0.1",
    "max_delta": "0.1", "threshold": "0.1", "max_norm": "0.1", "max_consecutive_errors": "3", "sync_period": "2",
    "slow_step_size": "0.5", "max_backtracking_steps": "5", "max_linesearch_steps": "5", "l2_norm_clip": "1.0",
    "noise_multiplier": "0.1", "seed": "0", "mask": MASK, "freeze_mask": MASK, "inner": "optax.adam(0.1)",
    "optimizer": "optax.adam(0.1)", "base_optimizer": "optax.adam(0.1)", "fast_optimizer": "optax.sgd(0.1)",
    "tx": "optax.sgd(0.1)", "inner_factory": "optax.adam", "step_size_fn": "optax.linear_schedule(0.1, 0, 9)",
    "should_transform_fn": "lambda step, **_: step % 2 == 0",
    "transforms": "{'a': optax.adam(0.1), 'b': optax.set_to_zero()}",
    "param_labels": "{'dense': {'bias': 'b', 'kernel': 'a'}}",
    "adv_optimizer": "optax.chain(optax.contrib.normalize(), optax.sgd(0.05))",
    "measure_name": "'norm'",
    "measure": MEASURE,
    "f": "lambda updates, params: updates",
}
# What is made in another way: no annotation says what it gives, or its arguments go together.
MADE = {
    "MultiSteps": "optax.MultiSteps(optax.adam(0.1), every_k_schedule=2)",
    "add_noise": "optax.add_noise(0.1, 0.5, jax.random.key(0))",
    "chain": "optax.chain(optax.clip(1.0), optax.adam(0.1))",
    "named_chain": "optax.named_chain(('clip', optax.clip(1.0)), ('adam', optax.adam(0.1)))",
    "noisy_sgd": "optax.noisy_sgd(0.1, key=jax.random.key(0))",
    "inject_hyperparams": "optax.inject_hyperparams(optax.adam)(learning_rate=0.1)",
    "inject_stateful_hyperparams": "optax.inject_stateful_hyperparams(optax.adam)(learning_rate=0.1)",
    "measure_with_ema": f"optax.monitor({{'ema': optax.measure_with_ema({MEASURE}, 0.9)}})",
    "monitor": f"optax.chain(optax.monitor({{'sum': {MEASURE}}}), optax.adam(0.1))",
    "scale_by_factored_rms": "optax.scale_by_factored_rms()",
    "differentially_private_aggregate": ("optax.contrib.differentially_private_aggregate(1.0, 0.1, jax.random.key(0))"),
    "dog": "optax.contrib.dog()",
    "dowg": "optax.contrib.dowg()",
    "hutchinson_estimator_diag_hessian": "optax.contrib.hutchinson_estimator_diag_hessian()",
}
PARTIAL = {"scale_by_muon": "takes the dimension numbers that `optax.contrib.muon` makes; tried as `muon`"}
"""Parts of another transformation, which optax does not make alone."""


class Row(NamedTuple):
    """One transformation, as it was made here and what came of it."""

    name: str
    made: str
    came: str


def names() -> Iterator[str]:
    """Every public name, as it is written."""
    for module in (optax, optax.contrib):
        yield from (f"{module.__name__}.{name}" for name in dir(module) if not name.startswith("_"))


def kind(name: str) -> str:
    """What a name is for, by what optax says of it itself."""
    it: Any = value(name)
    last = name.rpartition(".")[2]
    if last in MADE or last in PARTIAL:
        return "transformation"
    if inspect.ismodule(it):
        return "module"
    if not inspect.isroutine(it):
        return "type"
    returned = str(inspect.signature(it).return_annotation)
    if "GradientTransformation" in returned:
        return "transformation"
    return "schedule" if last.endswith("_schedule") or last == "join_schedules" else "other function"


def value(name: str) -> Any:
    """What a name stands for."""
    module, _, last = name.rpartition(".")
    return getattr(optax.contrib if module == "optax.contrib" else optax, last)


def made(name: str) -> str:
    """The call that makes a transformation."""
    last = name.rpartition(".")[2]
    parameters = inspect.signature(value(name)).parameters.values()
    required = (each for each in parameters if each.default is each.empty and each.kind not in (2, 4))  # no *args
    given = (f"{each.name}=" * (each.kind == each.KEYWORD_ONLY) + ARGUMENTS[each.name] for each in required)
    return MADE.get(last) or f"{name}({', '.join(given)})"


def loss_fn(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
    """The loss of a linear model."""
    x, y = batch
    return ((x @ params["dense"]["kernel"] + params["dense"]["bias"] - y) ** 2).mean(), state


def by_hand(tx: Any) -> Any:
    """The loop of Flax's guide, which gives each transformation what its documentation asks for."""
    taken = inspect.signature(tx.update).parameters
    takes_all = any(each.kind is each.VAR_KEYWORD for each in taken.values())

    def step(carry: fs.Carry, batch: Any) -> tuple[fs.Carry, Any]:
        def value_fn(params: Any, grad_fn: Any = None, obj_fn: Any = None) -> Any:
            del grad_fn, obj_fn  # a line search hands on what it is given
            return loss_fn(params, carry.state, batch)[0]

        def grad_fn(params: Any, *_: Any) -> Any:
            return jax.value_and_grad(loss_fn, has_aux=True)(params, carry.state, batch)[1]

        seen = carry.params.fast if isinstance(carry.params, optax.LookaheadParams) else carry.params
        (loss, state), grads = jax.value_and_grad(loss_fn, has_aux=True)(seen, carry.state, batch)
        extra: Any = {"value": loss, "grad": grads, "value_fn": value_fn, "grad_fn": grad_fn, "obj_fn": value_fn}
        given = {name: each for name, each in extra.items() if takes_all or name in taken}
        updates, opt_state = tx.update(grads, carry.opt_state, carry.params, **given)
        params = optax.apply_updates(carry.params, updates)
        return fs.Carry(carry.step + 1, params, state, opt_state), loss

    return step


def by_hand_per_example(tx: Any) -> Any:
    """As `by_hand`, with the gradient of each example."""

    def one(params: Any, state: Any, batch: Any) -> Any:
        return jax.value_and_grad(loss_fn, has_aux=True)(params, state, batch)

    def step(carry: fs.Carry, batch: Any) -> tuple[fs.Carry, Any]:
        (loss, state), grads = jax.vmap(one, (None, None, 0))(carry.params, carry.state, batch)
        updates, opt_state = tx.update(grads, carry.opt_state, carry.params)
        params = optax.apply_updates(carry.params, updates)
        return fs.Carry(carry.step + 1, params, state, opt_state), loss

    return step


class Trial(NamedTuple):
    """A step of ours, the same by hand, the carry of both, and the error that named this way, if there was one."""

    ours: Any
    theirs: Any
    carry: fs.Carry
    error: fs.SignatureError | None = None


def trial(name: str) -> Trial:
    """Tries a transformation as it is; what is refused, as the error says, typed as printed."""
    with warnings.catch_warnings(action="ignore"):  # optax's own dpsgd hands on a seed, of which optax warns
        tx = eval(made(name))  # noqa: S307 (from the tables above)
    carry, ours = fs.init_carry(PARAMS, {}, tx), fs.with_optimizer(loss_fn, tx)
    try:
        jax.eval_shape(ours, carry, BATCH)
    except fs.SignatureError as error:
        scope: dict[str, Any] = {**vars(fs), "jax": jax, "jnp": jnp, "optax": optax, "tx": tx, "loss_fn": loss_fn}
        scope |= {"params": PARAMS, "state": {}, "carry": carry}
        if "apply_gradients" in error.fix:

            def step(carry: fs.Carry, batch: Any) -> tuple[fs.Carry, Any]:
                local = scope | {"carry": carry, "batch": batch}
                exec(error_.fix, local)  # noqa: S102
                return local["carry"], local["loss"]

            error_ = error
            return Trial(step, by_hand_per_example(tx), carry, error)
        exec(error.fix if "carry = " in error.fix else f"carry = {error.fix}", scope)  # noqa: S102
        return Trial(ours, by_hand(tx), scope["carry"], error)
    return Trial(ours, by_hand(tx), carry)


def fault(each: Trial) -> str | None:
    """What is wrong with a step, seen from its trace alone."""
    ours, (carry, _) = jax.make_jaxpr(each.ours, return_shape=True)(each.carry, BATCH)
    theirs = jax.make_jaxpr(each.theirs)(each.carry, BATCH)
    count = len(jax.tree.leaves(each.carry))
    if not same_structure(carry, each.carry) or ours.in_avals[:count] != ours.out_avals[:count]:
        return "the carry comes out in other types"
    return None if str(ours) == str(theirs) else "another jaxpr than the loop by hand"


def rows() -> list[Row]:
    """The table, each transformation tried."""
    found = []
    for name in sorted({each for each in names() if kind(each) == "transformation"}):
        last = name.rpartition(".")[2]
        if last in PARTIAL:
            found.append(Row(name, "", PARTIAL[last]))
            continue
        each = trial(name)
        came = fault(each) or ("as it is" if each.error is None else f"`{each.error.fix}`")
        found.append(Row(name, made(name), came))
    return found


def table() -> str:
    """What stands on the page."""
    lines = [f"Tried with optax {optax.__version__}.", ""]
    lines += ["| transformation | made here as | in a step |", "|---|---|---|"]
    lines += [
        f"| `{name}` | {f'`{call}`' if call else ''} | {came.replace('|', chr(92) + '|')} |"
        for name, call, came in rows()
    ]
    lines += ["", "The other public names are no transformations:", ""]
    for what in ("schedule", "other function", "type", "module"):
        listed = ", ".join(f"`{name}`" for name in names() if kind(name) == what)
        lines.append(f"- {what}s: {listed}")
    return "\n".join(lines)


def listed(page: str) -> set[str]:
    """The names that a page knows."""
    return set(re.findall(r"`(optax\.[\w.]+)`", page[page.index(BEGIN) :]))


def current() -> str:
    """The page with the table of today."""
    page = PAGE.read_text()
    return f"{page[: page.index(BEGIN)]}{BEGIN}\n\n{table()}\n\n{END}{page[page.index(END) + len(END) :]}"


if __name__ == "__main__":
    sys.exit(written(__doc__, lambda: {PAGE: current()}))
