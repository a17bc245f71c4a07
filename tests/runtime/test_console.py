from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import pytest
from nightstream.runtime import console
from nightstream.runtime.console import Heartbeat, TrainingProgress

BEAT = 0.02
WAIT = 10.0


class Lines:
    """Collects lines; `reach` waits until one satisfies a condition."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._changed = threading.Condition()

    def write(self, text: str) -> None:
        with self._changed:
            self.lines.append(text)
            self._changed.notify_all()

    def reach(self, wanted: Callable[[list[str]], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: wanted(self.lines), WAIT), self.lines


def entry(encoder: str = "gru", epoch: int = 1, step: int = 3, score: float | None = None) -> dict:
    return {
        "encoder": encoder,
        "epoch": epoch,
        "epochs": 6,
        "whole": step == 9,
        "step": step,
        "steps": 9,
        "loss": 5.25,
        "ndcg@10": score,
    }


def test_long_work_is_told_at_every_beat():
    lines = Lines()
    with Heartbeat(lines.write, BEAT).during(lambda: "ingest"):
        lines.reach(lambda found: len(found) >= 3)
    assert set(lines.lines) == {"ingest, 0 s so far"}


def test_short_work_is_not_told():
    lines = Lines()
    with Heartbeat(lines.write, 60).during(lambda: "ingest"):
        pass
    assert lines.lines == []


def test_the_innermost_work_is_told_and_then_the_outer_again():
    lines = Lines()
    heart = Heartbeat(lines.write, BEAT)
    with heart.during(lambda: "outer"):
        with heart.during(lambda: "inner"):
            lines.reach(lambda found: len(found) >= 2)
        seen = len(lines.lines)
        lines.reach(lambda found: len(found) >= seen + 2)
    assert {line.partition(",")[0] for line in lines.lines[: seen - 1]} == {"inner"}
    assert lines.lines[-1].startswith("outer")


def test_a_heart_rests_after_its_work_and_beats_again():
    lines = Lines()
    heart = Heartbeat(lines.write, BEAT)
    for text in ("one", "two"):
        with heart.during(lambda text=text: text):
            lines.reach(lambda found, text=text: any(line.startswith(text) for line in found))
        if heart._thread is not None:
            heart._thread.join(WAIT)
        assert heart._thread is None


def test_work_that_fails_is_no_longer_told():
    heart = Heartbeat(Lines().write, BEAT)
    with pytest.raises(ZeroDivisionError), heart.during(lambda: "ingest"):
        raise ZeroDivisionError
    assert heart._running == []


def test_no_silence_is_longer_than_fifteen_seconds():
    assert console.heartbeat._seconds == console.HEARTBEAT_SECONDS <= 15


def test_training_without_a_terminal_tells_epoch_and_step(monkeypatch, capsys):
    lines = Lines()
    monkeypatch.setattr(console, "heartbeat", Heartbeat(lines.write, BEAT))
    with console.training_bar() as update:
        lines.reach(lambda found: any(line.startswith("train the model") for line in found))
        update(entry())
        lines.reach(lambda found: any("gru" in line for line in found))
        update(entry(step=9, score=0.0712))
        lines.reach(lambda found: "0.0712" in found[-1])
    told = [line.partition(", validation")[0] for line in lines.lines if "gru" in line]
    assert told[0] == "train gru: epoch 1/6, step 3/9, loss 5.250"
    assert told[-1] == "train gru: epoch 1/6, step 9/9, loss 5.250"
    assert capsys.readouterr().err == "trained gru: validation NDCG@10 0.0712\n"


def test_progress_tells_the_encoders_that_moved_since_the_last_time():
    progress = TrainingProgress()
    progress.take(entry("cnn", epoch=4, score=0.05))
    progress.take(entry("gru"))
    assert [part.partition(":")[0] for part in progress.text().split("; ")] == ["train cnn", "train gru"]
    progress.take(entry("gru", step=4))
    assert progress.text() == progress.text()
    assert progress.text().startswith("train gru: epoch 1/6, step 4/9")
    assert "cnn" not in progress.text()


def test_a_whole_epoch_is_told_once():
    progress = TrainingProgress()
    assert progress.text() == "train the model"
    progress.take(entry(step=9, score=0.05))
    assert "step 9/9" in progress.text()
    assert progress.text() == "train the model"


def test_progress_keeps_the_best_figure():
    progress = TrainingProgress()
    for score in (0.05, 0.07, None, 0.06):
        progress.take(entry(score=score))
    assert progress.best_of("gru") == "0.0700"
    assert progress.best_of("cnn") == "-"


def test_a_line_is_a_record_where_the_log_takes_it_and_printed_elsewhere(caplog, capsys):
    console.write_line("plain")
    assert capsys.readouterr().err == "plain\n"
    with caplog.at_level(logging.INFO, console.__name__):
        console.write_line("logged 100 %")
    assert [r.getMessage() for r in caplog.records] == ["logged 100 %"]
    assert capsys.readouterr().err == ""


def test_a_step_is_told_at_its_start(capsys):
    with console.step("measuring"):
        assert capsys.readouterr().err == "measuring\n"
