"""The one tree of settings, each with its unit, its default and the reason; read once, never changed."""

from __future__ import annotations

import importlib.resources
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from gpuwatch.config.checks import troubles
from gpuwatch.config.document import Document, PathKey, dotted, load_document
from gpuwatch.config.duration import Duration
from gpuwatch.config.size import Size
from gpuwatch.errors import ConfigError
from gpuwatch.records import ActionClass, Mode

if TYPE_CHECKING:
    from collections.abc import Sequence

_PLACEHOLDERS: Final[dict[str, object]] = {"command": ["placeholder"], "match": {}}


class _Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class SourceSettings(_Struct, frozen=True, kw_only=True):
    """How often each source is read."""

    nvml_interval: Duration = Duration(1000)
    """A full reading of one H200 takes 10 ms; PCIe throughput, which takes 20 ms more, is not read."""
    host_interval: Duration = Duration(1000)
    metrics_interval: Duration = Duration(2000)
    """vLLM renders a 46 KB page each time."""
    health_interval: Duration = Duration(1000)


class MetricsSettings(_Struct, frozen=True, kw_only=True):
    """Names that readings are stored under."""

    aliases: list[str] = []
    """Besides gpuwatch's own. dcgm: names, units and labels of dcgm-exporter up to 4.8, for its rules."""


class ProcessSettings(_Struct, frozen=True, kw_only=True):
    """A server run as a plain process, for hosts without systemd. gpuwatch adopts it, never owns it."""

    command: list[str]
    """Program and arguments; no shell."""
    cwd: Path = Path("/")
    env: dict[str, str] = {}
    """Added to the daemon's own environment."""
    log_file: Path | None = None
    """Standard output and error; default: `process-NAME.log` in the state folder."""
    stop_timeout: Duration = Duration(30_000)
    """From TERM to KILL of the whole process group; longer than vLLM's --shutdown-timeout."""


class DockerSettings(_Struct, frozen=True, kw_only=True):
    """A server in a container; needs `gpuwatch[docker]`, and the right to use the engine's socket."""

    container: str = ""
    """The container's name; or give `project` and `service`."""
    project: str = ""
    """Of Docker Compose."""
    service: str = ""
    """Of Docker Compose: exactly one container of it."""
    socket: Path = Path("/var/run/docker.sock")
    stop_timeout: Duration = Duration(60_000)
    """From TERM to KILL; longer than vLLM's --shutdown-timeout."""


class SupervisorSettings(_Struct, frozen=True, kw_only=True):
    """Who starts and stops the server: exactly one of these."""

    systemd: str | None = None
    """A unit name such as `vllm.service`."""
    process: ProcessSettings | None = None
    docker: DockerSettings | None = None


class CanarySettings(_Struct, frozen=True, kw_only=True):
    """A request for one token, where nothing else tells whether a server works."""

    enabled: bool = True
    interval: Duration = Duration(300_000)
    """Of an idle server whose requests in flight cannot be seen; in doubt one is asked sooner."""
    timeout: Duration = Duration(10_000)
    """A canary waits its turn behind other requests."""


class ServerSettings(_Struct, frozen=True, kw_only=True):
    """A vLLM server on this host."""

    name: str
    url: str = "http://127.0.0.1:8000"
    """Where `/health` and `/metrics` are; loopback, since vLLM guards neither with its API key."""
    supervisor: SupervisorSettings | None = None
    """Without one gpuwatch watches and tells, and cannot restart."""
    start_deadline: Duration = Duration(900_000)
    """A start that takes longer is a failure. Loading a large model takes minutes."""
    canary: CanarySettings = CanarySettings()
    api_key_file: Path | None = None
    """A file that holds the server's `--api-key`, which is a secret; the canary needs it."""
    revisions: Path | None = None
    """A folder for its settings files, where it runs as `vllm serve --config FOLDER/current.yaml`."""
    python: Path | None = None
    """vLLM's own interpreter, to check settings before they are used; default: the running server's."""
    bounds: dict[str, list[float]] = {}
    """What gpuwatch may change, each option with its least and its most: `max_num_seqs: [16, 256]`."""
    quantised_model: str = ""
    """The last resort where nothing else fits: a model that may be served instead."""


