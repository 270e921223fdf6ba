"""A step is looked at before it runs: each planted fault is found by its leaf, and a good step has no finding."""

import contextlib
import cProfile
import itertools
import json
import math
import pathlib
import runpy
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import flaxsplit as fs
from flaxsplit._refusals.explain import GROUPS, KINDS
from tools import kinds as page

from . import nnx_models, planted
from .flags import needs_donation, needs_promotion, needs_x32
from .test_hlo import CASES, instructions, prepare

SILENT = (
    "ignore::flaxsplit.UntouchedStateWarning",  # of a fault that is planted, as the next
    "ignore:scatter inputs have incompatible types",
)
pytestmark = [needs_donation, needs_promotion, needs_x32, *map(pytest.mark.filterwarnings, SILENT)]
PLANTED = [(kind, style) for kind, by_style in planted.WHERE.items() for style in by_style]
REFUSED = [(kind, style) for kind, by_style in planted.REFUSED.items() for style in by_style]
W = {"w": jnp.ones((4, 4))}
X = jnp.ones((8, 4))


def explain(style: str, fault: str) -> fs.StepReport:
    with doubles() if fault == "f64" else contextlib.nullcontext():
        step, carry, batch, args = planted.plant(style, fault)
        return fs.explain_step(step, carry, batch, *args)


def doubles() -> Any:
    """What turns f64 on; jax < 0.8 has it elsewhere."""
    any_jax: Any = jax
    return any_jax.enable_x64(True) if hasattr(jax, "enable_x64") else any_jax.experimental.enable_x64()


def html(report: Any) -> str:
    """What a notebook shows."""
    return str(report._repr_html_())


def kinds(report: fs.StepReport) -> list[str]:
    return [each.kind for each in report.findings]


def simple(carry: Any, batch: Any) -> Any:
    loss, grads = jax.value_and_grad(lambda w: ((batch @ w) ** 2).mean())(carry["w"])
    return {"w": carry["w"] - 0.1 * grads}, loss


# ---- what is found


@pytest.mark.parametrize("style", planted.STYLES)
def test_a_good_step_has_no_finding(style: str) -> None:
    report = explain(style, "")
    assert kinds(report) == []
    assert str(report).endswith("nothing to mend")


@pytest.mark.parametrize("style", ["by hand", "TrainState", "flaxsplit"])
def test_a_good_step_on_a_mesh_has_no_finding(style: str) -> None:
    report = explain(style, "mesh")
    assert kinds(report) == []
    assert report.devices == 8
    assert report.collectives["all-reduce"]["times"] > 0


@pytest.mark.parametrize(("kind", "style"), PLANTED)
def test_a_planted_fault_is_found_alone_and_by_name(kind: str, style: str) -> None:
    report = explain(style, kind)
    assert kinds(report) == [kind]
    (finding,) = report.findings
    words = KINDS[kind]
    assert finding.leaves[0].startswith(planted.WHERE[kind][style])
    assert finding.where == finding.leaves[0].partition(": ")[0]
    assert (finding.group, finding.what, finding.cause) == (words.group, words.what, words.cause)
    assert finding.fix == (words.ours if style == "flaxsplit" else words.fix)


