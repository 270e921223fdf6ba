"""Prints pyproject.toml's lowest version of every runtime dependency, as constraints for pip."""

import pathlib
import tomllib


def floors(pyproject: str) -> list[str]:
    """Turns `name>=version` into `name==version`; anything else in the list is an error, not a guess."""
    pins = []
    for requirement in tomllib.loads(pyproject)["project"]["dependencies"]:
        name, floor = requirement.split(">=")
        pins.append(f"{name}=={floor}")
        if name == "jax":  # jax takes a range of jaxlibs; the floor means both
            pins.append(f"jaxlib=={floor}")
    return pins


if __name__ == "__main__":
    root = pathlib.Path(__file__).parent.parent
    print(*floors((root / "pyproject.toml").read_text()), sep="\n")
