"""Takes secrets out of text that leaves the program: logs, errors, rows; never decides what is sent."""

from __future__ import annotations

import logging
import re
from typing import Final

_HIDDEN: Final = "***"
_VALUE: Final = r"[^&\s\"'<>)\]]+"
# The first group of each stays.
_SECRETS: Final = (
    re.compile(rf"(hooks\.slack\.com(?::\d+)?/\w+/){_VALUE}"),
    re.compile(r"(/services/)[\w%-]+/[\w%-]+(?:/[\w%-]+)*"),  # urllib3 logs the path without its host
    re.compile(rf"((?:access_token|\bsign)[\"']?\s?[=:]\s?[\"']?){_VALUE}"),
    re.compile(r"()\bSEC[0-9A-Za-z]{16,}"),  # really 64 hex digits; 16 leaves words such as SECDED alone
    re.compile(r"()\b(?:xox[a-z]|xapp)-[\w-]+"),
    re.compile(r"(://)[^/\s:@]+:[^/\s@]+(?=@)"),  # user and password of a proxy
)


def redact(text: str) -> str:
    """The same text with webhook paths, tokens, signatures and robot secrets as `***`."""
    for secret in _SECRETS:
        text = secret.sub(rf"\1{_HIDDEN}", text)
    return text


class RedactSecrets(logging.Filter):
    """Belongs on the root handler: redacts the message, the traceback and the stack of every record.

    On a handler, not on a logger, since a logger's filters do not see what its children log.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Redact in place; lets every record through."""
        record.msg, record.args = redact(_said(record)), None
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = redact(record.exc_text)
        if record.stack_info:
            record.stack_info = redact(record.stack_info)
        return True


def _said(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError, KeyError):
        # A mistake in a log call must not raise into the caller, and must not hide what was logged.
        return f"{record.msg} {record.args}"
