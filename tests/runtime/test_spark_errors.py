"""What a person reads when Spark fails."""

from __future__ import annotations

import pytest
from nightstream.errors import NightstreamError, SettingsError, TableError, WriterBusyError
from nightstream.runtime.spark_errors import ours_in, sentence_for
from py4j.protocol import Py4JNetworkError


class Unreadable(Exception):
    """As py4j's errors: their text is asked from the JVM."""

    def __str__(self) -> str:
        raise ConnectionRefusedError(111, "Connection refused")


@pytest.mark.parametrize("met", [Unreadable(), Py4JNetworkError("Answer from Java side is empty")])
def test_a_jvm_that_is_gone_is_told_in_one_sentence(met):
    error = RuntimeError("the stream ended")
    error.__cause__ = met
    assert "Java process ended" in sentence_for(error)


def test_what_a_micro_batch_raised_is_found_before_the_end_of_the_jvm():
    error = Unreadable()
    error.__cause__ = RuntimeError("nightstream.errors.TableError: table items is missing\n at ...")
    assert sentence_for(error) == "table items is missing"


def test_an_error_of_ours_has_no_sentence():
    assert sentence_for(ConnectionRefusedError(111, "Connection refused")) is None


@pytest.mark.parametrize("kind", [TableError, WriterBusyError, NightstreamError])
def test_what_spark_wraps_comes_back_as_its_own_kind(kind):
    text = (
        f"[STREAM_FAILED] {kind.__module__}.{kind.__name__}: one sentence\r\n\tat java.base/\nnightstream.errors.X: no"
    )
    wrapped = RuntimeError("the stream ended")
    wrapped.__cause__ = RuntimeError(text)
    for error in (RuntimeError(text), wrapped):
        found = ours_in(error)
        assert (type(found), str(found)) == (kind, "one sentence")


def test_a_sentence_of_ours_stays_as_it_is():
    found = ours_in(RuntimeError("nightstream.errors.SettingsError: settings: a; b\n at"))
    assert str(found) == "settings: a; b"
    ours = SettingsError(["a"])
    ours.__context__ = RuntimeError("nightstream.errors.TableError: another")
    assert ours_in(ours) is ours


def test_what_is_not_of_ours_is_not_taken_for_it():
    assert ours_in(RuntimeError("nightstream.errors is a module")) is None
