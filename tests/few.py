"""Which tests `make test` runs in part, to answer in minutes; `make newest` and `lowest` run each of them whole."""

from collections import defaultdict

import pytest

FEW = {
    "test_docs.py::test_what_a_page_shows_is_what_comes": 0,
    "test_explain.py::test_a_planted_fault_is_found_alone_and_by_name": 37,
    "test_explain.py::test_the_steps_of_the_other_tests_are_good": 1,
    "test_explicit.py::test_it_equals_one_device_and_compiles_once": 5,
    "test_fuzz.py": 0,
    "test_laws.py::test_with_optimizer_equals_the_guides_loop": 4,
    "test_linear.py::test_a_drawn_right_program_warns_of_nothing": 0,
    "test_linear.py::test_each_planted_mistake_is_found": 0,
    "test_linear.py::test_no_tracer_leaks": 0,
    "test_mesh.py::test_each_device_computes_its_own_rows_of_a_microbatch": 8,
    "test_mesh.py::test_every_model_on_a_mesh": 4,
    "test_mesh.py::test_every_optimizer_on_a_mesh": 4,
    "test_mesh.py::test_one_compile_for_every_placement": 6,
    "test_nnx.py::test_training_equals_nnx_bit_for_bit": 5,
    "test_nnx.py::test_with_any_optimizer": 1,
    "test_overwrite.py::test_scales_of_each_example_are_refused_with_the_line_that_joins_them": 0,
    "test_overwrite.py::test_the_mistakes_of_others_give_other_scales": 2,
}
"""Of tests that compile much, how many of their cases are run, spread over all of them; of a file, how many tests."""


def mark(items: list[pytest.Item]) -> None:
    """Marks all other cases of these tests as `exhaustive`."""
    cases = defaultdict[str, list[pytest.Item]](list)
    for item in items:
        test = item.nodeid.partition("[")[0].rpartition("/")[2]
        cases[test if test in FEW else test.partition("::")[0]].append(item)
    for name, count in FEW.items():
        found = cases[name]
        kept = {len(found) * i // count for i in range(count)}
        for i, item in enumerate(found):
            if i not in kept:
                item.add_marker(pytest.mark.exhaustive)
