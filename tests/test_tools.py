"""What the tools say of what they found."""

import ast
import json
import pathlib
import subprocess
import sys
import tarfile
import zipfile
from typing import Any

import pytest

from benchmarks._measure import about
from tools import audit, dist, floors, mutants, newest, readability, record, release, trust, written

PYPROJECT = """
[project]
dependencies = ["jax>=0.6.2", "optax>=0.2.5"]
optional-dependencies = { test = ["pytest>=8.2"] }
"""
PACKAGE = ["flaxsplit/__init__.py", "flaxsplit/_step.py", "flaxsplit/py.typed"]
ABOUT = [f"flaxsplit-0.1.0.dist-info/{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")]

ROOT = pathlib.Path(__file__).parent.parent

CLEAN = {"name": "jax", "version": "0.10.2", "vulns": []}
BAD = {"name": "numpy", "version": "1.0", "vulns": [{"id": "PYSEC-1"}]}
UNKNOWN = {"name": "optax", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("reports", "status", "said"),
    [
        (None, 0, "audit: skipped, no data on vulnerabilities was reached"),
        ([UNKNOWN], 0, "audit: skipped, no data on vulnerabilities was reached"),
        ([UNKNOWN, CLEAN], 0, "audit: 1 of 2 distributions looked up, no known vulnerability"),
        ([UNKNOWN, CLEAN, BAD], 1, "audit: known vulnerabilities:\n  numpy 1.0: PYSEC-1"),
    ],
)
def test_an_audit_without_data_is_no_pass(reports: list[object] | None, status: int, said: str) -> None:
    assert audit.verdict(reports) == (status, said)


def test_floors_become_pins() -> None:
    assert floors.floors(PYPROJECT) == ["jax==0.6.2", "jaxlib==0.6.2", "optax==0.2.5", "pytest==8.2"]
    with pytest.raises(ValueError, match="not enough values to unpack"):
        floors.floors(PYPROJECT.replace("pytest>=8.2", "pytest"))


def test_an_interpreter_is_found_by_its_version() -> None:
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert newest.works(newest.found(own), own)
    assert newest.found("2.0") == ""


