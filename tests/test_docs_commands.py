"""Every shell command that README, CONTRIBUTING and docs show runs, or stands in NOT_RUN with the reason.

A command is a line of a fenced block of sh, bash or console; in an indented block, or a fenced one without a language,
a line that begins with one of PROGRAMS. A backslash continues it. In a console block only lines after `$ ` are
commands, and what stands below one must be what it prints.

The commands of a page run in its order, in a copy of the repository that only this page has. The rules:
- The copy has .venv and a cut of MovieLens-100k, and beside it the same cut as the files that a page calls the reader's
  own (`own_data`). A yaml block whose first line is `# conf/NAME.yaml` is written to that file.
- SHORTENED names what is appended to commands that take long.
- `serve` works off what is there (`--until-idle`). Where the page sends an event afterwards, it runs in the background
  until that event has been a micro-batch (`--max-batches 1`), and must then have ended well.
- `make kafka` runs in the background, at a free port, until the page ends.
- RUN_ONCE names commands that neither need nor leave anything on their page: shown by a second page, they are not run
  again.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [p for p in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") if p.exists()] + sorted((ROOT / "docs").glob("*.md"))

NOT_RUN = {
    "make test": "it runs all other tests",
}
SHORT_TRAINING = "--set training.epochs=1 --set training.encoders=[gru]"
SHORTENED = {
    r"(nightstream |jobs/)(nightly|train|evaluate)\b": SHORT_TRAINING,
    r"benchmarks/quality\.py .*--protocol": "--only popular",
    r"benchmarks/stream\.py": "--users 4000 --items 300 --batches 1 --seconds 2 --grown 1 --hour 10",
}
RUN_ONCE = r"^make demo$|benchmarks/quality\.py"
SERVE = re.compile(r"nightstream serve|streaming/serve\.py")
SENDS = re.compile(r"make kafka-send|&& mv \S+ \S+/$")
KAFKA = "make kafka"
KAFKA_READY = "Ctrl-C stops it"
KAFKA_ADDRESS = "127.0.0.1:9092"

PROGRAMS = ("make", "nightstream", "spark-submit", "python", "pip", "pytest", "echo", "git", "pre-commit", "ruff", ".")
LANGUAGES = ("sh", "bash", "console")
# MovieLens is cut to the first so many users and items: some 2,000 events.
USERS, ITEMS = 40, 300
LONGEST_SECONDS = 1200
# A JVM that lives for seconds.
QUICK_JAVA = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
LOCAL = (".git", ".venv", "data", "out", ".*_cache", ".hypothesis", "__pycache__")


@dataclass(frozen=True)
class Command:
    """text: what bash gets, without a comment at its end. shown: the lines that a console block shows below it."""

    text: str
    line: int
    shown: tuple[str, ...] = ()

    def shortened(self) -> str:
        """The text with what SHORTENED appends to it."""
        more = [added for pattern, added in SHORTENED.items() if re.search(pattern, self.text)]
        return " ".join([self.text, *dict.fromkeys(more)])


def commands(markdown: str) -> list[Command]:
    """The commands of a page in its order."""
    found: list[Command] = []
    language: str | None = None
    before, lines = "", iter(enumerate(markdown.splitlines(), 1))
    for number, line in lines:
        fence = re.match(r"\s*```\s*(\w*)", line)
        indented = language is None and line.startswith("    ") and not before.strip()
        if fence:
            language = None if language is not None else fence[1]
            continue
        in_block = language is not None or indented
        if not indented:
            before = line
        if not in_block or (language and language not in LANGUAGES):
            continue
        text, prompt = line.strip().removeprefix("$ "), line.strip().startswith("$ ")
        if language == "console" and not prompt:
            if found and text:
                found[-1] = Command(found[-1].text, found[-1].line, (*found[-1].shown, text))
            continue
        if not text or text.startswith("#") or not (language or prompt or text.split()[0] in PROGRAMS):
            continue
        while text.endswith("\\"):
            text += "\n" + next(lines)[1]
        found.append(Command(re.sub(r"\s+# [^'\"]*$", "", text), number))
    return found


def settings_files(markdown: str) -> dict[str, str]:
    """Path -> content of the yaml blocks that name a file in their first line."""
    return dict(re.findall(r"^```yaml\n# (\S+\.yaml)\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL))


def test_commands_are_found_in_fenced_and_indented_blocks():
    page = """
Run `make no` or

    make one     # with a comment
    conf/        no command

