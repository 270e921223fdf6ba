"""Checks the installed overlay with mypy, pyright, stubtest and a run: `python check` in `stubs`."""

import inspect
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from flax import jax_utils

STUBS = Path(__file__).resolve().parent.parent

# What pyright in strict mode finds in jax and optax, not in flax: parameters without a type in functions that
# every training file calls, and no py.typed in optax.
NOT_OURS = re.compile(
    r'Type of "(ones|zeros|normal|jit|pmap|grad|value_and_grad|eval_shape)" is partially unknown'
    r'|Stub file not found for "optax"'
)


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *args]
    return subprocess.run(command, cwd=STUBS, capture_output=True, text=True, check=False)


def complaints(*args: str) -> list[str]:
    done = run(*args)
    return [] if done.returncode == 0 else (done.stdout + done.stderr).splitlines()


def check_mypy() -> list[str]:
    return complaints("-m", "mypy")


def check_pyright() -> list[str]:
    report = json.loads(run("-m", "pyright", "--outputjson", "--pythonpath", sys.executable).stdout)
    return [
        f"{found['file']}:{found['range']['start']['line'] + 1}: {found['message']}"
        for found in report["generalDiagnostics"]
        if not NOT_OURS.search(found["message"])
    ]


def check_stubtest() -> list[str]:
    source = STUBS / "flax-stubs"
    names = sorted(
        ".".join(("flax", *path.relative_to(source).with_suffix("").parts)) for path in source.rglob("*.pyi")
    )
    if not find_spec("tensorflow"):
        names.remove("flax.metrics.tensorboard")  # imports it, and so cannot be compared
    settings = ["--mypy-config-file", "pyproject.toml", "--allowlist", "allowlist.txt"]
    if sys.version_info >= (3, 13):
        settings += ["--allowlist", "allowlist-3.13.txt"]
    if "axis_name" in inspect.signature(jax_utils.replicate).parameters:
        settings += ["--allowlist", "allowlist-newest.txt"]
    return complaints("-m", "mypy.stubtest", *names, "--concise", *settings)


def check_running() -> list[str]:
    return complaints("check/running.py")


def main() -> int:
    checks = (check_stubtest, check_mypy, check_pyright, check_running)
    with ThreadPoolExecutor(2) as beside:
        found = [done.result() for done in [beside.submit(check) for check in checks]]
    for check, each in zip(checks, found, strict=True):
        print(f"{check.__name__}: {'passed' if not each else 'failed'}", *each, sep="\n  ")
    return int(any(found))


if __name__ == "__main__":
    sys.exit(main())
