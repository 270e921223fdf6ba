"""`noxfile.py`: what the wheel and the sdist hold, beside what they should."""

import pathlib
import subprocess
import tarfile
import zipfile


def findings(root: pathlib.Path, wheel: pathlib.Path, sdist: pathlib.Path) -> list[str]:
    """Each file too many or too few in the two, made from the folder `root`."""
    return [*of_wheel(root, wheel), *of_sdist(root, sdist)]


def of_wheel(root: pathlib.Path, wheel: pathlib.Path) -> list[str]:
    """The wheel holds the package's modules, its mark of being typed, its licence and what says so; nothing else."""
    package = [path for path in (root / "flaxsplit").rglob("*") if path.suffix == ".py" or path.name == "py.typed"]
    about = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    told = {f"{about}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")}
    expected = {path.relative_to(root).as_posix() for path in package} | told
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    return [*differences(wheel.name, set(names), expected), *(f"{name}: twice" for name in twice(names))]


def of_sdist(root: pathlib.Path, sdist: pathlib.Path) -> list[str]:
    """The sdist holds each file that git tracks, so that all tests run from it, and none that git ignores."""
    with tarfile.open(sdist) as archive:
        names = [member.name.partition("/")[2] for member in archive if not member.isdir()]
    if not (root / ".git").exists():
        return []  # unpacked from an sdist: nobody knows
    tracked, known = (listed(root, *options) | {"PKG-INFO"} for options in (("-c",), ("-c", "-o")))
    return differences(sdist.name, set(names), tracked | (known & set(names)))


def listed(root: pathlib.Path, *options: str) -> set[str]:
    """The files that git tracks (`-c`), or does not yet and does not ignore (`-o`), and that are there."""
    command = ["git", "ls-files", "-z", "--exclude-standard", *options]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return {name for name in done.stdout.split("\0") if name and (root / name).exists()}


def differences(name: str, found: set[str], expected: set[str]) -> list[str]:
    """What is too much, then what is missing."""
    too_many = [f"{name}: {each} should not be there" for each in sorted(found - expected)]
    return too_many + [f"{name}: {each} is missing" for each in sorted(expected - found)]


def twice(names: list[str]) -> list[str]:
    """Names that a zip file holds more than once."""
    return sorted({name for name in names if names.count(name) > 1})
