"""Prints pyproject.toml's lowest versions, of what runs and of what the tests take, as constraints for pip."""

import pathlib
import tomllib


def floors(pyproject: str) -> list[str]:
    """Turns `name>=version` into `name==version`: for each dependency, and where the extra `test` names a version."""
    project = tomllib.loads(pyproject)["project"]
    of_tests = [requirement for requirement in project["optional-dependencies"]["test"] if ">=" in requirement]
    pins = []
    for requirement in project["dependencies"] + of_tests:
        name, floor = requirement.split(">=")  # a dependency in any other form is an error, not a guess
        pins.append(f"{name}=={floor}")
        if name == "jax":  # jax takes a range of jaxlibs; the floor means both
            pins.append(f"jaxlib=={floor}")
    return pins


if __name__ == "__main__":
    root = pathlib.Path(__file__).parent.parent
    print(*floors((root / "pyproject.toml").read_text()), sep="\n")
