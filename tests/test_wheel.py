"""The wheel alone is enough: installed into an environment without a checkout, it ingests and runs a night."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pyspark
import pytest
import world
import yaml
from deltalake import DeltaTable

ROOT = Path(__file__).parent.parent
SMALL = ("spark.master=local[2]", "spark.driver_memory=2g", "training.epochs=1", "training.encoders=[gru]")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the checkout: setuptools leaves folders behind where it builds."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in ("lib", "conf"):
        unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=unwanted)
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, source)
    offline = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
    subprocess.run([sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", built, source], check=True)
    (file,) = built.glob("nightstream-*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A fresh environment with the wheel; what it depends on is seen through a path to the packages of this one."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False, symlinks=True)
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "--disable-pip-version-check")
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Of a folder that a .pth names, the .pth files are not read: an editable nightstream there stays unseen.
    (packages / "dependencies.pth").write_text(f"{Path(pyspark.__file__).parent.parent}\n", encoding="utf-8")
    return folder


@pytest.fixture
def run(installed, tmp_path):
    """run(program, *arguments): the finished process; it starts in an empty folder and sees nothing of the checkout."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYSPARK_", "SPARK_"))}

    def finished(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(installed / "bin" / program), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return finished


@pytest.mark.slow
def test_the_wheel_carries_every_file_that_is_no_code(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if name.startswith("nightstream/")}
    conf = {path.name: path.read_bytes() for path in (ROOT / "conf").iterdir()}
    assert {name.removeprefix("nightstream/conf/"): text for name, text in files.items() if "/conf/" in name} == conf
    library = ROOT / "lib" / "nightstream"
    beside = [p for p in library.rglob("*") if p.is_file() and p.suffix not in {".py", ".pyc"}]
    assert {p.suffix for p in beside} >= {".html", ".properties"}
    assert {f"nightstream/{p.relative_to(library)}" for p in beside} <= set(files)


@pytest.mark.slow
def test_a_night_from_the_wheel_in_an_empty_folder(run, installed, tmp_path):
    where = run("python", "-c", "import nightstream, pyspark; print(nightstream.__file__); print(pyspark.__file__)")
    assert where.stdout.splitlines()[0].startswith(f"{installed}/")
    assert where.stdout.splitlines()[1] == pyspark.__file__

    world.write_lines(tmp_path / "events.jsonl", world.events())
    world.write_lines(tmp_path / "items.jsonl", world.items())
    world.write_lines(tmp_path / "users.jsonl", world.users())
    mine = {"sources": world.sources(Path()), "serving": {"top_k": 5}, "window": {"length": 10}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(mine), encoding="utf-8")
    small = [part for setting in SMALL for part in ("--set", setting)]

    night = run("nightstream", "nightly", "--settings", "mine.yaml", *small)
    assert night.returncode == 0, night.stderr
    assert json.loads(night.stdout)["ingest"]["events"] == {
        "raw_events": 480,
        "events": 480,
        "quarantine": 0,
        "duplicates": 0,
    }
    lists = DeltaTable(str(tmp_path / "out" / "tables" / "recommendations")).to_pandas()
    # 40 users with events, two without, and the one for strangers.
    assert lists.user_id.nunique() == 43
    assert lists["rank"].max() == 5


@pytest.mark.slow
def test_overlays_by_name_and_a_misspelt_one(run):
    code = "from nightstream.runtime.settings import load; print(load(['movielens', 'kafka']).stream.format)"
    assert run("python", "-c", code).stdout == "kafka\n"
    misspelt = run("nightstream", "ingest", "--settings", "moveilens")
    assert misspelt.returncode == 2
    assert misspelt.stderr.count("\n") == 1
    assert "movielens" in misspelt.stderr
