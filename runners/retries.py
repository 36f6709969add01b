"""What is done about a cell that has failed: what it needs is different for each kind of failure."""

from __future__ import annotations

from ablate.record import Failure, Record, Status

ANSWERS = {  # seconds before the second attempt, twice as many before each one after it; and in words
    Failure.OUT_OF_MEMORY: (1, "with batches of half the size, which give the same result"),
    Failure.KILLED: (5, "from its checkpoint"),
    Failure.NODE_LOST: (5, "from its checkpoint"),
}
REWARD = (60, "when its reward may be back")


def answer(record: Record, failures: int, attempts: int) -> tuple[float, str] | None:
    """Seconds until a cell's next attempt, and in words how it differs; None: there is none in this run.

    `failures` are those of this run so far, `attempts` how many it may have. A bad configuration fails again until it
    is changed, and an error of the code most likely too; divergence is a result; who interrupted a cell will continue
    it.
    """
    found = REWARD if record.status is Status.REWARD_UNAVAILABLE else None
    if record.failure is not None:
        found = ANSWERS.get(record.failure)
    if found is None or failures >= attempts:
        return None
    pause, words = found
    return pause * 2 ** (failures - 1), words