class BudgetSettings(_Struct, frozen=True, kw_only=True):
    """How many remediations a server may have in a span, successful ones counted too."""

    count: int = 3
    per: Duration = Duration(3_600_000)


class RemediationSettings(_Struct, frozen=True, kw_only=True):
    """How far gpuwatch may go by itself."""

    mode: Mode = Mode.OBSERVE
    """observe: say what it would do. approve: ask first. auto: do it."""
    modes: dict[ActionClass, Mode] = {}
    """The same for one class of actions alone: `{reversible: auto, reconfigure: approve}`."""
    cooldown: Duration = Duration(300_000)
    """Rest after a remediation of a server, so that its effect is seen before the next decision."""
    cooldown_most: Duration = Duration(3_600_000)
    """The rest doubles with each remediation within the budget's span, up to this."""
    budget: BudgetSettings = BudgetSettings()
    breaker: BudgetSettings = BudgetSettings(count=3, per=Duration(21_600_000))
    """So many remediations that did not help, of all servers, and nothing is done until a person says so."""
    drain_within: Duration = Duration(60_000)
    """How long requests in hand have to end before a restart that was planned; the rest is aborted."""
    free_within: Duration = Duration(120_000)
    """How long a server that was stopped may take to give its GPU memory back."""
    wait_for_memory: Duration = Duration(300_000)
    """How long a server waits for its share of a GPU that others hold, before it takes what is free."""
    hold_for: Duration = Duration(600_000)
    """How long a limit is held after its alert is over, before it is lifted."""
    good_after: Duration = Duration(600_000)
    """A revision is good, and may be gone back to, once its server served that long on end."""
    least_throughput: float = 0.5
    """Of what it was before: a change that leaves requests waiting and less than this is undone."""
    verify_for: Duration = Duration(30_000)
    """The alert must stay away and the server healthy this long before it counts as helped."""
    step_within: Duration = Duration(900_000)
    """Deadline of a step; a restart includes loading the model."""
    just_started_grace: Duration = Duration(60_000)
    """No action this long after gpuwatch's own start: what it knows may be old."""
    approval_expires: Duration = Duration(1_800_000)
    """An approval asked for and not given lapses; the world has moved on."""


class Policy(_Struct, frozen=True, kw_only=True):
    """Alerts whose labels equal `match` get these steps; the first policy that matches decides."""

    name: str
    match: dict[str, str]
    """Label values that must be equal; `alertname` is a label."""
    steps: list[str] = []
    """Of: release_cache, limit_admission, limit_running, reset_prefix_cache, sleep_wake, drain, restart,
    reconfigure, capture, run. None means: tell people, touch nothing."""
    mode: Mode | None = None
    """Stricter or looser than `remediation.mode` for these alerts."""
    limit: int = 0
    """Of limit_admission and limit_running: how many requests; 0: half of what run when it is decided."""
    command: list[str] = []
    """Of run: program and arguments, no shell. It finds GPUWATCH_SERVER, GPUWATCH_ALERT and GPUWATCH_ID."""
    command_within: Duration = Duration(60_000)
    """Of run: what takes longer is ended."""


DEFAULT_POLICIES: Final = [
    Policy(name="restart", match={"remediation": "restart"}, steps=["capture", "restart"]),
    Policy(name="reconfigure", match={"remediation": "reconfigure"}, steps=["capture", "reconfigure"]),
    Policy(name="return", match={"remediation": "return"}, steps=["reconfigure"]),
    Policy(name="limit", match={"remediation": "limit"}, steps=["limit_running"]),
    Policy(name="tell", match={"remediation": "none"}, steps=[]),
]


class SlackSettings(_Struct, frozen=True, kw_only=True):
    """A Slack incoming webhook."""

    url_file: Path
    """A file that holds the webhook's URL, which is a secret."""


class DingTalkSettings(_Struct, frozen=True, kw_only=True):
    """A DingTalk custom robot with signing."""

    url_file: Path
    """A file that holds the robot's URL with its access_token, which is a secret."""
    secret_file: Path | None = None
    """A file that holds the signing secret (`SEC…`)."""
    at_mobiles: list[str] = []
    """Who is mentioned when a person is needed."""


