"""Builds the sdist and the wheel, checks both, and runs the tests on what was built. `make versions` calls it.

`nox --list` names the sessions. What follows `--` chooses tests; `RECORD=file` stores what a session passed.
"""

import filecmp
import os
import pathlib
import shutil
import sys

import nox

ROOT = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT)]

from tools import dist, floors, newest, release  # noqa: E402 (found beside this file)

PYPROJECT = ROOT / "pyproject.toml"
PYTHONS = nox.project.python_versions(nox.project.load_toml(PYPROJECT))  # the classifiers
MATRIX = [nox.param(python, end, id=f"{python}-{end}") for python in PYTHONS for end in ("lowest", "newest")]
BUILT = ROOT / "build" / "dist"
CACHE = {"FLAXSPLIT_JAX_CACHE": str(ROOT / "build" / "jax")}  # of XLA, shared with `make test`

nox.needs_version = ">=2025.2.9"
nox.options.envdir = ".venv-nox"
nox.options.download_python = "never"
# nox looks on PATH, where pyenv's shims stand before what they refuse to start.
FOUND = [python for version in PYTHONS if (python := newest.found(version))]
os.environ["PATH"] = os.pathsep.join([*(str(pathlib.Path(python).parent) for python in FOUND), os.environ["PATH"]])


@nox.session(venv_backend="none")
def built(session: nox.Session) -> None:
    """The sdist, and the wheel from it: `twine check`, file by file, and the same wheel as from this folder."""
    shutil.rmtree(BUILT, ignore_errors=True)
    session.run(sys.executable, "-m", "build", "--outdir", str(BUILT))
    session.run(sys.executable, "-m", "build", "--wheel", "--outdir", str(BUILT / "again"))
    session.run(sys.executable, "-m", "twine", "check", "--strict", str(wheel()), str(sdist()))
    if found := dist.findings(ROOT, wheel(), sdist()):
        session.error("\n".join(["not what should be in it:", *found]))
    if not filecmp.cmp(wheel(), BUILT / "again" / wheel().name, shallow=False):
        session.error("the sdist builds another wheel than the folder that it was made from")


@nox.session(requires=["built"], reuse_venv=False)
def empty(session: nox.Session) -> None:
    """The wheel in an empty environment, with its dependencies alone: a recipe and the README train there."""
    session.install(str(wheel()))
    session.run("python", "-m", "pip", "check")
    session.chdir(session.create_tmp())
    session.run("python", "-I", "-W", "error", str(ROOT / "examples" / "recipes" / "batch_norm.py"))
    pathlib.Path("readme.py").write_text(release.program((ROOT / "README.md").read_text()))
    session.run("python", "-I", "-W", "error", "readme.py")


@nox.session(requires=["built"], reuse_venv=True)
@nox.parametrize("python,end", MATRIX)
def versions(session: nox.Session, end: str) -> None:
    """The tests on the wheel, outside the source tree, with the lowest or the newest of every dependency."""
    key = f"{session.python}-{end}"
    folder = pathlib.Path(session.create_tmp()).resolve()
    tree = unpacked(folder / "sdist")
    session.install("--force-reinstall", "--no-deps", str(wheel()))  # pip takes an equal version for the same wheel
    if end == "newest":
        session.install("--upgrade", "--upgrade-strategy", "eager", f"{wheel()}[test]")
    else:
        pins = folder / "floors.txt"
        pins.write_text("\n".join(floors.floors(PYPROJECT.read_text())))
        session.install("-c", str(pins), f"{wheel()}[test,types]", str(tree / "stubs"))
    session.chdir(tree)
    chosen = session.posargs or ["tests", "--pyargs", "flaxsplit"]
    # As many processes as the smallest machine has cores; worksteal, because a few tests compile for much longer.
    session.run("pytest", "-n", "2", "--dist", "worksteal", f"--junitxml={folder / 'junit.xml'}", *chosen, env=CACHE)
    # From 3.13 on, stubtest expects a dataclass to have a `__replace__` that the oldest Flax's Module has not.
    if end == "lowest" and "tests" in chosen and session.python != "3.13":
        session.run("python", "stubs/check")
    if path := os.environ.get("RECORD"):
        session.run("python", "tools/record.py", key, str(folder / "junit.xml"), str(ROOT / path), *session.posargs)


def wheel() -> pathlib.Path:
    """The one that was built."""
    return next(BUILT.glob("*.whl"))


def sdist() -> pathlib.Path:
    """The one that was built."""
    return next(BUILT.glob("*.tar.gz"))


def unpacked(folder: pathlib.Path) -> pathlib.Path:
    """The sdist without the package: only the installed one can then be imported."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.unpack_archive(sdist(), folder)
    (tree,) = folder.iterdir()
    shutil.rmtree(tree / "flaxsplit")
    return tree
