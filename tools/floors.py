"""`noxfile.py`: pyproject.toml's lowest versions, of what runs and of what the tests take, as constraints for pip."""

import pathlib
import tomllib


def floors(pyproject: str) -> list[str]:
    """Turns `name>=version` into `name==version`: for each dependency, and for each of the extra `test`."""
    project = tomllib.loads(pyproject)["project"]
    pins = []
    for requirement in project["dependencies"] + project["optional-dependencies"]["test"]:
        name, floor = requirement.split(">=")  # a dependency in any other form is an error, not a guess
        pins.append(f"{name}=={floor}")
        if name == "jax":  # jax takes a range of jaxlibs; the floor means both
            pins.append(f"jaxlib=={floor}")
    return pins


if __name__ == "__main__":
    root = pathlib.Path(__file__).parent.parent
    print(*floors((root / "pyproject.toml").read_text()), sep="\n")
