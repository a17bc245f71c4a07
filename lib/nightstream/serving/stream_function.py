"""The function that foreachBatch calls: it carries settings, and builds what a stream keeps where it runs.

Spark calls it in the process that started the query. Spark Connect ships it to the server and calls it in a process
there, which builds the state at its first call, and ends with the query. That process must have read the function
within seconds of its start, so nothing here may import more than settings before the first call.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nightstream.runtime.settings import Settings

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


@dataclass(frozen=True)
class StreamFunction:
    """One micro-batch: its rows recorded, their users refreshed and committed; the MERGEs follow behind.

    settings: of the installation. run_id: tells apart the states that live in one process.
    """

    settings: Settings
    run_id: str

    def __call__(self, arrived: DataFrame, batch_id: int) -> None:
        """arrived: rows of ledger.parsed. Repeating a batch changes nothing.

        Raises WriterBusyError where another process writes the serving tables, TableError where no model is published,
        and what the MERGEs of earlier batches have met.
        """
        from nightstream.serving.stream_state import STATES, StreamState

        state = STATES.get(self.run_id)
        if state is None:
            # It ends with this process, which is the query's own.
            state = StreamState(arrived.sparkSession, self.settings, self.run_id)
            with ExitStack() as stack:
                stack.enter_context(state).start()
                stack.pop_all()
            threading.Thread(target=state.keep_up, name="between batches", daemon=True).start()
        state.micro_batch(arrived, batch_id)
