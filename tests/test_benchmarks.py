"""Every benchmark runs, stores what it measured and says so; what is exact is asserted, no time is."""

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parent.parent
CLAIMS = ["dispatch", "scan", "tracing", "memory", "vmap", "accumulation", "imports", "nnx"]


def run(*arguments: str | pathlib.Path) -> subprocess.CompletedProcess[str]:
    """Runs the command line as a user does."""
    command = [sys.executable, "-m", "benchmarks", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a smoke run of everything stored."""
    folder = tmp_path_factory.mktemp("results")
    done = run("--smoke", "--out", folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("results in ") or "benchmarks: done" in done.stdout
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_every_claim_is_stored_with_versions_device_and_samples(results: Any) -> None:
    assert sorted(results) == sorted(CLAIMS)
    for result in results.values():
        assert {"date", "commit", "command", "python", "versions", "device", "processor"} <= result["about"].keys()
        assert result["rows"]
        for row in result["rows"]:
            assert row["baseline"] in row["samples"]
            assert all(sample > 0 for samples in row["samples"].values() for sample in samples)


def test_a_step_needs_the_memory_of_the_hand_written_one(results: Any) -> None:
    for row in results["memory"]["rows"]:
        assert len({sample for samples in row["samples"].values() for sample in samples}) == 1


def test_microbatches_need_less_memory(results: Any) -> None:
    row = results["accumulation"]["rows"][0]
    assert row["samples"]["2 microbatches"][0] < 0.7 * row["samples"]["1 microbatch"][0]


def test_an_unknown_claim_is_an_error() -> None:
    done = run("speed")
    assert done.returncode == 2
    assert "no such claim: speed; there are dispatch, " in done.stderr


def test_a_verdict_can_be_each() -> None:
    from benchmarks._measure import AGAIN, HAND, OURS, Row, ratios, verdict

    def row(ours: Any, again: float = 1.0) -> Row:
        samples = {HAND: [1.0] * 9, AGAIN: [again] * 9, OURS: ours}
        return Row("case", "s", samples, bounds={OURS: 1.02})

    assert verdict(row([0.9] * 9)) == "at most 1.02: holds"
    assert verdict(row([1.5] * 9)) == "at most 1.02: broken"
    assert "not decided by this run" in verdict(row([0.9, 1.5, 1.0, 1.1, 0.8, 1.2, 1.3, 0.95, 1.01]))
    assert verdict(row([1.0] * 9)) == "at most 1.02: holds; difference inside the noise"
    assert str(ratios(row([0.5] * 9))[OURS]) == "0.500"
