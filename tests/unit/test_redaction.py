"""No secret leaves the program by a text or by the log."""

import logging

import pytest
import requests

from gpuwatch.notify import RedactSecrets, redact

SECRET = "SEC0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize(
    "text",
    [
        "POST https://hooks.slack.com/services/T0AB/B0CD/zzz failed",
        'https://hooks.slack.com:443 "POST /services/T0AB/B0CD/zzz HTTP/1.1" 404 None',
        "https://hooks.slack.com/triggers/T0AB/123/zzz",
        "url: /robot/send?access_token=zzz&timestamp=1&sign=zzz%3D (Caused by x)",
        '{"access_token": "zzz", "sign":"zzz="}',
        f"secret is {SECRET}",
        "xoxb-1-zzz and xapp-1-zzz",
        "http://user:zzz@proxy.example:3128",
    ],
)
def test_secrets_are_redacted(text):
    shown = redact(text)
    assert "zzz" not in shown
    assert SECRET not in shown
    assert "***" in shown


@pytest.mark.parametrize(
    "text", ["SECDED errors: 3", "design=good", "GET /services healthy", "signal=9", "sign not match"]
)
def test_words_that_only_look_alike_are_left(text):
    assert redact(text) == text


def logged(log_call):
    """What a root handler with the filter writes of a log call."""
    lines = []

    class Lines(logging.Handler):
        def emit(self, record):
            lines.append(self.format(record))

    handler = Lines()
    handler.addFilter(RedactSecrets())
    log = logging.Logger("of its own")  # noqa: LOG001 (pytest's handlers stay away from it)
    log.addHandler(handler)
    log_call(log)
    return "\n".join(lines)


def test_no_secret_reaches_the_log_by_message_argument_or_traceback():
    url = "https://oapi.dingtalk.com/robot/send?access_token=zzz"

    def fail(log):
        try:
            requests.Session().get(url.replace("https", "nothing"))
        except requests.RequestException:
            log.exception("cannot post to %s", url, stack_info=True)

    shown = logged(fail)
    assert "Traceback" in shown
    assert "access_token=***" in shown
    assert "access_token=zzz" not in shown


def test_a_wrong_log_call_is_still_logged_and_redacted():
    shown = logged(lambda log: log.warning("no place for %d", "access_token=zzz"))
    assert "no place for" in shown
    assert "zzz" not in shown
