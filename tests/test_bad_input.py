"""More than a thousand wrong calls: each is refused in our words or, for a reason, in JAX's, and changes nothing."""

import inspect
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxsplit as fs
from flaxsplit import _checks
from flaxsplit._errors import Explained
from tests import wrong_calls as wrong

from .flags import needs_caches, needs_jit, needs_nan

ROOT = pathlib.Path(__file__).parent.parent
RIGHT = wrong.fixed()
# A checker of types refuses some of what is accepted without: a list as params.
pytestmark = pytest.mark.skipif(bool(_checks.TYPECHECKER), reason="says what holds without a checker")

CALLS = [
    pytest.param(call, marks=[needs_jit] if call == "jit_step(like=)" else [])  # which jax.jit itself reads
    for call in wrong.CALLS
]


def bytes_of(tree: Any) -> list[bytes]:
    """The values of all leaves; a deleted one has none and fails."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return [np.asarray(leaf).tobytes() for leaf in leaves]


def fixed_bytes() -> list[bytes]:
    return bytes_of([RIGHT.variables, RIGHT.params, RIGHT.state, RIGHT.w, RIGHT.carry])


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.filterwarnings("ignore::flaxsplit.UntouchedStateWarning")  # where the call is right after all
def test_wrong_arguments_are_refused_and_change_nothing(call: str) -> None:
    before = fixed_bytes()
    with fs.compile_log() as log:
        outcomes = {kind: wrong.outcome(call, kind, RIGHT) for kind in wrong.KINDS}
    ours = {kind for kind, name in outcomes.items() if isinstance(getattr(fs, name, None), type)}
    assert all(issubclass(getattr(fs, outcomes[kind]), Explained) for kind in ours)
    expected = dict.fromkeys(wrong.RIGHT.get(call, ()), "accepted") | wrong.FOREIGN.get(call, {})
    made = {kind: each for kind, each in expected.items() if kind in wrong.KINDS}  # not every kind under every flag
    assert {kind: outcome for kind, outcome in outcomes.items() if kind not in ours} == made
    assert fixed_bytes() == before
    if "accepted" not in outcomes.values():  # else the right call among them compiles
        assert not log.compiles["squares"]


def test_every_public_function_is_tried() -> None:
    functions = {name for name, _ in inspect.getmembers(fs, inspect.isfunction) if name[0] != "_"}
    tried = {call.partition("(")[0] for call in wrong.CALLS}
    assert functions - tried == {"compile_log"}  # takes no argument


@pytest.mark.slow
@needs_caches
@needs_jit
@needs_nan
def test_the_page_of_errors_is_of_today() -> None:
    done = subprocess.run([sys.executable, "tools/errors_page.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
