"""The rooms of the library, enforced over the import statements and a few names."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "lib" / "nightstream"

# What names nothing of Spark: numpy, torch and XGBoost only. A folder stands for all that is in it.
WITHOUT_SPARK = (
    "models",
    *(
        f"training/{name}"
        for name in (
            "batching",
            "checkpoint",
            "hyperparameters",
            "losses",
            "objective",
            "pipeline",
            "recommender",
            "trainer",
            "validation",
        )
    ),
)
# DataFrame -> DataFrame, with the values that they need as arguments.
PURE_FRAMES = (
    "ingest/parse", "serving/user_state", "serving/refresh", "models/features", "training/splits", "evaluation/offline",
)  # fmt: skip
CLOCKS = {
    ("functions", "current_timestamp"), ("F", "current_timestamp"), ("F", "now"), ("F", "current_date"),
    ("datetime", "now"), ("datetime", "utcnow"), ("datetime", "today"), ("date", "today"),
    ("time", "time"), ("time", "time_ns"),
}  # fmt: skip


def files_of(*parts: str) -> list[Path]:
    return sorted(p for p in ROOT.joinpath(*parts).rglob("*.py") if "__pycache__" not in p.parts)


def module_files(name: str) -> list[Path]:
    """The file of a module of ours, or all files of a package."""
    file = LIBRARY / f"{name}.py"
    found = [file] if file.exists() else files_of("lib", "nightstream", name)
    assert found, f"{name} is named in this test and is not there"
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, at its top or inside functions."""
    names: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(path: Path) -> set[str]:
    """The modules of nightstream that a file imports: `from nightstream.a.b import c` is a.b.c."""
    return {name.removeprefix("nightstream.") for name in imports(path) if name.startswith("nightstream.")}


def reached(path: Path, *modules: str) -> set[str]:
    """What a file imports of these modules or packages."""
    return {name for name in ours(path) for module in modules if name == module or name.startswith(f"{module}.")}


def attributes(path: Path) -> set[tuple[str, str]]:
    """(owner's last name, attribute) of every attribute access."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute):
            owner = node.value
            last = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
            found.add((last, node.attr))
    return found


@pytest.mark.parametrize("name", ["errors", "runtime/secrets"])
def test_errors_and_secrets_stand_alone(name):
    assert ours(LIBRARY / f"{name}.py") == set()


@pytest.mark.parametrize("name", ["runtime/settings", "store/tables"])
def test_settings_and_tables_know_little(name):
    path = LIBRARY / f"{name}.py"
    assert ours(path) == reached(path, "errors", "runtime.secrets")


@pytest.mark.parametrize("name", WITHOUT_SPARK)
def test_learning_names_no_spark(name):
    for path in module_files(name):
        spark = {i for i in imports(path) if i.split(".")[0] in {"pyspark", "delta", "py4j"}}
        assert not spark, f"{path.name} imports {spark}"
        found = reached(path, "runtime", "store", "serving", "steps")
        assert not found, f"{path.name} imports {found}"


@pytest.mark.parametrize("name", PURE_FRAMES)
def test_pure_frames_take_no_session_no_storage(name):
    for path in module_files(name):
        stateful = ("store.storage", "store.registry", "runtime.session", "serving.commits", "steps", "cli")
        assert not reached(path, *stateful)
        whole = {i for i in ours(path) if i == "runtime.settings.Settings"} | reached(path, "runtime") & {
            "runtime.settings"
        }
        assert not whole, f"{path.name} takes the settings tree; give it the values that it needs"


@pytest.mark.parametrize("name", [*WITHOUT_SPARK, *PURE_FRAMES])
def test_pure_modules_read_no_clock(name):
    # time.monotonic is allowed: training stops after so many seconds, whatever the time of day.
    for path in module_files(name):
        assert not attributes(path) & CLOCKS
        assert not imports(path) & {"time.time", "pyspark.sql.functions.current_timestamp"}


@pytest.mark.parametrize("path", files_of("jobs") + files_of("streaming"), ids=lambda p: p.name)
def test_jobs_and_streaming_import_the_library_only(path):
    assert {name.split(".")[0] for name in imports(path)} <= {"nightstream", "__future__"}


def test_the_library_knows_no_job_and_no_test():
    for path in files_of("lib"):
        assert not {name.split(".")[0] for name in imports(path)} & {"jobs", "streaming", "tests", "notebooks"}, path


def test_no_test_imports_a_conftest():
    # All of them are named `conftest` to Python, so an import may get another folder's.
    for path in files_of("tests"):
        assert "conftest" not in {name.split(".")[0] for name in imports(path)}, path


@pytest.mark.parametrize("folder", ["lib", "jobs", "streaming", "notebooks"])
def test_only_what_spark_connect_offers(folder):
    for path in files_of(folder):
        if path == LIBRARY / "runtime" / "session.py":
            continue
        used = {a for _, a in attributes(path)} & {"rdd", "_jvm", "_jsc", "_jdf", "sparkContext", "_sc"}
        assert not used, f"{path.name} uses {used}, which Spark Connect has not"
        assert not {i for i in imports(path) if i.startswith(("pyspark.SparkContext", "pyspark.rdd"))}, path


@pytest.mark.parametrize("folder", ["lib", "jobs", "streaming", "notebooks"])
def test_no_pickle(folder):
    for path in files_of(folder):
        bad = {i for i in imports(path) if i.split(".")[0] in {"pickle", "cloudpickle", "dill", "joblib", "marshal"}}
        assert not bad, f"{path.name} imports {bad}"
        assert not attributes(path) & {("torch", "load"), ("torch", "save"), ("np", "load")}, path
