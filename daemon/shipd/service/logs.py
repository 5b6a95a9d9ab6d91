"""Structured logs on stderr: one line an event, as key=value text or as JSON, with journald's priorities."""

import json
import logging
import os
import re
import sys
from typing import Any, Final, Literal

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_PRIORITY: Final = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
_PLAIN: Final = re.compile(r"[A-Za-z0-9_./:@+-]+\Z")


class TextFormatter(logging.Formatter):
    """``info transfer committed model=minilm label=step-3``. Everything that came from a peer is escaped."""

    def __init__(self, *, journal: bool) -> None:
        super().__init__(datefmt="%Y-%m-%dT%H:%M:%S")
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {key}={_quote(value)}" for key, value in _extra(record).items())
        line = f"{record.levelname.lower()} {record.getMessage()}{fields}"
        if record.exc_info:
            line += f" exception={_quote(self.formatException(record.exc_info))}"
        if self._journal:
            # journald keeps the time itself and reads the priority from the prefix: sd-daemon(3).
            return f"<{_PRIORITY.get(record.levelno, 6)}>{line}"
        return f"{self.formatTime(record, self.datefmt)}.{int(record.msecs):03d} {line}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def configure(level: str, style: Literal["text", "json"]) -> None:
    """Send shipd's logs to stderr; only the service's command does this, never the library."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter(journal="JOURNAL_STREAM" in os.environ))
    root = logging.getLogger("shipd")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


def _quote(value: object) -> str:
    text = str(value)
    return text if _PLAIN.match(text) else json.dumps(text)