@pytest.mark.parametrize(("kind", "style"), REFUSED)
def test_what_is_no_finding_is_refused_while_tracing(kind: str, style: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        explain(style, kind)
    assert type(caught.value).__name__ == planted.REFUSED[kind][style]


def test_every_kind_is_planted_and_the_page_lists_it() -> None:
    assert planted.WHERE.keys() == KINDS.keys()
    assert len(KINDS) >= 25
    assert {words.group for words in KINDS.values()} == set(GROUPS)
    assert page.current() == page.PAGE.read_text(), "python tools/kinds.py --write"


@pytest.mark.parametrize("case", CASES)
def test_the_steps_of_the_other_tests_are_good(case: str) -> None:
    by_hand, ours, args = prepare(case)
    wrapped = fs.skip_nonfinite(ours)
    stacked = (args[0], jax.tree.map(lambda leaf: leaf[None], args[1]))
    for step, given in ((by_hand, args), (ours, args), (wrapped, args), (fs.scan_steps(ours), stacked)):
        assert kinds(fs.explain_step(step, *given)) == []


class Watched:
    """A compiled step that is explained at its first call."""

    def __init__(self, jitted: Any, reports: list[fs.StepReport]) -> None:
        self.jitted, self.reports, self.known = jitted, reports, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Explains, and calls."""
        if not self.known:
            self.known = True
            self.reports.append(fs.explain_step(self.jitted, *args, **kwargs))
        return self.jitted(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.jitted, name)


ROOT = pathlib.Path(__file__).parent.parent
PROGRAMS = [ROOT / "examples" / "digits.py", *sorted((ROOT / "examples" / "recipes").glob("*.py"))]


@pytest.mark.slow
@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_no_step_of_a_recipe_or_of_the_demo_has_a_finding(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if path.stem == "nnx_module" and not nnx_models.NEW:
        pytest.skip("before flax 0.11 nnx.Optimizer.update took the gradients alone")
    reports: list[fs.StepReport] = []
    jit_step: Any = fs.jit_step
    monkeypatch.setattr(fs, "jit_step", lambda *args, **kwargs: Watched(jit_step(*args, **kwargs), reports))
    monkeypatch.setattr("sys.argv", [str(path)])
    with contextlib.suppress(SystemExit, AssertionError):  # what it trains to is asserted elsewhere
        runpy.run_path(str(path), run_name="__main__")
    assert reports or path.stem in ("explained", "warm_start")  # one has a test of its own, one starts processes
    assert [(each.kind, each.leaves) for report in reports for each in report.findings] == []


# ---- what is no fault


def test_a_static_field_that_is_made_anew_is_a_structure() -> None:
    step, carry, batch, _ = planted.plant("TrainState", "")

    def renewed(state: Any, batch: Any) -> Any:
        state, loss = step(state, batch)
        return state.replace(tx=optax.adam(1e-3)), loss

    found = fs.explain_step(renewed, carry, batch).findings[0]
    assert (found.kind, found.where) == ("structure", "carry.tx")


@pytest.mark.parametrize(
    "tx", [optax.sgd(0.1), optax.adamw(1e-3), optax.lion(1e-3), optax.MultiSteps(optax.adam(1e-3), 2)]
)
def test_params_without_a_gradient_are_found_under_any_optimizer(tx: Any) -> None:
    def step(carry: Any, batch: Any) -> Any:
        params, opt_state = carry
        loss, grads = jax.value_and_grad(lambda p: ((batch @ p["w"]) ** 2).mean())(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    for params, expected in ((W, []), (W | {"spare": jnp.ones(3)}, ["no gradient"])):
        assert kinds(fs.explain_step(step, (params, tx.init(params)), X)) == expected


def test_what_is_frozen_on_purpose_is_no_fault() -> None:
    labels = {"w": "train", "v": "freeze"}
    tx = optax.multi_transform({"train": optax.adam(1e-3), "freeze": optax.set_to_zero()}, labels)

    def step(carry: Any, batch: Any) -> Any:
        params, opt_state = carry
        loss, grads = jax.value_and_grad(lambda p: ((batch @ p["w"] @ p["v"]) ** 2).mean())(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    params = W | {"v": jnp.ones((4, 4))}
    assert kinds(fs.explain_step(step, (params, tx.init(params)), X)) == []


def test_a_frozen_head_whose_output_is_not_used_is_no_dropped_state() -> None:
    def step(carry: Any, batch: Any) -> Any:
        new, loss = simple({"w": carry["w"]}, batch)
        hidden = batch @ carry["w"]
        _ = hidden @ carry["head"] + carry["bias"]
        return new | {"head": carry["head"], "bias": carry["bias"]}, loss

    assert kinds(fs.explain_step(step, W | {"head": jnp.ones((4, 3)), "bias": jnp.ones(3)}, X)) == []


def drawing(draw: Any) -> Any:
    def step(carry: Any, batch: Any) -> Any:
        noise, key = draw(carry["key"], carry["step"])
        new, loss = simple(carry, batch + noise)
        return new | {"key": key, "step": carry["step"] + 1}, loss

    carry = W | {"key": jax.random.key(0), "step": jnp.int32(0)}
    return kinds(fs.explain_step(step, carry, X))


def test_keys_that_advance_are_told_from_those_that_do_not() -> None:
    assert drawing(lambda key, step: (jax.random.normal(jax.random.fold_in(key, step), (4,)), key)) == []
    assert (
        drawing(lambda key, step: (jax.random.normal(jax.random.split(key)[0], (4,)), jax.random.split(key)[1])) == []
    )
    assert drawing(lambda key, step: (jax.random.normal(jax.random.fold_in(key, 7), (4,)), key)) == ["key unchanged"]
    again: Any = lambda key, step: (jax.random.normal(key, (4,)), jax.random.split(key)[0])  # noqa: E731
    assert drawing(again) == ["key drawn twice"]


def noise(key: Any) -> Any:
    return jax.random.normal(key, (4,))


def split(key: Any) -> Any:
    return jax.random.split(key)[0]


DRAWN_TWICE: dict[str, Any] = {
    "in one line": lambda key: jax.random.normal(key, (4,)) - jax.random.normal(key, (4,)),
    "for two distributions": lambda key: jax.random.normal(key, (4,)) * jax.random.uniform(key, (4,)),
    "for each leaf of a tree": lambda key: sum(jax.tree.map(lambda scale: scale * noise(key), [1.0, 2.0])),
    "through a split of its own": lambda key: noise(split(key)) + jax.random.normal(split(key), (4,)),
    "as bits": lambda key: (jax.random.bits(key, (4,)) + jax.random.bits(key, (4,))).astype("float32"),
}
DRAWN_ONCE: dict[str, Any] = {
    "again on purpose": lambda key: noise(key) + 0.5 * noise(key),  # a function of the user's that is called twice
    "again, jitted": lambda key: jax.jit(noise)(key) + 0.5 * jax.jit(noise)(key),
    "in a branch": lambda key: jax.lax.cond(key is None, noise, lambda key: jax.random.uniform(key, (4,)), key),
    "in a branch of another shape": lambda key: jax.lax.cond(
        key is None, noise, lambda key: jax.random.normal(key, (2, 4)).sum(0), key
    ),
    "by a remat": lambda key: jax.grad(jax.checkpoint(lambda x: jnp.sin(x * noise(key)).sum()))(jnp.ones(4)),
    "by each turn's own": lambda key: sum(noise(jax.random.fold_in(key, i)) for i in range(3)),
}


@pytest.mark.parametrize("case", [*DRAWN_TWICE, *DRAWN_ONCE])
def test_a_key_drawn_from_twice_for_one_shape_is_told_from_a_loss_that_is_computed_again(case: str) -> None:
    draw = {**DRAWN_TWICE, **DRAWN_ONCE}[case]
    found = drawing(lambda key, step: (draw(jax.random.fold_in(key, step)), key))
    assert found == (["key drawn twice"] if case in DRAWN_TWICE else [])


@pytest.mark.parametrize(
    ("size", "through", "expected"),
    [
        (1024, lambda x: x, ["cast back"]),
        (1024, lambda x: x.T.reshape(2, -1), ["cast back"]),  # moved, and nothing done with it
        (1024, jnp.sin, []),
        (16, lambda x: x, []),  # small
    ],
)
def test_what_is_cast_back_is_large_and_untouched_in_between(size: int, through: Any, expected: list[str]) -> None:
    def step(carry: Any, batch: Any) -> Any:
        half = jnp.cos(batch).astype(jnp.bfloat16)
        return carry + through(half).astype(jnp.float32).sum(), None

    report = fs.explain_step(step, jnp.zeros((), jnp.float32), jax.ShapeDtypeStruct((size, size), jnp.float32))
    assert kinds(report) == expected
    assert [each.cost for each in report.findings] == [2 * size * size] * len(expected)


def test_keys_in_a_scan_are_followed() -> None:
    def inner(key: Any, row: Any) -> Any:
        key, used = jax.random.split(key)
        return key, row + jax.random.normal(used, (4,))

    def same(key: Any, row: Any) -> Any:
        return key, row + jax.random.normal(key, (4,))

    for body, expected in ((inner, []), (same, ["key unchanged"])):

        def draw(key: Any, step: Any, body: Any = body) -> Any:
            key, rows = jax.lax.scan(body, key, jnp.zeros((3, 4)))
            return rows.sum(0), key

        assert drawing(draw) == expected


def test_an_evaluation_trains_nothing_and_keeps_its_statistics() -> None:
    def evaluate(carry: Any, batch: Any) -> Any:
        return carry, (batch @ carry["w"]).mean()

    for step in (evaluate, jax.jit(evaluate)):  # which donates nothing, and should not
        assert kinds(fs.explain_step(step, W | {"batch_stats": {"mean": jnp.ones(4)}}, X)) == []


def test_a_head_in_f32_is_as_it_should_be() -> None:
    def step(carry: Any, batch: Any) -> Any:
        def loss_fn(params: Any) -> Any:
            hidden = batch.astype(jnp.bfloat16) @ params["w"].astype(jnp.bfloat16) @ params["v"].astype(jnp.bfloat16)
            return ((hidden.astype(jnp.float32) @ params["head"]) ** 2).mean()

        loss, grads = jax.value_and_grad(loss_fn)(carry)
        return jax.tree.map(lambda leaf, grad: leaf - 0.1 * grad, carry, grads), loss

    report = fs.explain_step(step, W | {"v": jnp.ones((4, 4)), "head": jnp.ones((4, 1))}, X)
    assert kinds(report) == []
    assert set(report.products) == {"bfloat16", "float32"}


# ---- what is given, and what is not done


def test_abstract_arguments_and_an_unjitted_step_say_the_same() -> None:
    reports = [fs.explain_step(step, *args) for step in (simple, fs.jit_step(simple)) for args in ((W, X), abstract())]
    assert len({(*each.instructions.items(), *each.memory.items()) for each in reports}) == 1
    assert {each.name for each in reports} == {"simple"}


def abstract() -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (W, X))


def test_nothing_runs_and_nothing_is_donated() -> None:
    called: list[Any] = []

    def step(carry: Any, batch: Any) -> Any:
        jax.debug.callback(called.append, batch.sum())
        return simple(carry, batch)

    report = fs.explain_step(fs.jit_step(step), W, X)
    jax.effects_barrier()
    assert called == []
    assert not W["w"].is_deleted()
    assert kinds(report) == ["callback"]


def test_static_arguments_and_further_ones_are_told_apart() -> None:
    def step(carry: Any, batch: Any, train: bool, rate: Any, *, mode: str = "a") -> Any:
        new, loss = simple(carry, batch * rate)
        return (new if train else carry), loss

    jitted = jax.jit(step, donate_argnums=0, static_argnums=2, static_argnames="mode")
    report = fs.explain_step(jitted, W, X, True, jnp.float32(1), mode="b")
    assert (kinds(report), report.leaves["others"]) == ([], 1)


def test_explaining_uses_up_no_trace() -> None:
    step = fs.jit_step(fs.assert_max_traces(simple))
    fs.explain_step(step, jax.tree.map(jnp.copy, W), X)
    carry, _ = step(jax.tree.map(jnp.copy, W), X)
    step(carry, X)


# ---- figures


@pytest.mark.parametrize("case", CASES)
def test_figures_are_those_of_xla(case: str) -> None:
    by_hand, _, args = prepare(case)
    report = fs.explain_step(by_hand, *args)
    compiled: Any = jax.jit(by_hand, donate_argnums=0).lower(*args).compile()
    stats, cost = compiled.memory_analysis(), compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    counted = instructions(by_hand, *args)
    assert sum(report.instructions.values()) == counted.total()
    assert dict(report.instructions) == {
        opcode: sum(n for (name, _), n in counted.items() if name == opcode) for opcode, _ in counted
    }
    assert report.cost == {"flops": cost["flops"], "bytes": cost["bytes accessed"]}
    assert report.memory["alias"] == stats.alias_size_in_bytes > 0
    assert report.memory["temp"] == stats.temp_size_in_bytes


def test_matmuls_are_counted_as_by_hand() -> None:
    sizes, rows = (4, 8, 16, 2), 32

    def step(carry: Any, batch: Any) -> Any:
        def loss_fn(params: Any) -> Any:
            x = batch
            for each in params:
                x = jnp.tanh(x @ each)
            return (x**2).mean()

        loss, grads = jax.value_and_grad(loss_fn)(carry)
        return [leaf - 0.1 * grad for leaf, grad in zip(carry, grads, strict=True)], loss

    params = [jnp.ones(each) for each in itertools.pairwise(sizes)]
    once = [2 * rows * math.prod(leaf.shape) for leaf in params]
    report = fs.explain_step(step, params, jnp.ones((rows, 4)))
    assert report.products == {"float32": 3 * sum(once) - once[0]}  # forward, and backward to params and to inputs
    assert report.instructions["dot"] == 8
    assert report.leaves == {"carry": 3, "batch": 1, "others": 0, "carry out": 3, "out": 1, "host": 0}

    def conv(carry: Any, batch: Any) -> Any:
        out = jax.lax.conv_general_dilated(batch, carry, (1, 1), "SAME")
        return carry + out.mean(), out.sum()

    image = fs.explain_step(conv, jnp.ones((6, 3, 3, 3)), jnp.ones((2, 3, 8, 8)))
    assert image.products == {"float32": 2 * 2 * 6 * 8 * 8 * 3 * 3 * 3}


# ---- the report


def test_a_page_fits_a_terminal_whatever_is_found() -> None:
    many = {f"w{i}": jnp.asarray(1.0) for i in range(40)} | W

    def step(carry: Any, batch: Any) -> Any:
        jax.debug.print("{}", batch.sum())
        new, loss = simple({"w": carry["w"]}, batch + jax.random.normal(jax.random.key(0), (4,)))
        return {name: leaf * jnp.float32(2) for name, leaf in carry.items()} | new | {"new": loss}, loss

    report = fs.explain_step(jax.jit(step), many, X)
    lines = str(report).splitlines()
    assert len(lines) < 60
    assert max(map(len, lines)) <= 100
    assert {"weak type", "structure", "key constant", "callback"} <= set(kinds(report))
    assert kinds(report).index("weak type") < kinds(report).index("key constant") < kinds(report).index("callback")


def test_a_report_is_plain_data_for_a_log_and_a_table_for_a_notebook() -> None:
    report = explain("by hand", "weak type")
    told = json.loads(json.dumps(report.to_dict()))
    assert told["findings"][0]["leaves"] == ["carry['meter']['total']: f32[] (weak type) -> f32[]"]
    assert told["memory"] == dict(report.memory)
    rich = html(report)
    assert "weak type" in rich
    assert "carry[&#x27;meter&#x27;]" in rich
    assert "nothing to mend" in html(explain("by hand", ""))


def test_two_steps_are_compared() -> None:
    by_hand, ours, args = prepare("mlp-adam")
    one, other = (fs.explain_step(step, *args) for step in (by_hand, ours))
    same = [line for line in one.compare(other).splitlines()[1:] if line.split()[-1][0] in "+-"]
    assert same == []
    more = one.compare(fs.explain_step(jax.jit(by_hand), *args))
    (alias,) = [line for line in more.splitlines() if line.startswith("memory: alias")]
    assert alias.split()[-3:] == [f"{one.memory['alias']:,}", "0", f"-{one.memory['alias']:,}"]


def test_the_words_of_a_finding() -> None:
    assert str(explain("TrainState", "key unchanged").findings[0]) == (
        "state, key unchanged: a PRNG key is drawn from and returned as it came: each step draws the same\n"
        "  numbers [1 keys]\n"
        "  carry.key: key<fry>[]\n"
        "  likely cause: the key is neither split nor folded with the step's count\n"
        "  fix: key, used = jax.random.split(key) in the step, or jax.random.fold_in(key, step); return the\n"
        "    new key"
    )


# ---- what is refused


def refusal(step: Any, carry: Any) -> str:
    with pytest.raises(fs.SignatureError) as caught:
        fs.explain_step(step, carry, X)
    return str(caught.value)


def test_a_step_is_a_function() -> None:
    assert refusal(3, W) == (
        "explain_step(step): step must be a function (carry, batch, ...) -> (carry, out), jitted or not, and no module "
        "or class\n  got:\n    step: int\n"
        "  likely cause: something else was passed, or the arguments are in another order\n"
        "  fix: explain_step(step, carry, batch)"
    )


def test_a_step_returns_two_things() -> None:
    for wrap in (lambda step: step, jax.jit):
        assert refusal(wrap(lambda carry, batch: carry["w"]), W) == (
            "explain_step(step): must return two things: (carry, out)\n  got:\n    f32[4,4]\n"
            "  likely cause: a result is missing\n  fix: (carry, out)"
        )
    assert "a list was returned" in refusal(lambda carry, batch: [carry, batch.sum()], W)


def test_a_step_that_returns_the_carry_that_it_was_given() -> None:
    """What `apply_gradients` gave was not assigned: moments and count are dropped. Params are only read."""
    tx = optax.adam(1e-3)
    grads_of = fs.value_and_grad(lambda params, state, batch: (((batch @ params["w"]) ** 2).mean(), state))

    def step(carry: fs.Carry, batch: Any) -> tuple[fs.Carry, Any]:
        (loss, grads), state = grads_of(carry.params, carry.state, batch)
        fs.apply_gradients(tx, carry, grads, state)
        return carry, loss

    report = fs.explain_step(step, fs.init_carry({"w": jnp.ones((3, 2))}, {}, tx), jnp.ones((4, 3)))
    (finding,) = report.findings
    assert finding.kind == "state dropped"
    assert {line.partition(":")[0] for line in finding.leaves} == {
        "carry.step",
        "carry.opt_state[0].count",
        "carry.opt_state[0].mu['w']",
        "carry.opt_state[0].nu['w']",
    }


@pytest.mark.parametrize("wrap", [lambda step: step, jax.jit])
def test_a_step_whose_carry_is_in_several_arguments(wrap: Any) -> None:
    """As most loops by hand have it; the fix, typed as it is printed, is a step that can be looked at."""

    def by_hand(params: Any, count: Any, batch: Any) -> Any:
        return params - batch.mean(), count + 1, batch.sum()

    step = wrap(by_hand)
    carry = jnp.ones(3), jnp.int32(0)
    assert "missing a required argument: 'batch'" in refusal(step, carry)
    with pytest.raises(fs.SignatureError) as caught:
        fs.explain_step(step, *carry, jnp.ones(3))
    assert caught.value.leaves == ("a tuple of 3",)
    scope = {"step": step}
    exec(caught.value.fix, scope)  # noqa: S102 (the fix itself)
    as_step: Any = scope["as_step"]
    assert {each.kind for each in fs.explain_step(as_step, carry, jnp.ones(3)).findings} <= {"not donated"}


def test_a_carry_is_a_tree_of_arrays() -> None:
    start = "explain_step(carry): carry must be a tree of arrays, numbers or jax.ShapeDtypeStruct\n  got:\n"
    end = (
        "  likely cause: objects or strings are in the carry, or the arguments are in another order\n"
        "  fix: explain_step(step, carry, batch)"
    )
    assert refusal(simple, {"w": X, "name": "a"}) == f"{start}    carry['name']: str\n{end}"
    assert refusal(simple, {}) == f"{start}    carry: no array in it\n{end}"


def test_microbatches_and_rematerialization_show_what_they_save() -> None:
    def loss_of(block: Any) -> Any:
        return lambda params, state, batch: ((block(block(batch, params), params) ** 2).mean(), state)

    def block(hidden: Any, params: Any) -> Any:
        for _ in range(4):
            hidden = jnp.tanh(hidden @ params["w"])
        return hidden

    tx = optax.sgd(0.1)
    carry, rows = fs.init_carry({"w": jnp.ones((64, 64))}, {}, tx), jnp.ones((1024, 64))
    steps = (
        fs.with_optimizer(loss_of(block), tx),
        fs.with_optimizer(loss_of(block), tx, microbatches=8),
        fs.with_optimizer(loss_of(jax.checkpoint(block)), tx),
    )
    whole, parts, again = (fs.explain_step(step, carry, rows) for step in steps)
    assert whole.memory["temp"] >= 8 * rows.nbytes  # eight layers are kept
    assert parts.memory["temp"] < whole.memory["temp"] / 4
    if jax.__version_info__ >= (0, 10):  # an older XLA drops the barrier on a CPU, and computes nothing again
        assert again.memory["temp"] < whole.memory["temp"] / 1.3
        assert again.cost["flops"] > 1.2 * whole.cost["flops"]
    assert all(each.memory["peak"] >= each.memory["temp"] for each in (whole, parts, again))


def test_its_work_grows_with_the_leaves_and_not_with_their_square() -> None:
    def calls(count: int) -> int:
        carry, profile = {str(i): jnp.float32(i) for i in range(count)}, cProfile.Profile()
        profile.runcall(fs.explain_step, lambda carry, batch: (carry, jnp.float32(0)), carry, 0.0)
        return sum(each.callcount for each in profile.getstats())

    assert calls(800) < 2.5 * calls(400)