def folder_of(names: list[str], folder: pathlib.Path) -> pathlib.Path:
    """A folder of empty files."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ([*PACKAGE, *ABOUT], []),
        ([*PACKAGE, *ABOUT, "flaxsplit/notes.txt"], ["flaxsplit/notes.txt should not be there"]),
        ([*PACKAGE, *ABOUT, "tests/models.py"], ["tests/models.py should not be there"]),
        ([*PACKAGE[:-1], *ABOUT], ["flaxsplit/py.typed is missing"]),
        ([*PACKAGE, *ABOUT[:-1]], ["flaxsplit-0.1.0.dist-info/licenses/LICENSE is missing"]),
    ],
)
def test_a_wheel_holds_the_package_and_its_licence(held: list[str], said: list[str], tmp_path: pathlib.Path) -> None:
    wheel = tmp_path / "flaxsplit-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in held:
            archive.writestr(name, "")
    root = folder_of([*PACKAGE, "flaxsplit/notes.txt", "flaxsplit/__pycache__/_step.pyc"], tmp_path / "root")
    assert dist.of_wheel(root, wheel) == [f"{wheel.name}: {each}" for each in said]


def test_an_sdist_holds_what_git_tracks(tmp_path: pathlib.Path) -> None:
    root = folder_of(["Makefile", "new.py", "build/out.txt", "PKG-INFO"], tmp_path / "root")
    (root / ".gitignore").write_text("/build/\nPKG-INFO\n")
    for command in (["init", "-q"], ["add", "Makefile", ".gitignore"]):
        subprocess.run(["git", *command], cwd=root, check=True)  # noqa: S607

    def found(*names: str) -> list[str]:
        sdist = tmp_path / "flaxsplit-0.1.0.tar.gz"
        with tarfile.open(sdist, "w:gz") as archive:
            for name in names:
                archive.add(root / name, f"flaxsplit-0.1.0/{name}")
        return [each.removeprefix(f"{sdist.name}: ") for each in dist.of_sdist(root, sdist)]

    assert found("Makefile", ".gitignore", "PKG-INFO") == found("Makefile", ".gitignore", "PKG-INFO", "new.py") == []
    assert found("Makefile", ".gitignore", "PKG-INFO", "build/out.txt") == ["build/out.txt should not be there"]
    assert found(".gitignore", "PKG-INFO") == ["Makefile is missing"]


def test_what_a_session_passed_is_stored_beside_the_others(tmp_path: pathlib.Path) -> None:
    junit, results = tmp_path / "junit.xml", tmp_path / "versions.json"
    junit.write_text('<testsuites><testsuite tests="9" skipped="2" failures="0" errors="0"/></testsuites>')
    record.main("3.12-newest", str(junit), str(results))
    record.main("3.11-lowest", str(junit), str(results), "tests/test_laws.py")
    stored: dict[str, Any] = json.loads(results.read_text())
    assert list(stored) == ["3.11-lowest", "3.12-newest"]
    assert [(each["passed"], each["skipped"]) for each in stored.values()] == [(7, 2), (7, 2)]
    versions = " | ".join(stored["3.12-newest"]["about"]["versions"][name] for name in trust.LIBRARIES)
    python = stored["3.12-newest"]["about"]["python"]
    assert trust.tested("3.12-newest", stored["3.12-newest"]) == f"| {python} newest | {versions} | 7 | 2 |"
    assert trust.tested("3.13-lowest", None) == "| 3.13 lowest | | | | | | not run | |"
    with pytest.raises(SystemExit, match=r"3.11-lowest ran a part of the tests only: .* tests/test_laws"):
        trust.tested("3.11-lowest", stored["3.11-lowest"])
    junit.write_text('<testsuites><testsuite tests="9" skipped="2" failures="1" errors="0"/></testsuites>')
    with pytest.raises(SystemExit, match="not stored, 1 of 9 tests failed"):
        record.main("3.12-newest", str(junit), str(results))
    assert json.loads(results.read_text()) == stored


CODE = """
@overload
def f(x: int) -> int: ...
def f(x: int) -> int:
    if x:
        return (
            x + 1
        )
    return 0
