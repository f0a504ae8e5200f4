"""Progress of a run: one moving line in a terminal, a line every ten seconds in a log file."""

import sys
import threading
import time

SECONDS_BETWEEN_LOG_LINES = 10.0
SECONDS_UNTIL_TOLD = 60.0  # that no shard has been finished since


class ProgressLine:
    """A line on stderr that the next one replaces; in a log file, at most one in ten seconds."""

    def __init__(self) -> None:
        self._last_line = time.perf_counter()
        self._in_terminal = sys.stderr.isatty()

    def show(self, line: str, *, end: str = "") -> None:
        if self._in_terminal:
            print(f"\r{line}\033[K", end=end, file=sys.stderr, flush=True)
        elif time.perf_counter() - self._last_line >= SECONDS_BETWEEN_LOG_LINES:
            self._last_line = time.perf_counter()
            print(line, file=sys.stderr, flush=True)

    def close(self, line: str = "") -> None:
        """Replaces the moving line by a last one, or clears it."""
        if self._in_terminal:
            print(f"\r{line}\033[K", end="\n" if line else "", file=sys.stderr, flush=True)
        elif line:
            print(line, file=sys.stderr)


class SelectionProgress:
    """The Progress of stage 2: rows read, then rows scored, tokens per second and time left. Where
    no shard is finished for a minute, that too."""

    def __init__(self) -> None:
        self._line: ProgressLine | None = None
        self._num_tokens = 0
        self._scored = threading.Event()
        self._is_closed = False

    def rows_read(self, num_rows: int) -> None:
        self._line = self._line or ProgressLine()
        self._line.show(f"normalizing: {num_rows:,} rows")

    def scoring_started(self, *, num_rows: int, num_rows_done: int) -> None:
        self._line = ProgressLine()
        self._num_rows, self._num_done = num_rows, num_rows_done
        self._num_done_before = num_rows_done
        self._started = time.perf_counter()
        self._is_closed = False
        threading.Thread(target=self._tell_of_waiting, daemon=True).start()

    def shard_scored(self, num_rows: int, num_tokens: int) -> None:
        self._num_done += num_rows
        self._num_tokens += num_tokens
        self._scored.set()
        seconds, speed = self._seconds_and_speed()
        num_new = self._num_done - self._num_done_before
        left = (self._num_rows - self._num_done) * seconds / max(num_new, 1)
        assert self._line is not None
        self._line.show(
            f"scoring: {self._num_done:,} of {self._num_rows:,} rows, {speed}, "
            f"{format_seconds(left)} left"
        )

    def close(self) -> None:
        """Prints what the scoring took; nothing where nothing was scored."""
        self._is_closed = True
        self._scored.set()
        if self._line is None:
            return
        if not self._num_tokens:
            self._line.close()
            return
        seconds, speed = self._seconds_and_speed()
        num_new = self._num_done - self._num_done_before
        self._line.close(f"scored {num_new:,} rows in {format_seconds(seconds)}, {speed}")

    def _tell_of_waiting(self) -> None:
        """Until the scoring ends: workers report whole shards, which takes minutes with a large
        model."""
        while not self._is_closed:
            if self._scored.wait(SECONDS_UNTIL_TOLD):
                self._scored.clear()
                continue
            seconds = time.perf_counter() - self._started
            assert self._line is not None
            self._line.show(
                f"scoring: {self._num_done:,} of {self._num_rows:,} rows after "
                f"{format_seconds(seconds)}; rows are counted when their shard is finished"
            )

    def _seconds_and_speed(self) -> tuple[float, str]:
        seconds = time.perf_counter() - self._started
        return seconds, f"{self._num_tokens / seconds:,.0f} tokens/s"


class RowsProgress(ProgressLine):
    """The number of rows that a step has done."""

    def __init__(self, doing: str) -> None:
        super().__init__()
        self.doing = doing  # "tokenizing"

    def __call__(self, num_done: int, num_rows: int | None) -> None:
        line = f"{self.doing}: {num_done:,}{f' of {num_rows:,}' if num_rows else ''} rows"
        self.show(line, end="\n" if num_done == num_rows else "")


def format_seconds(seconds: float) -> str:
    """42 -> '42 s', 4,210 -> '1 h 10 min'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
