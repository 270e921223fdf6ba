"""What a report says of samples: where they are few nothing is decided, and what is exact is."""

from typing import Any

import pytest

from benchmarks._measure import AGAIN, HAND, OURS, Result, Row, contenders, ratios, summary, verdict
from benchmarks._peers import SAID
from benchmarks._report import by_stack, cells, runs_of, said, why_none

MIXED = [0.9, 1.5, 1.0, 1.1, 0.8, 1.2, 1.3, 0.95, 1.01]
ABOUT = {"command": "python -m benchmarks --full", "commit": "abc", "date": "2026-11-26T10:00:00"}


def row(ours: list[float], again: float = 1.0, unit: str = "s") -> Row:
    """A case in which flaxsplit took so long in each round, and the step by hand one second."""
    samples = {HAND: [1.0] * len(ours), AGAIN: [again] * len(ours), OURS: ours}
    return Row("case", unit, samples, bounds={OURS: 1.02})


def test_a_verdict_can_be_each() -> None:
    assert verdict(row([0.9] * 9)) == "at most 1.02: holds"
    assert verdict(row([1.5] * 9)) == "at most 1.02: broken"
    assert verdict(row(MIXED)).startswith("at most 1.02: not decided")
    assert verdict(row([1.0] * 9)) == "at most 1.02: holds; difference inside the noise"
    assert str(ratios(row([0.5] * 9))[OURS]) == "0.500"


@pytest.mark.parametrize("ours", [[0.5] * 7, [2.0] * 3, [1.0]])
def test_few_samples_of_a_time_have_no_interval_and_decide_nothing(ours: list[float]) -> None:
    found = ratios(row(ours))[OURS]
    assert str(found) == f"{ours[0]:.3f}"
    assert found.spread == (0, 0)
    assert verdict(row(ours)) == "at most 1.02: not decided"


def test_eight_samples_decide() -> None:
    assert "[" in str(ratios(row(MIXED[:8]))[OURS])
    assert verdict(row([0.5] * 8)) == "at most 1.02: holds"


@pytest.mark.parametrize(("ours", "word"), [(1.0, "holds"), (2.0, "broken")])
def test_one_number_of_bytes_is_exact(ours: float, word: str) -> None:
    assert verdict(row([ours], 1.0, "bytes")).startswith(f"at most 1.02: {word}")


def test_how_many_samples_and_how_far_they_spread() -> None:
    assert [each[1:4] for each in contenders(row(MIXED))][-1] == ("9", "1.01 s", "950 ms - 1.2 s")
    assert next(each[1:4] for each in contenders(row([1.0], 1.0, "bytes"))) == ("1", "1 B", "exact")
    assert next(each[1:4] for each in contenders(row([1.0]))) == ("1", "1 s", "")


def test_a_summary_ends_with_its_verdict() -> None:
    rows = [row([0.9] * 9), row([0.9] * 9), row([1.5] * 9), row([1.0] * 3)]
    (line,) = summary([Result("dispatch", "", rows[:2], "full", about={})])
    assert line[-2:] == ("2", "holds")
    (line,) = summary([Result("dispatch", "", rows, "full", about={})])
    assert line[-2:] == ("4", "holds in 2, broken in 1, not decided in 1")


def test_results_of_several_runs_are_told_apart() -> None:
    def results(*abouts: dict[str, Any]) -> list[Result]:
        return [Result("scan", "", [], "full", about=about) for about in abouts]

    later = ABOUT | {"date": "2026-11-26T23:00:00"}
    assert runs_of(results(ABOUT, later)) == "All of one run: `python -m benchmarks --full`, of abc, on 2026-11-26."
    for other in ({"commit": "def"}, {"date": "2026-11-27T00:00:00"}, {"command": "python -m benchmarks scan --full"}):
        assert runs_of(results(ABOUT, ABOUT | other)).startswith("The claims are of several runs")


def test_what_was_measured_with_other_versions_is_a_table_of_its_own() -> None:
    def of(claim: str, python: str, day: str) -> Result:
        machine = {"device": "cpu", "processor": "x", "cores": 2, "python": python, "date": day}
        versions = dict.fromkeys(("jax", "flax", "optax"), "1")
        return Result(claim, "", [], "full", about=ABOUT | machine | {"versions": versions})

    old, older = of("dispatch", "3.11", "2026-11-24"), of("scan", "3.11", "2026-11-23")
    new = of("mesh", "3.13", "2026-11-30")
    assert by_stack([old, new, older]) == [[new], [old, older]]


def test_what_is_missing_is_not_what_refuses() -> None:
    words = ("refuses a batch of another shape", "skipped: equinox is not installed", "has no such thing")
    assert [why_none(each) for each in words] == ["refuses", "not installed", "-"]


def test_what_is_said_of_a_situation_is_a_table_and_no_column() -> None:
    words = "by hand", "batch[0], now f32[5,8] and before f32[16,8]", "batch[0]: f32[16,8] -> f32[5,8]"
    told = dict(zip(SAID, words, strict=True))
    ragged = Row("ragged last batch", "compiles", {HAND: [2.0]}, OURS, notes={HAND: "two shapes", **told})
    result = Result("recompilation", "", [ragged], "full")
    assert cells(result) == {"ragged last batch": {HAND: ("2", "two shapes")}}
    page = "\n".join(said(result))
    assert "| ragged last batch | `by hand` | `batch[0], now f32[5,8] and before f32[16,8]` | `batch[0]: f32" in page
