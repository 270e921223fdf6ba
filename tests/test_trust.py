"""What the package does not do: no network, no pickle, no eval, no files, no processes, and the same wheel twice."""

import ast
import hashlib
import pathlib
import subprocess
import sys

import pytest

import flaxsplit as fs
from tools import dist

from .flags import needs_jit

PACKAGE = pathlib.Path(fs.__file__).parent
ROOT = PACKAGE.parent
MODULES = sorted(PACKAGE.rglob("*.py"))
FORBIDDEN = {"socket", "ssl", "http", "urllib", "requests", "pickle", "marshal", "shelve", "subprocess", "ctypes", "io"}
CALLS = {"eval", "exec", "compile", "open", "__import__", "input", "breakpoint"}

USE = """
import sys
import jax, jax.numpy as jnp, flax.linen as nn, optax

bad = []
def hook(event, args):
    watched = ("socket.", "urllib.", "pickle.", "marshal.", "subprocess.", "os.", "shutil.", "ctypes.", "open", "exec")
    if not event.startswith(watched):
        return
    caller = sys._getframe(1)
    while caller is not None and caller.f_code.co_filename.startswith("<frozen"):  # the import system
        return
    if caller is not None and "flaxsplit" in caller.f_globals.get("__name__", ""):
        bad.append((event, caller.f_code.co_filename, caller.f_lineno))

import flaxsplit as fs

sys.addaudithook(hook)

class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train, axis_name="batch")(nn.Dense(4)(x))
        return nn.Dense(1)(nn.Dropout(0.1, deterministic=not train)(x))

x = jnp.ones((8, 3))
params, state = fs.split_params(Model().init(jax.random.key(0), x, train=False), trainable="Dense_*/*")
state |= fs.rng_state(dropout=jax.random.key(1))
apply = fs.with_rngs(fs.vmap_stateful(fs.with_mutable(Model()), axis_name="batch"))
def loss_fn(params, state, batch):
    pred, state = apply(params, state, batch)
    return (pred**2).mean(), state
tx = optax.adam(1e-3)
state = fs.settle_state(apply, params, state, x)
carry = fs.init_carry(params, state, tx)
with fs.compile_log():
    step = fs.jit_step(fs.assert_max_traces(fs.with_ema(fs.with_optimizer(loss_fn, tx), decay=0.9)))
    try:
        step(carry, x)
    except fs.CollectionError:
        pass
    step = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(loss_fn, tx, microbatches=2)), like=carry)
    carry, loss = step(carry, x)
(loss, grads), state = fs.value_and_grad(loss_fn)(carry.params, carry.state, x)
carry = fs.apply_gradients(tx, carry, grads, state)
fs.adopt_carry(jax.device_get(carry._replace(state={k: v for k, v in carry.state.items()})), carry)
fs.merge_state(carry.params, carry.state)
print(bad)
"""


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_reaches_outside(module: pathlib.Path) -> None:
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            assert not {name.name.partition(".")[0] for name in node.names} & FORBIDDEN
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] not in FORBIDDEN
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in CALLS


@needs_jit
def test_nothing_is_opened_while_it_runs() -> None:
    done = subprocess.run([sys.executable, "-c", USE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> list[pathlib.Path]:
    """Two, built one after the other."""
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("the built wheel is tested, without its sources")
    folders = [tmp_path_factory.mktemp("wheel") for _ in range(2)]
    for folder in folders:
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
        subprocess.run(command, check=True, capture_output=True)
    return [wheel for folder in folders for wheel in folder.glob("*.whl")]


def test_two_builds_give_the_same_wheel(wheels: list[pathlib.Path]) -> None:
    first, second = (hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels)
    assert first == second


def test_the_wheel_holds_exactly_the_package_and_its_licence(wheels: list[pathlib.Path]) -> None:
    assert dist.of_wheel(ROOT, wheels[0]) == []