```sh
# a comment
echo "a # b" \\
    c

echo '{"x": 1}' | make two
```
```python
make = "no"
```
```console
$ nightstream three
nightstream: what it says
```
```
make four
no command
```
"""
    found = commands(page)
    expected = ["make one", 'echo "a # b" \\\n    c', "echo '{\"x\": 1}' | make two", "nightstream three", "make four"]
    assert [c.text for c in found] == expected
    assert found[3].shown == ("nightstream: what it says",)


def test_every_rule_is_still_needed():
    texts = [c.text for page in PAGES for c in commands(page.read_text(encoding="utf-8"))]
    assert not [text for text in NOT_RUN if text not in texts]
    patterns = [*SHORTENED, RUN_ONCE, SERVE, SENDS, f"^{KAFKA}$"]
    assert not [p for p in patterns if not any(re.search(p, text) for text in texts)]


@pytest.fixture(scope="module")
def movielens() -> Path:
    """The folder of MovieLens-100k, fetched as a person would where it is not there."""
    if not (ROOT / "data" / "ml-100k" / "ml-100k.inter").exists():
        subprocess.run(["make", "data"], cwd=ROOT, check=True, timeout=LONGEST_SECONDS)
    return ROOT / "data" / "ml-100k"


def to_run() -> dict[Path, list[Command]]:
    """The commands of each page that are run, pages without one left out."""
    seen: set[str] = set()
    pages: dict[Path, list[Command]] = {}
    for page in PAGES:
        for command in commands(page.read_text(encoding="utf-8")):
            if command.text in NOT_RUN or (re.search(RUN_ONCE, command.text) and command.text in seen):
                continue
            seen.add(command.text)
            pages.setdefault(page, []).append(command)
    return pages


@pytest.fixture(scope="module")
def problems(request, movielens, tmp_path_factory) -> dict[str, str | None]:
    """Page -> what `play` says of it, of the pages that this run of pytest selects; two are played at a time."""
    selected = {item.callspec.params["page"] for item in request.session.items if "problems" in item.fixturenames}
    with ThreadPoolExecutor(2) as pool:
        running = {
            page.name: pool.submit(play, page, todo, tmp_path_factory.mktemp(page.stem) / "nightstream", movielens)
            for page, todo in to_run().items()
            if page.name in selected
        }
        return {name: future.result() for name, future in running.items()}


@pytest.mark.docs
@pytest.mark.parametrize("page", [page.name for page in to_run()])
def test_every_command_of_a_page_runs(page, problems):
    assert problems[page] is None, problems[page]


def play(page: Path, todo: list[Command], folder: Path, movielens: Path) -> str | None:
    """Run a page's commands in a copy of the repository in `folder`. What is wrong with the first that fails, or None.

    pytest -s shows how long each took.
    """
    set_up(folder, movielens)
    for path, content in settings_files(page.read_text(encoding="utf-8")).items():
        (folder / path).write_text(content, encoding="utf-8")
    shell = Shell(folder)
    try:
        for number, command in enumerate(todo):
            begun = time.monotonic()
            if (problem := run(shell, command, todo[number + 1 :])) is not None:
                return f"{page.name}, line {command.line}: {command.text}\n{problem}"
            print(f"{time.monotonic() - begun:5.1f} s  {page.name}: {command.text}", flush=True)
    finally:
        shell.end()
    return None


def run(shell: Shell, command: Command, later: list[Command]) -> str | None:
    """Run one command by the rules. Returns what is wrong, None where all is well."""
    text = command.shortened()
    if command.text == KAFKA:
        return shell.start(text, KAFKA_READY)
    if SERVE.search(text):
        until_next = []
        for other in later:
            if SERVE.search(other.text):
                break
            until_next.append(other)
        if any(SENDS.search(other.text) for other in until_next):
            return shell.start(f"{text} --max-batches 1")
        text += " --until-idle"
    if SENDS.search(text):
        return shell.send(text)
    code, printed = shell.run(text)
    wanted = 2 if any(line.startswith("nightstream: ") for line in command.shown) else 0
    missing = [line for line in command.shown if line not in printed]
    if code != wanted or missing:
        return f"exit code {code}, not {wanted}; not printed: {missing}\n{printed[-3000:]}"
    return None


class Shell:
    """Commands in one folder, in the foreground and in the background. What one prints goes to a file beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{s.getsockname()[1]}"
        kafka = folder / "conf" / "kafka.yaml"
        kafka.write_text(kafka.read_text(encoding="utf-8").replace(KAFKA_ADDRESS, address), encoding="utf-8")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYSPARK_", "SPARK_", "MAKE"))}
        path = f"{folder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
        own = {"PATH": path, "PYTHONPATH": str(folder / "lib"), "KAFKA": address, "NIGHTSTREAM_DATA": "data"}
        own |= {"SPARK_CONF_DIR": str(quick_spark(folder)), "JAVA_TOOL_OPTIONS": QUICK_JAVA}
        self.environment = kept | own
        self.background: list[tuple[subprocess.Popen[bytes], Path]] = []

    def _popen(self, text: str) -> tuple[subprocess.Popen[bytes], Path]:
        log = self.folder.parent / f"{len(list(self.folder.parent.glob('*.log')))}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", text],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return process, log

    def run(self, text: str) -> tuple[int, str]:
        """The exit code and what was printed; a command that takes too long is ended."""
        process, log = self._popen(text)
        try:
            code = process.wait(LONGEST_SECONDS)
        except subprocess.TimeoutExpired:
            code = end(process)
        return code, log.read_text(encoding="utf-8", errors="replace")

    def start(self, text: str, ready: str = "") -> str | None:
        """Start in the background, and wait until it has printed `ready`. Returns what is wrong."""
        process, log = self._popen(text)
        self.background.append((process, log))
        deadline = time.monotonic() + LONGEST_SECONDS
        while ready not in (printed := log.read_text(encoding="utf-8", errors="replace")):
            if process.poll() is not None or time.monotonic() > deadline:
                return printed[-3000:]
            time.sleep(0.5)
        return None

    def send(self, text: str) -> str | None:
        """Run what sends an event, as soon as the stream in the background lets it, and wait for that stream's end."""
        serving, log = self.background[-1]
        deadline = time.monotonic() + LONGEST_SECONDS
        while True:
            code, printed = self.run(text)
            if code == 0:
                break
            # The stream makes its folder when it starts.
            if serving.poll() is not None or time.monotonic() > deadline:
                return f"{printed[-1000:]}\n{log.read_text(encoding='utf-8', errors='replace')[-3000:]}"
            time.sleep(1)
        try:
            code = serving.wait(LONGEST_SECONDS)
        except subprocess.TimeoutExpired:
            code = end(serving)
        told = log.read_text(encoding="utf-8", errors="replace")
        return None if code == 0 else f"the stream ended with exit code {code}\n{told[-3000:]}"

    def end(self) -> None:
        for process, _ in self.background:
            end(process)


