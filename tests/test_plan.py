"""A benchmark run of some minutes: the most valuable first, stored at once, resumed after a kill, late by one case."""

import importlib
import json
import os
import pathlib
import random
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from benchmarks import _measure as m
from benchmarks import _plan
from benchmarks.__main__ import CLAIMS as ALL

from .flags import needs_defaults, needs_jit

pytestmark = [needs_jit, needs_defaults]
ROOT = pathlib.Path(__file__).parent.parent
CLAIMS = [item.claim for item in _plan.ORDER]


class World:
    """A clock that only claims move, and what they were asked to measure."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cases: dict[str, dict[str, float]]) -> None:
        self.now, self.measured, self.cases = 0.0, list[str](), cases
        monkeypatch.setattr(importlib, "import_module", self.module)

    def module(self, name: str, package: str | None) -> Any:
        """A claim whose cases take the seconds that are said for them."""
        claim = name.removeprefix(".")

        def measure(effort: m.Effort, tell: m.Tell) -> Iterator[m.Row]:
            for case, seconds in self.cases.get(claim, {}).items():
                if effort.wants(case):
                    self.now += seconds
                    self.measured.append(f"{claim}: {case}")
                    yield m.Row(f"{case}, of many", "s", {m.HAND: [seconds], m.OURS: [seconds]})

        return types.SimpleNamespace(measure=measure, __doc__="A claim.")

    def plan(self, minutes: float, folder: pathlib.Path, resume: bool = False) -> _plan.Plan:
        """Runs one."""
        plan = _plan.Plan(minutes, folder, CLAIMS, lambda: self.now)
        if resume:
            plan.resume()
        list(plan.run(m.EFFORTS["lease"], lambda words: None))
        return plan


CASES: dict[str, dict[str, float]] = {
    "scan": {"1": 5.0, "2": 5.0, "3": 5.0},
    "throughput": {"MLP": 20.0, "transformer": 60.0, "ResNet-50, bf16": 90.0},
    "memory": {"64": 1.0},
}


def test_the_most_valuable_case_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    world = World(monkeypatch, CASES)
    plan = world.plan(60, tmp_path)
    scans = ["scan: 1", "scan: 2", "scan: 3"]
    large = ["throughput: ResNet-50, bf16", "throughput: transformer"]
    assert world.measured == [*large, *scans, "memory: 64", "throughput: MLP"]
    assert plan.left == []


def test_what_there_is_no_time_for_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    world = World(monkeypatch, CASES)
    plan = world.plan(200 / 60, tmp_path)  # 90 s; then 110 are expected of the transformer, and there they are
    assert world.measured[:2] == ["throughput: ResNet-50, bf16", "throughput: transformer"]
    assert plan.left == ["throughput: MLP"]  # 60 are expected, 34 are left
    assert world.now <= 200


def test_every_claim_has_its_place_in_a_plan() -> None:
    assert {*CLAIMS} == {*ALL}


@pytest.mark.parametrize("effort", ["lease", "full"])
@pytest.mark.parametrize("claim", ALL)
def test_each_case_of_a_claim_has_a_name_of_its_own(claim: str, effort: str) -> None:
    """Else a plan takes the second for one that it has measured."""
    cases: list[str] = []

    def wants(case: str) -> bool:
        cases.append(case)
        return False

    asked = replace(m.EFFORTS[effort], wants=wants, planned=True)
    list(importlib.import_module(f"benchmarks.{claim}").measure(asked, lambda words: None))
    assert cases
    assert len({*cases}) == len(cases)


def test_a_smoke_begins_every_claim(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    world = World(monkeypatch, {claim: {str(i): 2.0 for i in range(30)} for claim in CLAIMS})
    plan = _plan.Plan(1, tmp_path, CLAIMS, lambda: world.now)
    list(plan.run(m.EFFORTS["smoke"], lambda words: None))
    assert {case.partition(":")[0] for case in world.measured} == {*CLAIMS}
    assert world.now <= 62


def test_only_changed_code_makes_a_commit_dirty(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "benchmarks"
    for name in ("benchmarks/results", "flaxsplit"):
        (tmp_path / name).mkdir(parents=True)
    (folder / "claim.py").write_text("")
    author = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "one"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)  # noqa: S607
    clean = m.commit(folder)
    (folder / "results" / "scan.json").write_text("{}")
    assert m.commit(folder) == clean
    (tmp_path / "flaxsplit" / "new.py").write_text("")
    assert m.commit(folder) == f"{clean}-dirty"
    (tmp_path / "flaxsplit" / "new.py").unlink()
    (folder / "claim.py").write_text("changed")
    assert m.commit(folder) == f"{clean}-dirty"
    assert m.commit(pathlib.Path("/")) == "unknown"


@pytest.mark.parametrize("minutes", [0.5, 1.0, 2.0, 3.0, 5.0, 8.0])
def test_a_run_is_late_by_one_case_at_most(
    minutes: float, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    slow = {claim: {case: 400.0 for case in cases} for claim, cases in CASES.items()}  # noqa: C420 (not one object)
    world = World(monkeypatch, slow)
    world.plan(minutes, tmp_path)
    assert world.now <= 60 * minutes + 400
    assert len(world.measured) <= 60 * minutes / 400 + 1


def test_a_second_run_goes_on_where_the_first_one_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    world = World(monkeypatch, CASES)
    first = world.plan(200 / 60, tmp_path)
    before = [*world.measured]
    again = world.plan(60, tmp_path, resume=True)
    assert world.measured == before + first.left
    assert again.left == []
    stored = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert {claim: sorted(each["cases"]) for claim, each in stored.items()} == {
        claim: sorted(cases) for claim, cases in CASES.items()
    }
    assert [len(each["rows"]) for each in stored.values()] == [len(each["cases"]) for each in stored.values()]


def test_another_commit_or_device_starts_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    world = World(monkeypatch, CASES)
    world.plan(60, tmp_path)
    stored = json.loads((tmp_path / "scan.json").read_text())
    stored["about"]["device"] = "another"
    (tmp_path / "scan.json").write_text(json.dumps(stored))
    world.measured.clear()
    world.plan(60, tmp_path, resume=True)
    assert world.measured == ["scan: 1", "scan: 2", "scan: 3"]


KILLS = int(os.environ.get("PLAN_KILLS", "3"))
ARGUMENTS = ["memory", "scan", "dispatch", "--smoke", "--minutes", "3"]


@pytest.mark.slow
def test_killed_at_any_moment_it_is_resumed_and_complete(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "benchmarks", *ARGUMENTS, "--out", str(tmp_path), "--resume"]
    chance = random.Random(0)  # noqa: S311 (a moment, not a secret)
    for _ in range(KILLS):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(chance.uniform(2, 12))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for path in tmp_path.glob("*.json"):
            stored = m.load(path)  # whole at every moment
            assert stored.cases
            assert all(row.samples for row in stored.rows)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "0 cases left out" in done.stdout.replace("\n", " ")
    cases = {path.stem: m.load(path).cases for path in tmp_path.glob("*.json")}
    assert cases == {
        "memory": ["width 16"],
        "scan": ["2 steps, 16 wide"],
        "dispatch": ["MLP, 8 layers", "MLP, every peer", "10 leaves"],
    }


@pytest.mark.slow
def test_it_needs_no_package_that_a_lent_machine_may_lack(tmp_path: pathlib.Path) -> None:
    code = f"""
import sys
for name in ("typeguard", "haiku", "beartype", "sklearn", "hypothesis", "pytest", "orbax"):
    sys.modules[name] = None  # cannot be imported, and is not found
import importlib
from benchmarks import __main__, _plan, _report
for item in _plan.ORDER:
    importlib.import_module("benchmarks." + item.claim)
assert __main__.main(["memory", "--smoke", "--minutes", "1", "--out", {str(tmp_path)!r}]) == 0
assert __main__.main(["report", "--out", {str(tmp_path)!r}]) == 0
"""
    environment = {name: value for name, value in os.environ.items() if name != "FLAXSPLIT_TYPECHECKER"}  # not there
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.md").exists()
