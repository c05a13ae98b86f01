"""`PYTHON offline.py --config FILE`: whether vLLM would take these settings, as one line of JSON.

It runs in vLLM's own interpreter, and it starts no engine and takes no GPU memory. That a server fits its GPU
is not told by it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

# Where `make_arg_parser` lives: in 0.33, in 0.25 to 0.32, and before.
_PARSERS = (
    "vllm.entrypoints.common.cli_args",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.entrypoints.openai.cli_args",
)
_FLEXIBLE = ("vllm.utils.argparse_utils", "vllm.utils")
_RESOLVED = {
    "max_num_seqs": "scheduler_config",
    "max_num_batched_tokens": "scheduler_config",
    "max_model_len": "model_config",
    "dtype": "model_config",
    "quantization": "model_config",
    "gpu_memory_utilization": "cache_config",
    "cache_dtype": "cache_config",
    "block_size": "cache_config",
    "enable_prefix_caching": "cache_config",
    "tensor_parallel_size": "parallel_config",
}
_LONGEST = 500
_NO_DEVICE = "Failed to infer device type"


class Refused(Exception):  # noqa: N818 (it is an answer)
    """The settings cannot be used. `kind`: bad_file, bad_argument, ignored, bad_settings, no_vllm."""

    def __init__(self, kind: str, error: str) -> None:
        self.kind = kind
        super().__init__(error)


class Unseen(Exception):  # noqa: N818
    """The arguments are right as far as this user can see on this host."""


def main() -> int:
    """Print the answer on standard output, all else on standard error; 0 if the settings are taken."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--config", required=True, help="a YAML file for vllm serve --config")
    file = options.parse_args().config
    # Modules beside this one must not stand before those of the same name that vLLM means.
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [path for path in sys.path if os.path.realpath(path or ".") != here]
    # A model that is not on this host is no mistake of the settings, and a download no part of a check.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    out = os.dup(1)
    os.dup2(2, 1)
    answer = check(file)
    sys.stdout.flush()
    os.write(out, (json.dumps(answer) + "\n").encode())
    return 0 if answer["ok"] else 1


def check(file: str) -> dict[str, object]:
    """`ok` with `resolved`, `version` and, if not all could be seen here, `partial`; or `error`, `kind`."""
    version = ""
    try:
        given = _given(file)
        version = _vllm()
        return {"ok": True, "version": version, "resolved": _resolved(_parsed(file, given))}
    except Refused as refused:
        return {"ok": False, "kind": refused.kind, "error": str(refused)[:_LONGEST]}
    except Exception as error:  # noqa: BLE001 (whatever it is, who asked gets an answer)
        if isinstance(error, Unseen) or _NO_DEVICE in str(error):
            return {"ok": True, "version": version, "resolved": {}, "partial": _last_line(error)[:_LONGEST]}
        said = f"not a vllm that is known: {type(error).__name__}: {_last_line(error)}"
        return {"ok": False, "kind": "no_vllm", "error": said[:_LONGEST]}


def _given(file: str) -> dict[str, object]:
    try:
        yaml = importlib.import_module("yaml")
        given = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except ImportError as error:
        raise Refused("no_vllm", _last_line(error)) from error
    except (OSError, ValueError) as error:
        raise Refused("bad_file", f"{file}: {_last_line(error)}") from error
    except Exception as error:
        raise Refused("bad_file", f"{file}: is no YAML: {_last_line(error)}") from error
    if not isinstance(given, dict) or not given:
        raise Refused("bad_file", f"{file}: is no mapping of vLLM's options")
    return given


def _vllm() -> str:
    """Its version."""
    try:
        return str(importlib.import_module("vllm").__version__)
    except Exception as error:
        raise Refused("no_vllm", f"{sys.executable} cannot import vllm: {_last_line(error)}") from error


def _first(modules: tuple[str, ...], name: str) -> Any:  # noqa: ANN401 (vLLM's own, whose types are not at hand)
    """What several versions have in several places."""
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except AttributeError:
            continue
        except ModuleNotFoundError as error:
            if not module.startswith(error.name or "?"):  # it is there, and lacks what it needs
                raise
    raise Refused("no_vllm", f"this version of vllm has no {name} where others have it")