def end(process: subprocess.Popen[bytes]) -> int:
    """End a command and all that it started, at last for good."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                continue
    return process.wait()


def set_up(folder: Path, movielens: Path) -> None:
    """A copy of the repository with an environment that make takes for installed, and the cut data."""
    shutil.copytree(ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns(*LOCAL))
    environment = folder / ".venv"
    environment.mkdir()
    stamps = (".locked", ".installed")
    for entry in Path(sys.prefix).iterdir():
        if entry.name not in stamps:
            (environment / entry.name).symlink_to(entry)
    for stamp in stamps:
        (environment / stamp).touch()
    data = folder / "data" / "ml-100k"
    data.mkdir(parents=True)
    for kind, most in (("inter", (USERS, ITEMS)), ("item", (ITEMS,)), ("user", (USERS,))):
        head, *lines = (movielens / f"ml-100k.{kind}").read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if all(int(n) <= m for n, m in zip(line.split("\t"), most, strict=False))]
        (data / f"ml-100k.{kind}").write_text("\n".join([head, *kept]) + "\n", encoding="utf-8")
    own_data(folder, data)


def quick_spark(folder: Path) -> Path:
    """A folder of Spark settings under which plans are interpreted: on small data compiling them takes longer."""
    settings = folder.parent / "spark"
    settings.mkdir()
    lines = (
        f"spark.pyspark.python {folder / '.venv' / 'bin' / 'python'}",
        "spark.sql.codegen.wholeStage false",
        "spark.sql.codegen.factoryMode NO_CODEGEN",
    )
    (settings / "spark-defaults.conf").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return settings


def own_data(folder: Path, data: Path) -> None:
    """The same under the names that the pages give to a reader's own data."""
    events, items, users = (
        [line.split("\t") for line in (data / f"ml-100k.{kind}").read_text(encoding="utf-8").splitlines()[1:]]
        for kind in ("inter", "item", "user")
    )

    def write(name: str, header: str, rows: list[list[str]]) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows]
        (folder / name).write_text("\n".join([header, *quoted]) + "\n", encoding="utf-8")

    write("clicks.csv", "visitor,article,at", [[user, item, at] for user, item, _, at in events])
    write("shop/clicks.csv", "visitor,article,action,at,amount", [[u, i, "view", at, v] for u, i, v, at in events])
    write("shop/articles.csv", "article,name,year,genres", items)
    write("shop/visitors.csv", "visitor,age,gender,occupation", [row[:4] for row in users])
    shutil.copytree(data, folder / "data" / "toys")
    for file in (folder / "data" / "toys").iterdir():
        file.rename(file.with_name(file.name.replace("ml-100k", "toys")))
