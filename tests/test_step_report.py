"""A report, built by hand: its page, its table beside another one, and its order, to the letter."""

import dataclasses
from typing import Any

import pytest

from flaxsplit._report import Finding, StepReport, order

from .test_messages import whole

HEAD = """
      seconds      trace 0.12, compile 2.00
      leaves       carry 3, batch 1
      work         1.5 Gflops, 2.05 kbytes
      products     bfloat16 1 TFLOP
      memory       argument 1 kB, peak 1.23 MB
      collectives  2 all-reduce 64 B
      HLO          27 instructions: 7 add, 6 dot, 5 exp, 4 mul, 3 sub
"""
FIGURES: dict[str, Any] = {
    "seconds": {"trace": 0.125, "compile": 2.0},
    "leaves": {"carry": 3, "batch": 1},
    "instructions": {"add": 7, "dot": 6, "exp": 5, "mul": 4, "sub": 3, "tanh": 2},
    "cost": {"flops": 1.5e9, "bytes": 2048.0},
    "memory": {"argument": 1000, "peak": 1_234_567},
    "collectives": {"all-reduce": {"times": 2, "bytes": 64}},
    "products": {"bfloat16": 10**12},
}


def finding(leaves: int = 1, **given: Any) -> Finding:
    lines = tuple(f"carry['w{i}']: f32[] (weak type) -> f32[]" for i in range(leaves))
    words = {"kind": "weak type", "group": "compiles", "what": "it compiles twice", "unit": "bytes"}
    words |= {"where": "carry['w0']", "cause": "a number of Python", "fix": "jnp.float32(1)"}
    default: Any = {**words, "leaves": lines, "cost": 0.0}
    return Finding(**default | given)


def report(*findings: Finding, name: str = "step", **given: Any) -> StepReport:
    return StepReport(name=name, findings=findings, devices=2, platform="cpu", **FIGURES | given)


def html(each: Finding) -> str:
    made: Any = report(each)
    return str(made._repr_html_())


def test_a_page_with_findings() -> None:
    many = finding(5, cost=4e6)
    other = finding(kind="dead work", group="work", what="it is dropped", cost=3e9, unit="FLOP")
    assert str(report(many, other)) == whole(f"""
    step: 2 findings, on 2 x cpu{HEAD.rstrip()}

    compiles, weak type: it compiles twice [4 MB]
      carry['w0']: f32[] (weak type) -> f32[]
      carry['w1']: f32[] (weak type) -> f32[]
      carry['w2']: f32[] (weak type) -> f32[]
      carry['w3']: f32[] (weak type) -> f32[]
      ... and 1 more
      likely cause: a number of Python
      fix: jnp.float32(1)

    work, dead work: it is dropped [3 GFLOP]
      carry['w0']: f32[] (weak type) -> f32[]
      likely cause: a number of Python
      fix: jnp.float32(1)
    """)
    assert "carry['w3']" in str(finding(4))
    assert "more" not in str(finding(4))


def test_a_page_without() -> None:
    assert str(report(cost={}, memory={}, collectives={}, products={})) == whole("""
    step: 0 findings, on 2 x cpu
      seconds      trace 0.12, compile 2.00
      leaves       carry 3, batch 1
      work         unknown
      products     none
      memory       unknown
      collectives  none
      HLO          27 instructions: 7 add, 6 dot, 5 exp, 4 mul, 3 sub

    nothing to mend
    """)


def test_a_page_of_a_notebook() -> None:
    head = whole(f"step: 1 finding, on 2 x cpu{HEAD.replace('      ', '  ', 7).rstrip()}")
    cells = ("compiles, weak type", "it compiles twice", "carry[&#x27;w0&#x27;]: f32[] (weak type) -&gt; f32[]")
    row = "".join(f"<td><pre>{cell}</pre></td>" for cell in (*cells, "jnp.float32(1)"))
    expected = f"<pre>{head}</pre><table><tr>{row}</tr></table>"
    assert " ".join(html(finding()).split()) == " ".join(expected.split())
    assert html(finding()).count("\n") == 7
    assert ["... and" in html(finding(leaves)) for leaves in (4, 5)] == [False, True]
    assert "... and 1 more" in html(finding(5))


@pytest.mark.parametrize(
    ("sizes", "shown"),
    [([1] * 12, 9), ([5, *[1] * 11], 9), ([1] * 9, 9), ([1] * 10, 9)],
    ids=["58 lines are too many", "57 are not", "all", "all but one"],
)
def test_a_page_is_a_page(sizes: list[int], shown: int) -> None:
    text = str(report(*map(finding, sizes)))
    assert len(text.splitlines()) < 60
    assert text.count("fix: ") == shown
    assert text.endswith(
        "fix: jnp.float32(1)" if shown == len(sizes) else f"... and {len(sizes) - shown} more: report.findings"
    )


def test_a_long_line_is_wrapped_between_words() -> None:
    room = 100 - len("compiles, weak type: ")
    assert [len(str(finding(what="a" * (room - most) + " b")).splitlines()) for most in (2, 1)] == [4, 5]
    long = str(finding(what="a" * (room - 6) + " well-known")).splitlines()
    assert (len(long), long[1]) == (5, "  well-known")


def test_two_reports_side_by_side() -> None:
    other = report(
        name="another_name_that_is_long", cost={"flops": 1.0}, collectives={}, instructions={"add": 9, "copy": 1}
    )
    assert report(name="a_name_that_is_long").compare(other) == whole("""
                      a_name_that_is_l  another_name_tha
    flops                1,500,000,000                 1  -1,499,999,999
    bytes                        2,048                 0  -2,048
    memory: argument             1,000             1,000
    memory: peak             1,234,567         1,234,567
    all-reduce times                 2                 0  -2
    all-reduce bytes                64                 0  -64
    instructions                    27                10  -17
      add                            7                 9  +2
      dot                            6                 0  -6
      exp                            5                 0  -5
      mul                            4                 0  -4
      sub                            3                 0  -3
      tanh                           2                 0  -2
      copy                           0                 1  +1
    """).replace("a_name_that", "                  a_name_that", 1)


def test_what_costs_most_comes_first_within_its_group() -> None:
    groups = [("work", 1.0), ("compiles", 1.0), ("work", 2.0), ("dispatch", 9.0), ("state", 0.0)]
    ordered = sorted((finding(group=group, cost=cost) for group, cost in groups), key=order)
    assert [(each.group, each.cost) for each in ordered] == [groups[i] for i in (1, 4, 2, 0, 3)]


@pytest.mark.parametrize(
    ("size", "of", "below"), [(1e3, "k", ""), (1e6, "M", "k"), (1e9, "G", "M"), (1e12, "T", "G"), (1e15, "P", "T")]
)
def test_a_figure_has_three_digits_and_the_unit_that_it_is_rounded_to(size: float, of: str, below: str) -> None:
    limit = 0.9995 * size
    for value, said in (
        (size, f"1 {of}"),
        (limit, f"1 {of}"),
        (limit - 0.5, f"999 {below}"),
        (12.34 * size, f"12.3 {of}"),
    ):
        assert f" {said}" in str(report(cost={"": value})).splitlines()[3]


def test_reports_are_values() -> None:
    for each, field in ((finding(), "kind"), (report(), "name")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(each, field, "other")
    assert "instructions" not in repr(report())
    assert report(finding()).to_dict()["findings"] == [dataclasses.asdict(finding()) | {"leaves": [*finding().leaves]}]
