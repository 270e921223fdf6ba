"""`tools/types_table.py`: type checkers, run over the type tests and the recipes, and what they find."""

import functools
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
READ = ["tests/typing", "examples/recipes"]


@dataclass(frozen=True, order=True)
class Finding:
    """One error of one checker; its words, of which the first line is kept, are not compared."""

    file: str
    line: int
    column: int
    code: str
    message: str = field(compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", self.message.partition("\n")[0])


class Setting(NamedTuple):
    """What a checker reads: an interpreter's packages, with some replaced by `Any`."""

    python: str
    stubs: pathlib.Path | None = None


def run_mypy(folder: pathlib.Path, setting: Setting) -> set[Finding]:
    """Runs `mypy --strict` under the settings of the project."""
    options = ["--strict", "--output=json", "--config-file", str(ROOT / "pyproject.toml")]
    options += ["--python-executable", setting.python, f"--cache-dir={folder / '.mypy_cache'}"]
    env = os.environ | {"MYPYPATH": str(setting.stubs or "")}
    command = [sys.executable, "-m", "mypy", *options, *READ]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode > 1 or done.stderr:
        raise SystemExit(done.stdout + done.stderr)
    found = map(json.loads, done.stdout.splitlines())
    fields = ("file", "line", "column", "code", "message")
    return {Finding(*(each[name] for name in fields)) for each in found if each["severity"] == "error"}


def run_pyright(folder: pathlib.Path, setting: Setting, program: str = "pyright") -> set[Finding]:
    """Runs pyright, or what is made from it, in strict mode with nothing switched off."""
    config = {"include": READ, "typeCheckingMode": "strict", "enableTypeIgnoreComments": False}
    if setting.stubs:
        config["stubPath"] = os.path.relpath(setting.stubs, folder)
    (folder / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", program, "--outputjson", "--pythonpath", setting.python]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode > 1:
        raise SystemExit(done.stdout + done.stderr)
    found = json.loads(done.stdout)["generalDiagnostics"]
    return {
        Finding(
            str(pathlib.Path(f["file"]).resolve().relative_to(folder.resolve())),
            f["range"]["start"]["line"] + 1,
            f["range"]["start"]["character"],
            f.get("rule", "syntax"),
            f["message"],
        )
        for f in found
        if f["severity"] == "error"
    }


def run_ty(folder: pathlib.Path, setting: Setting) -> set[Finding]:
    """Runs ty as it comes."""
    paths = ["--extra-search-path", str(setting.stubs)] if setting.stubs else []
    found = read_json("ty", "check", "--python", setting.python, *paths, "--output-format=gitlab", *READ, cwd=folder)
    return {
        Finding(each["location"]["path"], at["line"], at["column"], each["check_name"], each["description"])
        for each in found
        for at in [each["location"]["positions"]["begin"]]
        if each["severity"] == "major"
    }


def run_pyrefly(folder: pathlib.Path, setting: Setting) -> set[Finding]:
    """Runs pyrefly as it comes."""
    (folder / "pyrefly.toml").write_text(f"project-includes = {READ}")  # else it looks for one in the folders above
    paths = ["--search-path", str(setting.stubs)] if setting.stubs else []
    options = ["--config=pyrefly.toml", "--output-format=json", "--python-interpreter-path", setting.python, *paths]
    found = read_json("pyrefly", "check", *options, cwd=folder)["errors"]
    fields = ("path", "line", "column", "name", "description")
    return {Finding(*(each[name] for name in fields)) for each in found if each["severity"] == "error"}


def run_zuban(folder: pathlib.Path, setting: Setting) -> set[Finding]:
    """Runs zuban as `mypy --strict` is run. It has no JSON."""
    options = ["--strict", "--show-column-numbers", "--config-file", str(ROOT / "pyproject.toml")]
    options += ["--python-executable", setting.python]
    env = os.environ | {"MYPYPATH": str(setting.stubs or "")}
    command = [str(pathlib.Path(sys.executable).parent / "zmypy"), *options, *READ]
    lines = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True).stdout.splitlines()
    found = filter(None, (re.fullmatch(r"(.+):(\d+):(\d+): error: (.*)  \[([\w-]+)\]", line) for line in lines))
    groups = (match.groups() for match in found)
    return {Finding(file, int(line), int(column), code, said) for file, line, column, said, code in groups}


def read_json(*command: str, cwd: pathlib.Path) -> Any:
    """Runs a checker and reads its JSON. A checker returns 1 where it found something."""
    done = subprocess.run([sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True)
    if done.returncode > 1:
        raise SystemExit(done.stdout + done.stderr)
    return json.loads(done.stdout)


Run = Callable[[pathlib.Path, Setting], set[Finding]]
RUN: dict[str, Run] = {"mypy": run_mypy, "pyright": run_pyright, "ty": run_ty, "pyrefly": run_pyrefly}
# Reported, and not checked.
REPORTED: dict[str, Run] = {"basedpyright": functools.partial(run_pyright, program="basedpyright"), "zuban": run_zuban}
