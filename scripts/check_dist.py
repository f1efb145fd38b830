"""Compare a built wheel and source distribution with the files that git has.

    python -m build && python -m scripts.check_dist dist

Exit code 1, and a line for each file that is missing or should not be there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BESIDE = ("PKG-INFO", "README.md", "pyproject.toml", "setup.cfg", "setup.py", "xkv.egg-info/")
"""What a source distribution has besides the packages."""


def packed_files() -> dict[str, str]:
    """Files of the packages, but for documents, by their names in a wheel."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "xkv", "backends"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    names = {name for name in listed if not name.endswith(".md") and (ROOT / name).is_file()}
    return {f"xkv/{name}" if name.startswith("backends/") else name: name for name in names}


def differences(kind: str, found: set[str], wanted: set[str]) -> list[str]:
    """Sentences on what is missing in a distribution, and what should not be there."""
    missing = [f"the {kind} lacks {name}" for name in sorted(wanted - found)]
    return missing + [f"the {kind} has {name} too" for name in sorted(found - wanted)]


def check_wheel(path: Path) -> list[str]:
    """What is wrong with a wheel's files."""
    found = {x for x in zipfile.ZipFile(path).namelist() if not x.endswith("/")}
    packed = {x for x in found if not x.split("/")[0].endswith(".dist-info")}
    return differences("wheel", packed, set(packed_files()))


def check_sdist(path: Path) -> list[str]:
    """What is wrong with a source distribution's files."""
    with tarfile.open(path) as archive:
        found = {x.name.partition("/")[2] for x in archive.getmembers() if x.isfile()}
    packed = {x for x in found if not x.startswith(BESIDE)}
    return differences("source distribution", packed, set(packed_files().values()))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.check_dist", description=__doc__)
    parser.add_argument("folder", type=Path, help="where one wheel and one sdist are")
    folder = parser.parse_args().folder
    wheels, sdists = list(folder.glob("*.whl")), list(folder.glob("*.tar.gz"))
    if (len(wheels), len(sdists)) != (1, 1):
        parser.error(f"{folder} has to hold one wheel and one source distribution")
    wheel, sdist = wheels[0], sdists[0]
    found = check_wheel(wheel) + check_sdist(sdist)
    print("\n".join(found) or f"{wheel.name} and {sdist.name} have what git has, and no more")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