def _parsed(file: str, given: dict[str, object]) -> argparse.Namespace:
    """The arguments as `vllm serve --config FILE` would have them, each of `given` among them."""
    top = _first(_FLEXIBLE, "FlexibleArgumentParser")(prog="vllm")
    # As a command of its own below another parser: whether `false` is honoured depends on it.
    serve = top.add_subparsers(dest="subparser").add_parser("serve")
    _first(_PARSERS, "make_arg_parser")(serve)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed: argparse.Namespace = top.parse_args(["serve", "--config", file])
    except SystemExit as end:
        raise Refused("bad_argument", _last_line(said.getvalue()).partition("error: ")[2]) from end
    except (ValueError, TypeError, AttributeError) as error:
        raise Refused("bad_argument", _last_line(error)) from error
    ignored = [key for key, value in given.items() if not _reached(serve, parsed, key, value)]
    if ignored:
        raise Refused("ignored", f"vLLM does not take these as they stand: {', '.join(ignored)}")
    return parsed


def _reached(serve: argparse.ArgumentParser, parsed: argparse.Namespace, key: str, value: object) -> bool:
    """Whether a key of the file became the argument of that name, with that value."""
    option = "--" + key.replace("_", "-")
    action = serve._option_string_actions.get(option)  # noqa: SLF001 (there is no other way to ask)
    if action is None:
        return False
    found = getattr(parsed, action.dest)
    if isinstance(value, bool):
        is_negative = option.startswith("--no-") and "--" + option[len("--no-") :] in action.option_strings
        return found is (value is not is_negative) or (value and not is_negative and bool(found))
    if isinstance(value, list):
        return isinstance(found, list) and len(found) == len(value)
    if isinstance(value, dict):  # what the option makes of it need not be equal to a second one
        return bool(found != action.default)
    converted = _converted(action, str(value))
    return bool(found in (converted, [converted]))  # one word of an option that takes several


def _converted(action: argparse.Action, text: str) -> object:
    try:
        return action.type(text) if callable(action.type) else text
    except (TypeError, ValueError, argparse.ArgumentTypeError):
        return text


def _resolved(parsed: argparse.Namespace) -> dict[str, object]:
    """What vLLM makes of the arguments; Unseen where that depends on what is not to be seen here."""
    engine = importlib.import_module("vllm.engine.arg_utils").AsyncEngineArgs
    context = importlib.import_module("vllm.usage.usage_lib").UsageContext.OPENAI_API_SERVER
    try:
        with contextlib.suppress(Refused):  # a version may have none
            _first(_PARSERS, "validate_parsed_serve_args")(parsed)
        # What is not given depends on who asks: the defaults of a server are not those of a library.
        config = engine.from_cli_args(parsed).create_engine_config(usage_context=context)
    except Exception as error:
        if _NO_DEVICE in str(error):
            raise
        if isinstance(error, OSError) or _is_out_of_sight(str(parsed.model)):
            raise Unseen(f"the model cannot be read here: {_last_line(error)}") from error
        raise Refused("bad_settings", _last_line(error)) from error
    return {name: _plain(getattr(getattr(config, at), name, None)) for name, at in _RESOLVED.items()}


def _is_out_of_sight(model: str) -> bool:
    """Whether a folder may be there for vLLM's user and cannot be seen by this one, as homes often are."""
    return model.startswith("/") and not any(os.access(path, os.R_OK) for path in (model, Path(model).parent))


def _plain(value: object) -> object:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _last_line(said: object) -> str:
    """Of an error's text what tells; pydantic's says it in parts."""
    errors = getattr(said, "errors", None)
    if callable(errors):
        with contextlib.suppress(Exception):
            parts = (": ".join([*map(str, one["loc"]), one["msg"]]) for one in errors())
            return "; ".join(part.removeprefix("Value error, ") for part in parts)
    lines = [line.strip() for line in str(said).splitlines() if line.strip()]
    return lines[-1] if lines else type(said).__name__


if __name__ == "__main__":
    os._exit(main())  # what vLLM says at its end must not follow the answer, where both go to one file
