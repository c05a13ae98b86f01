"""The expressions of rule files, ours and those of public packs where they stand beside the project."""

from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
PACKS = ROOT.parent / "shared/conformance/rulepacks"


def ours():
    return sorted(ROOT.glob("rules/**/*.yaml"))


def packs():
    return sorted(path for pattern in ("*.yaml", "*.yml") for path in PACKS.rglob(pattern))


def expressions(paths):
    """Every `expr` of a rule, each once."""
    todo = [document for path in paths for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))]
    found = set()
    while todo:
        node = todo.pop()
        if isinstance(node, list):
            todo += node
        elif isinstance(node, dict):
            todo += node.values()
            if "expr" in node and {"alert", "record"} & node.keys():
                found.add(str(node["expr"]))
    return sorted(found)