class ReceiverSettings(_Struct, frozen=True, kw_only=True):
    """Somebody who is told: exactly one kind."""

    name: str
    slack: SlackSettings | None = None
    dingtalk: DingTalkSettings | None = None
    lang: str = "en"
    """en or zh."""


class RemoteWriteSettings(_Struct, frozen=True, kw_only=True):
    """Somebody who gets all samples by Prometheus' remote write 1.0; needs `gpuwatch[remote-write]`."""

    name: str
    url: str
    """Prometheus: `http://host:9090/api/v1/write`; VictoriaMetrics: `http://host:8428/api/v1/write`."""
    external_labels: dict[str, str] = {}
    """Added to every series, as `host` is; a label that a series has stays."""
    bearer_token_file: Path | None = None
    """A file that holds a token, which is a secret."""
    username: str = ""
    password_file: Path | None = None
    """A file that holds the password of `username`."""
    timeout: Duration = Duration(10_000)


class EvaluationSettings(_Struct, frozen=True, kw_only=True):
    """What becomes of alerts that wait for their `for` while gpuwatch, or the host, is down.

    The defaults are a Prometheus server's.
    """

    outage_tolerance: Duration = Duration(3_600_000)
    """After a longer outage pending alerts begin anew; after a shorter one they wait that much longer."""
    for_grace_period: Duration = Duration(600_000)
    """An alert whose `for` is this long or longer fires no sooner than this after an outage."""


class StoreSettings(_Struct, frozen=True, kw_only=True):
    """How long what is kept, and how much room it may take."""

    retention: Duration = Duration(30 * 86_400_000)
    """Samples older than this are deleted."""
    hourly_retention: Duration = Duration(2 * 31_536_000_000)
    """Hourly minimum, average, maximum and last are a thirtieth of the samples' size."""
    max_size: Size = Size(2 * 2**30)
    """Of metrics.db; the oldest samples go when it is reached, whatever their age."""
    min_free: Size = Size(256 * 2**20)
    """Metrics.db grows no further when its filesystem has less left: a guard must not fill the disk."""
    state_url: str = ""
    """Where state.db's records are kept instead: `postgresql+psycopg://user@/database`. No password here."""
    state_url_file: Path | None = None
    """A file that holds that URL with its password, which is a secret."""
    remote_write: list[RemoteWriteSettings] = []
    spool: Duration = Duration(6 * 3_600_000)
    """Samples wait this long, on disk, for a remote_write that does not answer."""


class Settings(_Struct, frozen=True, kw_only=True):
    """The whole configuration."""

    state_dir: Path = Path("/var/lib/gpuwatch")
    """Both databases, and state files of supervised processes."""
    host: str = ""
    """How this host is called in messages; default: its host name."""
    rules: list[Path] = []
    """Rule files or folders of them; default: the rules that gpuwatch ships."""
    lang: str = "en"
    """Language of the command line: en or zh."""
    evaluation: EvaluationSettings = EvaluationSettings()
    store: StoreSettings = StoreSettings()
    sources: SourceSettings = SourceSettings()
    metrics: MetricsSettings = MetricsSettings()
    servers: list[ServerSettings] = []
    remediation: RemediationSettings = RemediationSettings()
    policies: list[Policy] = msgspec.field(default_factory=lambda: list(DEFAULT_POLICIES))
    receivers: list[ReceiverSettings] = []


def load_settings(path: Path | None) -> Settings:
    """Decode a settings file; None gives the defaults. ConfigError carries every mistake found."""
    document = load_document(path) if path else Document(file="defaults")
    value = {} if document.value is None else document.value
    settings = _decode(value, document)
    if settings is not None:
        for trouble in troubles(settings):
            document.mistake(trouble.path, trouble.what)
    if settings is None or document.mistakes:
        raise ConfigError(document.mistakes)
    return settings if settings.host else msgspec.structs.replace(settings, host=socket.gethostname())


def rule_paths(settings: Settings) -> list[Path]:
    """The rule files to load, in order; the shipped ones when none are named."""
    named = settings.rules or [shipped_rules()]
    files: list[Path] = []
    for path in named:
        files += sorted(path.glob("*.y*ml")) if path.is_dir() else [path]
    return files


