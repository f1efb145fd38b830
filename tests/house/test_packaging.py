"""What is installed is what the commands need, and nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from scripts.check_dist import BESIDE, check_sdist, check_wheel, packed_files

ROOT = Path(__file__).parents[2]
WHAT_SETUPTOOLS_PACKS = """
import json, setuptools
from distutils.core import run_setup
build = run_setup("setup.py", stop_after="config").get_command_obj("build_py")
build.build_lib = ""
build.ensure_finalized()
print(json.dumps(build.get_output_mapping()))
"""


def test_every_file_of_the_packages_is_packed_and_no_other():
    run = subprocess.run(
        [sys.executable, "-c", WHAT_SETUPTOOLS_PACKS], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == packed_files()


def test_files_that_commands_read_are_among_them():
    found = set(packed_files())
    for name in ("planning/texts/prose.txt", "tiny/checkpoint/model.safetensors", "py.typed"):
        assert f"xkv/{name}" in found
    assert any(name.startswith("xkv/tiny/basis/") for name in found)
    assert "xkv/backends/mlx_metal/kernels/weigh_rows.py" in found


def written(path, names):
    """A wheel or an sdist with empty files."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w") as wheel:
            for name in names:
                wheel.writestr(name, "")
        return path
    with tarfile.open(path, "w:gz") as sdist:
        for name in names:
            sdist.addfile(tarfile.TarInfo(f"xkv-1/{name}"))
    return path


@pytest.mark.parametrize(
    ("check", "suffix", "beside"),
    [(check_wheel, "whl", ["xkv-1.dist-info/METADATA"]), (check_sdist, "tar.gz", BESIDE[:-1])],
    ids=["wheel", "sdist"],
)
def test_what_lacks_or_has_too_much_is_told(check, suffix, beside, tmp_path):
    packed = packed_files()
    names = list(packed if suffix == "whl" else packed.values())
    path = tmp_path / f"xkv.{suffix}"
    assert check(written(path, [*names, *beside])) == []
    found = check(written(path, [*names[1:], *beside, "tests/conftest.py"]))
    assert len(found) == 2
    assert found[0].endswith(f"lacks {names[0]}")
    assert found[1].endswith("has tests/conftest.py too")


def test_versions_of_mlx_lm_known_to_work_are_those_that_are_tested():
    source = (ROOT / "backends" / "mlx_metal" / "model" / "borrowed.py").read_text()
    known = re.search(r'KNOWN_TO_WORK = \("(.+)", "(.+)"\)', source)
    assert known is not None
    oldest, newest = known.groups()
    project, ci = (ROOT / "pyproject.toml").read_text(), (ROOT / ".ci" / "run").read_text()
    assert f'"mlx-lm>={oldest}"' in project
    assert f'"mlx-lm=={newest}"' in project
    assert f"'mlx-lm=={oldest}'" in ci
    assert f"\n{oldest} | {newest}) echo" in ci


def test_python_versions_are_those_that_are_promised():
    project = (ROOT / "pyproject.toml").read_text()
    versions = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    assert f'requires-python = ">={versions[0]}"' in project
    assert f'python_version = "{versions[0]}"' in project