"""


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("x: int", "x: int | str", True),
        ("@overload", "", True),
        ("if x:", "if not not x:", True),
        ("if x:", "if not x:", False),
        ("x + 1", "x - 1", False),
        ("return 0", "return zip(x, strict=True)", False),
    ],
)
def test_a_change_that_only_a_checker_reads_is_no_mutant(old: str, new: str, same: bool) -> None:
    assert (mutants.skeleton(CODE.replace(old, new)) == mutants.skeleton(CODE)) == same
    assert mutants.skeleton(CODE.replace(old, "(")) is None


@pytest.mark.parametrize(("line", "lines"), [(5, range(5, 6)), (7, range(6, 9)), (9, range(9, 10))])
def test_the_tests_of_a_mutant_are_those_of_its_statement(line: int, lines: range) -> None:
    assert mutants.enclosing(ast.parse(CODE), line) == (lines, "f")


def test_each_survivor_has_one_reason(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = mutants.Mutant("_split.py", "f", "x + 1", "x - 1")
    other = mutant._replace(occurrence=1)
    assert (mutant.name, other.name) == ("_split.py:f: x + 1 -> x - 1", "_split.py:f: x + 1 -> x - 1 (2)")
    (tmp_path / "results").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "flaxsplit").mkdir()
    for name in ("_split.py", "_new.py"):
        (tmp_path / "flaxsplit" / name).touch()
    outcomes = {mutant.name: "survived", other.name: "killed by tests/test_laws.py::test_scan"}
    (tmp_path / "results" / "mutants.json").write_text(json.dumps({"about": about(), "mutants": outcomes}))
    monkeypatch.setattr(trust, "ROOT", tmp_path)
    monkeypatch.setattr(trust, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(trust, "PACKAGE", tmp_path / "flaxsplit")

    def rows(*named: str) -> list[str]:
        reason = f'[[survivors]]\nwhy = "it is the same"\nmutants = {json.dumps(named)}\n'
        (tmp_path / "tests" / "survivors.toml").write_text(reason)
        return trust.mutants()

    expected = {"| `_split.py` | 2 | 1 | 1 |", "| all | 2 | 1 (50.0%) | 1 |", "| 1 | it is the same |"}
    assert expected | {"Not tried then: `_new.py`."} <= set(rows(mutant.name))
    for wrong in ([], [other.name], [mutant.name, other.name], [mutant.name, mutant.name]):
        with pytest.raises(SystemExit, match="each survivor needs one reason"):
            rows(*wrong)


READY = {
    "pyproject": '[project]\nversion = "0.3.0"\n',
    "package": '__version__ = "0.3.0"\n',
    "changelog": "# Changelog\n\n## [Unreleased]\n\n## [0.3.0] - 2027-01-02\n\n- New.\n\n## [0.2.0] - 2026-12-01\n",
    "readme": "Beta, version 0.3.0, and so on.\n",
}


@pytest.mark.parametrize(
    ("text", "old", "new", "said"),
    [
        ("changelog", "", "", []),
        ("changelog", "0.3.0", "0.2.9", ["CHANGELOG.md: no section '## [0.3.0] - YYYY-MM-DD'; rename Unreleased"]),
        ("changelog", " - 2027-01-02", "", ["CHANGELOG.md: no section '## [0.3.0] - YYYY-MM-DD'; rename Unreleased"]),
        ("changelog", "- New.", "", ["CHANGELOG.md: nothing under 0.3.0"]),
        ("changelog", "[Unreleased]", "[Unreleased]\n\n- Left.", ["CHANGELOG.md: entries are left under Unreleased"]),
        ("package", "0.3.0", "0.2.0", ["flaxsplit/__init__.py: __version__ is not 0.3.0"]),
        ("readme", "0.3.0", "0.2.0", ["README.md: does not say version 0.3.0"]),
    ],
    ids=["ready", "no section", "no date", "empty", "left", "package", "readme"],
)
def test_a_release_waits_for_its_texts(text: str, old: str, new: str, said: list[str]) -> None:
    assert release.findings(**(READY | {text: READY[text].replace(old, new)})) == said


def test_the_readme_is_one_program() -> None:
    code = release.program((ROOT / "README.md").read_text())
    compile(code, "README.md", "exec")
    assert code.count("fs.jit_step(") == 2


def test_sentences_are_found_in_a_page() -> None:
    page = "# A title\n\nThe step is compiled by `jit_step`. It [runs](x.md) once:\n\n```py\nno code here\n```\n\n"
    page += "| no | table |\n\n- a list entry\n"
    found = readability.sentences(readability.prose(page))
    assert found == ["The step is compiled by code.", "It runs once:", "a list entry"]
    assert [bool(readability.PASSIVE.search(each)) for each in found] == [True, False, False]


def test_what_a_tool_makes_is_compared_until_it_is_told_to_write(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("as it is")
    texts = {page: "new", other: "as it is"}

    def run(*options: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["tools/made.py", *options])
        return written.written("What it does.", lambda: texts), capsys.readouterr().out

    stale = (1, "not of today: page.md; run `python tools/made.py --write`\n")
    assert run() == stale
    assert not page.exists()
    assert run("--write") == (0, "written: page.md\n")
    assert (run(), page.read_text()) == ((0, ""), "new")
    page.write_text("old")
    assert run() == stale


@pytest.mark.parametrize("tool", sorted((ROOT / "tools").glob("*.py")), ids=lambda tool: tool.stem)
def test_the_first_line_of_a_tool_says_who_calls_it(tool: pathlib.Path) -> None:
    first = (ast.get_docstring(ast.parse(tool.read_text())) or "").partition("\n")[0]
    caller = first.split("`")[1]
    target = caller.removeprefix("make ")
    text = (ROOT / ("Makefile" if target != caller else caller)).read_text()
    assert target == caller or f"\n{target}: " in text
    assert tool.stem in text
