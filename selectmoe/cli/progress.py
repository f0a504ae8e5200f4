"""Progress that a person can follow: one line that moves in a terminal, a line now and then in a
log file."""

import sys
import time

SECONDS_BETWEEN_LOG_LINES = 10.0


class SelectionProgress:
    """The Progress of stage 2: rows read, then rows scored, tokens a second and the time left."""

    def __init__(self) -> None:
        self._reading: RowsProgress | None = None
        self._scoring: ScoringProgress | None = None

    def rows_read(self, num_rows: int) -> None:
        self._reading = self._reading or RowsProgress("normalizing")
        self._reading(num_rows, None)

    def scoring_started(self, *, num_rows: int, num_rows_done: int) -> None:
        self._scoring = ScoringProgress(num_rows=num_rows, num_rows_done=num_rows_done)

    def shard_scored(self, num_rows: int, num_tokens: int) -> None:
        assert self._scoring is not None
        self._scoring.add(num_rows=num_rows, num_tokens=num_tokens)

    def close(self) -> None:
        if self._scoring is not None:
            self._scoring.close()
        elif self._reading is not None:
            self._reading.clear()


class ScoringProgress:
    """Rows done, tokens a second and the time left."""

    def __init__(self, *, num_rows: int, num_rows_done: int = 0) -> None:
        self.num_rows = num_rows
        self.num_rows_done = num_rows_done
        self.num_tokens = 0
        self._num_rows_before = num_rows_done
        self._started = time.perf_counter()
        self._last_line = self._started
        self._in_terminal = sys.stderr.isatty()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    def add(self, *, num_rows: int, num_tokens: int) -> None:
        self.num_rows_done += num_rows
        self.num_tokens += num_tokens
        now = time.perf_counter()
        due = now - self._last_line >= SECONDS_BETWEEN_LOG_LINES
        if self._in_terminal:
            print(f"\r{self._line()}\033[K", end="", file=sys.stderr, flush=True)
        elif due:
            self._last_line = now
            print(self._line(), file=sys.stderr, flush=True)

    def close(self) -> None:
        """What it all took, in place of the last line; nothing where nothing was scored."""
        if self.num_tokens:
            line = (
                f"scored {self.num_rows_done - self._num_rows_before:,} rows in "
                f"{format_seconds(self.seconds)}, {self.tokens_per_second:,.0f} tokens/s"
            )
            print(f"\r{line}\033[K" if self._in_terminal else line, file=sys.stderr)

    def _line(self) -> str:
        new_rows = self.num_rows_done - self._num_rows_before
        left = (self.num_rows - self.num_rows_done) * self.seconds / max(new_rows, 1)
        return (
            f"scoring: {self.num_rows_done:,} of {self.num_rows:,} rows, "
            f"{self.tokens_per_second:,.0f} tokens/s, {format_seconds(left)} left"
        )


def format_seconds(seconds: float) -> str:
    """42 -> '42 s', 4,210 -> '1 h 10 min'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class RowsProgress:
    """How many rows something has been done to; the same two kinds of lines."""

    def __init__(self, doing: str) -> None:
        self.doing = doing  # "tokenizing"
        self._last_line = time.perf_counter()
        self._in_terminal = sys.stderr.isatty()

    def __call__(self, num_done: int, num_rows: int | None) -> None:
        line = f"{self.doing}: {num_done:,}{f' of {num_rows:,}' if num_rows else ''} rows"
        if self._in_terminal:
            end = "\n" if num_done == num_rows else ""
            print(f"\r{line}\033[K", end=end, file=sys.stderr, flush=True)
        elif time.perf_counter() - self._last_line >= SECONDS_BETWEEN_LOG_LINES:
            self._last_line = time.perf_counter()
            print(line, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Takes away a line that moves: another one tells the end."""
        if self._in_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
