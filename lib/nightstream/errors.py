"""Every failure that a person can mend is a NightstreamError: one sentence that names the thing and the remedy."""

from __future__ import annotations


class NightstreamError(Exception):
    """A problem in what was given to us (settings, sources, tables); commands print it and exit with exit_code."""

    exit_code = 2


class SettingsError(NightstreamError):
    """One or more settings are wrong; `problems` has one line each, all found at once."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("settings: " + "; ".join(problems))


class SourceError(NightstreamError):
    """A source is missing, empty, unreadable, or lacks a mapped column."""


class TableError(NightstreamError):
    """A table is missing, has another schema than its TableSpec, or lost rows."""

    @classmethod
    def missing(cls, name: str, place: str, root: str = "storage.root") -> TableError:
        """root: what the caller calls the place of all tables."""
        return cls(f"table {name} is missing at {place}; run the nightly job first or check {root}")


class ArtifactError(NightstreamError):
    """A model's artifacts are missing, damaged, or made for something else."""


class RejectedError(NightstreamError):
    """A newly trained model is worse than the published one by more than settings allow, and was not published."""

    exit_code = 3


class MachineError(NightstreamError):
    """The machine lacks something, such as a suitable Java."""


class WriterBusyError(NightstreamError):
    """Another process holds the right to write the serving tables."""
