"""What an installed wheel holds: every module, and the files that are no Python."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_an_installed_wheel_has_the_templates_of_every_page(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src" / "ropeway", tmp_path / "src" / "ropeway", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    code = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=True, env=dict(os.environ))
    (wheel,) = tmp_path.glob("*.whl")
    source = tmp_path / "src"
    expected = {path.relative_to(source).as_posix() for path in (source / "ropeway/reporting").rglob("*.jinja")}
    assert len(expected) >= 5
    assert expected <= set(zipfile.ZipFile(wheel).namelist())
