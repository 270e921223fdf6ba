"""Every benchmark runs, stores what it measured and says so; what is exact is asserted, no time is."""

import json
import pathlib
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from .flags import needs_defaults, needs_jit

pytestmark = [needs_jit, needs_defaults, pytest.mark.slow]
ROOT = pathlib.Path(__file__).parent.parent
CLAIMS = (ROOT / "benchmarks").glob("[!_]*.py")


def run(*arguments: str | pathlib.Path) -> subprocess.CompletedProcess[str]:
    """Runs the command line as a user does."""
    command = [sys.executable, "-m", "benchmarks", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Where a smoke run of everything stored its results."""
    folder = tmp_path_factory.mktemp("results")
    done = run("--smoke", "--out", folder)
    assert done.returncode == 0, done.stderr
    assert re.search(r"│ memory +│ at most 1\.00", done.stdout)
    assert "benchmarks: done" in done.stdout
    return folder


@pytest.fixture(scope="module")
def results(folder: pathlib.Path) -> Any:
    """What it stored."""
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_every_claim_is_stored_with_versions_device_and_samples(results: Any) -> None:
    assert sorted(results) == sorted(path.stem for path in CLAIMS)
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


def test_each_device_of_a_mesh_computes_and_sends_its_share(results: Any) -> None:
    rows = {row["case"].split(",")[0]: row["samples"] for row in results["mesh"]["rows"]}
    flops, sent = rows["FLOPs per device"], rows["sent per device"]
    assert flops["flaxsplit"] == flops["an equal share"]
    assert flops.get("flaxsplit, Explicit axes", flops["flaxsplit"]) == flops["flaxsplit"]
    assert flops["by hand, blocks of rows"][0] == 2 * flops["flaxsplit"][0]
    assert sent["flaxsplit"] == sent["by hand"] == [2 * sent["flaxsplit, shard_map"][0]]
    assert {count for each in rows["compiles"].values() for count in each} == {1}


def test_flaxsplit_compiles_as_often_as_is_possible_at_all(results: Any) -> None:
    rows = results["recompilation"]["rows"]
    for row in rows:
        assert row["samples"]["flaxsplit"] == [row["work"]["possible"]], row["case"]
    assert {row["work"]["possible"] for row in rows} == {1, 2}
    by_hand = {row["case"]: row["samples"]["by hand"] for row in rows if row["unit"] == "compiles"}
    assert len(by_hand) == 14
    assert by_hand["steady state"] == [1]
    assert by_hand["shape drift"] == [2]  # what the others are there to show
    assert by_hand["sown values"] == by_hand["committed inputs"] == [1]  # an expert knows


def test_contenders_that_compute_something_else_are_not_timed() -> None:
    from benchmarks._peers import DisagreementError, check_agree

    check_agree({"by hand": [1.0, 0.5], "other": [1.0, 0.5001]})
    with pytest.raises(DisagreementError) as caught:
        check_agree({"by hand": [1.0, 0.5], "other": [1.0, 0.6], "third": [1.0, 0.5]})
    assert str(caught.value) == (
        "benchmarks: nothing was timed, the losses differ from those of by hand:\n"
        "  by hand: [1.0, 0.5]\n  other: [1.0, 0.6]"
    )


def test_every_library_builds_the_same_network() -> None:
    import numpy as np
    import optax

    from benchmarks import _nets as nets
    from benchmarks._peers import PEERS, Task, build, check_agree, losses_of, present

    layers = (nets.Conv(4, 3, 2), nets.Norm(), nets.Act(), nets.MaxPool(), *nets.resnet(18, 3, 4)[4:7], nets.Mean())
    networks = {
        (16, 16, 3): (*layers, nets.Dense(3)),
        (6, 8): nets.without_dropout(nets.transformer(1, 8, 2, classes=3)),
    }
    for shape, network in networks.items():
        task = Task(network, shape, make_tx=lambda: optax.sgd(0.01))
        batch = np.random.default_rng(0).normal(size=(8, *shape)).astype(np.float32), np.arange(8) % 3
        peers = {name: build(name, task) for name in present(tuple(PEERS))}
        check_agree({name: losses_of(peer.step, peer.fresh(), batch, 3) for name, peer in peers.items()})


def test_the_largest_batch_is_what_the_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax

    from benchmarks import throughput

    def found(limit: float) -> int:
        device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": limit})
        monkeypatch.setattr(jax, "devices", lambda: [device])
        size: int = throughput.largest(throughput.task_of("MLP", 0, None), lambda words: None)
        return size

    sizes = [found(2.0**power) for power in (20, 29, 31, 33)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 8  # what is tried at least
    assert sizes[3] >= 4 * sizes[2] > 64


def test_a_report_has_every_claim_and_its_pictures(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    done = run("report", "--out", copy)
    assert done.returncode == 0, done.stderr
    page = (copy / "report.md").read_text()
    for path in copy.glob("*.json"):
        assert f"## {path.stem}" in page
    for name in ("recompilation", "throughput-by-case", "nnx-by-case"):
        assert f"![{name}]({name}.svg)" in page
        assert (copy / f"{name}.svg").stat().st_size > 5000
        assert (copy / f"{name}.png").stat().st_size > 5000
    assert "| shape drift | 1 | 2 |" in page


def test_the_readme_takes_its_tables_from_what_is_stored(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    from benchmarks._report import readme

    shutil.copytree(folder, tmp_path / "cpu")
    text = readme("above\n<!-- benchmarks: begin -->\nold\n<!-- benchmarks: end -->\nbelow", tmp_path)
    assert text.startswith("above\n<!-- benchmarks: begin -->\n\nHow often each compiles")
    assert text.endswith("<!-- benchmarks: end -->\nbelow")
    assert "\nold\n" not in text
    assert "| shape drift | 1 | 2 |" in text
    assert "| memory | at most 1.00 of by hand | 1.000 |" in text
    assert "examples/s" not in text
    on_gpu = json.loads((tmp_path / "cpu" / "accumulation.json").read_text())
    on_gpu["about"]["backend"] = "gpu"
    (tmp_path / "cpu" / "accumulation.json").write_text(json.dumps(on_gpu))
    words = readme("<!-- benchmarks: begin -->\n<!-- benchmarks: end -->", tmp_path)
    assert "| examples/s | flaxsplit | by hand | flaxsplit's share of the peak |" in words
    assert re.search(
        r"\| MLP.* \| [\d.e+]+ \| [\d.e+]+ \| \d+% of the peak in FLOP; \d+% of the peak in bytes \|", words
    )


def test_two_runs_are_compared(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    same = run("compare", folder, folder)
    assert same.returncode == 0, same.stderr
    assert "compare: 0 of " in same.stdout
    slower = shutil.copytree(folder, tmp_path / "slower")
    stored = json.loads((slower / "memory.json").read_text())
    stored["rows"][0]["samples"]["flaxsplit"][0] *= 2
    (slower / "memory.json").write_text(json.dumps(stored))
    found = run("compare", folder, slower)
    assert "compare: 1 of " in found.stdout
    assert "2.000" in found.stdout
    assert run("compare", folder).returncode == 2


def test_an_unknown_claim_is_an_error() -> None:
    done = run("speed")
    assert done.returncode == 2
    assert "no such claim: speed; there are recompilation, " in done.stderr
