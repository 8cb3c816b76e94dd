"""Lines for a log: `key=value` pairs, one line an event whatever the values hold, to read and to search through."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

PLAIN = re.compile(r"[\w.,:/+×-]+", re.ASCII)


def line(**fields: Any) -> str:
    """`key=value key="more words"`: quoted as JSON where a value is more than one word, so that none forges a line."""
    return " ".join(f"{name}={_value(value)}" for name, value in fields.items())


def _value(value: Any) -> str:
    text = str(value)
    return text if PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=not text.isprintable())


class Lines(logging.Formatter):
    """Log records in that form."""

    def format(self, record: logging.LogRecord) -> str:
        return line(level=record.levelname.lower(), message=record.getMessage())
