"""The functions on texts that few templates use: escapes, regular expressions, hosts, links."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote_plus, urlsplit

from gpuwatch.rules.templates.gofmt import joined, printable, sprint
from gpuwatch.rules.templates.literals import to_bytes, to_text
from gpuwatch.rules.templates.values import ANY, STRING, Fault, Function, Html, Value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gpuwatch.rules.templates.template import Context

# ---- escapes

_HTML: Final = str.maketrans(
    {"\0": "\ufffd", '"': "&#34;", "'": "&#39;", "&": "&amp;", "<": "&lt;", ">": "&gt;"}
)
_JS: Final = {
    "\\": r"\\",
    "'": r"\'",
    '"': r"\"",
    "<": r"\u003C",
    ">": r"\u003E",
    "&": r"\u0026",
    "=": r"\u003D",
}


def _escaped(escape: Callable[[str], str]) -> Function:
    """A function that escapes what `print` would print."""

    def call(*values: Value) -> str:
        return escape(sprint(*map(printable, values)))

    return Function((f"...{ANY}",), call)


def _html(text: str) -> str:
    return text.translate(_HTML)


def _js(text: str) -> str:
    return "".join(_JS.get(char) or (char if char.isprintable() else f"\\u{ord(char):04X}") for char in text)


def _url_query(text: str) -> str:
    return quote_plus(to_bytes(text))


def _graph_link(expression: str) -> str:
    return f"/graph?g0.expr={_url_query(expression)}&g0.tab=0"


def _table_link(expression: str) -> str:
    return f"/graph?g0.expr={_url_query(expression)}&g0.tab=1"


def _external_url(context: Context) -> str:
    return context.external_url


def _path_prefix(context: Context) -> str:
    return urlsplit(context.external_url).path


# ---- letters

_WORD: Final = re.compile(r"\w(?:\w|(?<=[^\W\d_])['.:\u2019\u00b7](?=[^\W\d_])|(?<=\d)['.,;](?=\d))*")


def _upper(text: str) -> str:
    """Each letter by itself, so that the text keeps its length."""
    return "".join(char.upper() if len(char.upper()) == 1 else char for char in text)


def _lower(text: str) -> str:
    return "".join(char.lower()[:1] for char in text)


def _title(text: str) -> str:
    return _WORD.sub(lambda word: _titled(word.group()), text)


def _titled(word: str) -> str:
    at = next((index for index, char in enumerate(word) if char.isalpha()), 0)
    return word[:at] + word[at].title() + word[at + 1 :]


# ---- regular expressions

_REFERENCE: Final = re.compile(rb"\$(?:(\$)|(\w+)|\{(\w+)\})")
_GROUP_NUMBER: Final = re.compile(rb"0|[1-9][0-9]{0,8}")
_GO_WORDS: Final = {  # google-re2's complaints as Go words them, where they differ
    "missing ]": "missing closing ]",
    "missing )": "missing closing )",
    "no argument for repetition operator": "missing argument to repetition operator",
    "bad repetition operator": "invalid nested repetition operator",
    "invalid perl operator": "invalid or unsupported Perl syntax",
    "invalid repetition size": "invalid repeat count",
    "invalid named capture group": "invalid named capture",
    "trailing \\": "trailing backslash at end of expression",
}


def _compiled(pattern: str) -> Any:  # noqa: ANN401 (re2 has no type information)
    import re2  # noqa: PLC0415 (few templates have a regular expression)

    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(to_bytes(pattern), options)
    except re2.error as error:
        what, _, where = to_text(error.args[0]).partition(": ")
        raise Fault(f"error parsing regexp: {_GO_WORDS.get(what, what)}: `{where}`") from error


def _match(pattern: str, text: str) -> bool:
    return _compiled(pattern).search(to_bytes(text)) is not None


def _re_replace_all(pattern: str, replacement: str, text: str) -> str:
    try:
        compiled = _compiled(pattern)
    except Fault as fault:
        raise Fault(f"regexp: Compile(`{pattern}`): {fault}") from fault
    return joined(map(to_text, _replaced(compiled, to_bytes(replacement), to_bytes(text))))


def _replaced(compiled: Any, replacement: bytes, data: bytes) -> Iterator[bytes]:  # noqa: ANN401
    at = 0
    for match in compiled.finditer(data):
        if match.end() == match.start() and (
            0 < at == match.end() or _is_within_character(data, match.end())
        ):
            continue  # an empty match that abuts the one before it counts for nothing
        yield data[at : match.start()]
        yield _REFERENCE.sub(partial(_group, match), replacement)
        at = match.end()
    yield data[at:]


def _is_within_character(data: bytes, at: int) -> bool:
    return at < len(data) and data[at] & 0xC0 == 0x80


def _group(match: Any, reference: re.Match[bytes]) -> bytes:  # noqa: ANN401
    """What `$1`, `${name}` or `$$` stands for; nothing if there is no such group."""
    if reference[1]:
        return b"$"
    name = reference[2] or reference[3]
    try:
        found: bytes | None = match.group(int(name) if _GROUP_NUMBER.fullmatch(name) else name)
    except IndexError:
        return b""
    return found or b""


# ---- hosts


def _strip_port(text: str) -> str:
    parts = _host_and_port(text)
    return text if parts is None else parts[0]


def _strip_domain(text: str) -> str:
    host, port = _host_and_port(text) or (text, "")
    if _is_address(host):
        return text
    name = host.split(".")[0]
    if not port:
        return name
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


def _host_and_port(text: str) -> tuple[str, str] | None:
    """Go's `net.SplitHostPort`: `host:port` or `[address]:port`; None for anything else."""
    match = re.fullmatch(r"(?:\[([^\[\]]*)\]|([^:\[\]]*)):([^:\[\]]*)", text)
    return (match[1] or match[2] or "", match[3]) if match else None


def _is_address(host: str) -> bool:
    import ipaddress  # noqa: PLC0415 (few templates strip a domain)

    try:
        return "%" not in host and bool(ipaddress.ip_address(host))
    except ValueError:
        return False


FUNCTIONS: Final = {
    "externalURL": Function((), _external_url, needs_context=True),
    "graphLink": Function((STRING,), _graph_link),
    "html": _escaped(_html),
    "js": _escaped(_js),
    "match": Function((STRING, STRING), _match),
    "pathPrefix": Function((), _path_prefix, needs_context=True),
    "reReplaceAll": Function((STRING, STRING, STRING), _re_replace_all),
    "safeHtml": Function((STRING,), Html),
    "stripDomain": Function((STRING,), _strip_domain),
    "stripPort": Function((STRING,), _strip_port),
    "tableLink": Function((STRING,), _table_link),
    "title": Function((STRING,), _title),
    "toLower": Function((STRING,), _lower),
    "toUpper": Function((STRING,), _upper),
    "urlquery": _escaped(_url_query),
}
