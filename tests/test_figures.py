"""How the package reads, in figures: `python tools/figures.py` prints them."""

import pathlib
import statistics

import pytest

from tools import figures

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    not (ROOT / "flaxsplit").exists(), reason="the built wheel is tested, without its sources"
)


def test_modules_of_combinators_hold_no_words() -> None:
    found = [each for each in figures.modules() if each.combines]
    assert found
    for each in found:
        assert each.raises == 0, each.name
        assert all(len(text) <= 60 for text in each.strings), each.name  # forms of a call, and keys of dicts


def test_no_file_is_long() -> None:
    assert [each.name for each in figures.modules() if each.lines > 250] == []


def test_bodies_are_short() -> None:
    bodies = sorted(length for each in figures.modules() for length in each.bodies)
    assert statistics.median(bodies) <= 6
    assert bodies[len(bodies) * 9 // 10] <= 20


def test_a_line_more_is_counted(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "_one.py"
    path.write_text('"""Words."""\n\n\ndef one():\n    """Words."""\n    # a reason\n    return 1\n')
    (before,) = figures.modules(tmp_path)
    assert (before.lines, before.running, before.raises, before.strings, before.bodies) == (7, 2, 0, [], [1])
    path.write_text(path.read_text() + f'\n\ndef two():\n    x = "{"a" * 41}"\n    raise ValueError(x)\n')
    (after,) = figures.modules(tmp_path)
    assert (after.running, after.raises, after.strings, after.bodies) == (5, 1, ["a" * 41], [1, 2])