def with_rules(settings: Settings, paths: Sequence[Path]) -> Settings:
    """The same settings with these rule files instead, if any are given."""
    return msgspec.structs.replace(settings, rules=list(paths)) if paths else settings


def shipped_rules() -> Path:
    """The folder of the rules that come with gpuwatch, installed or in a checkout."""
    installed = Path(str(importlib.resources.files("gpuwatch"))) / "_rules"
    return installed if installed.is_dir() else Path(__file__).parents[3] / "rules"


def shown(settings: Settings) -> dict[str, Any]:
    """The effective settings as plain values, for people; files that hold secrets show as paths only."""
    plain: dict[str, Any] = msgspec.to_builtins(settings, enc_hook=str, builtin_types=())
    return plain


def _decode(value: object, document: Document) -> Settings | None:
    """Convert, noting each mistake and mending its cause, until it converts or cannot."""
    seen: set[tuple[PathKey, str]] = set()
    while True:
        try:
            return msgspec.convert(value, Settings, strict=True, dec_hook=_decode_hook)
        except msgspec.ValidationError as error:
            path, what, missing = _read_error(str(error), value)
            if (path, what) in seen:
                return None
            seen.add((path, what))
            document.mistake(path, what)
            if not _mend(value, path, missing):
                return None


def _decode_hook(kind: type, value: object) -> object:
    if kind is Duration:
        return Duration.parse(value)
    if kind is Size:
        return Size.parse(value)
    if kind is Path:
        if isinstance(value, str) and value:
            return Path(value)
        message = f"{value!r} is no path"
        raise ValueError(message)
    raise NotImplementedError(kind)


def _read_error(text: str, value: object) -> tuple[PathKey, str, str]:
    """Take msgspec's `what - at `$.a[0].b`` apart: path, what, and the missing key if that is it."""
    what, _, where = text.partition(" - at ")
    path = _parse_path(where.strip("`"), value)
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", what)
    if unknown:
        return (*path, unknown[1]), "unknown key" + _suggestion(unknown[1], path), ""
    missing = re.fullmatch(r"Object missing required field `(.*)`", what)
    if missing:
        return path, f"has no {missing[1]!r}, which it needs", missing[1]
    if what.startswith("Invalid enum value"):
        return path, f"{_found(value, path)!r} is none of {', '.join(Mode)}", ""
    found = f"; found {_found(value, path)!r}" if "Expected" in what else ""
    return path, what.replace("`", "") + found, ""


def _parse_path(where: str, value: object) -> PathKey:
    """`$.servers[0].name` as a path; msgspec writes `[...]` for a value of a mapping."""
    path: PathKey = ()
    for name, index in re.findall(r"\.([^.\[\]]+)|\[([^\]]*)\]", where):
        if name:
            path = (*path, name)
        elif index.isdigit():
            path = (*path, int(index))
        elif isinstance(mapping := _found(value, path), dict) and mapping:
            culprit = next((k for k, v in mapping.items() if not isinstance(v, str)), next(iter(mapping)))
            path = (*path, culprit)
    return path


def _found(value: object, path: PathKey) -> object:
    for part in path:
        try:
            value = value[part]  # type: ignore[index]  # the path came from this very value
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _suggestion(key: str, path: PathKey) -> str:
    known: set[str] = set()
    for struct in _Struct.__subclasses__():
        known.update(struct.__struct_fields__)
    import difflib  # noqa: PLC0415 (a quarter of a MiB, for mistakes alone)

    close = difflib.get_close_matches(key, sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f" of {dotted(path)[:-2] or 'the file'}"


def _mend(value: object, path: PathKey, missing: str) -> bool:
    """Put something harmless where the mistake stands, so that the rest can be checked; False if it can't."""
    parent = _found(value, path if missing else path[:-1])
    if isinstance(parent, dict) and missing:
        parent[missing] = _PLACEHOLDERS.get(missing, "placeholder")
    elif isinstance(parent, dict) and path:
        parent.pop(path[-1], None)
    elif isinstance(parent, list) and isinstance(path[-1], int):
        parent[path[-1]] = "placeholder"
    else:
        return False
    return True
