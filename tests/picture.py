"""Draws docs/status.svg: `gpuwatch status` in the middle of the recorded incidents, as a terminal has it."""

import io
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
RECORDING = ROOT / "tests/recordings/h200-vllm024-incidents.jsonl.xz"
SPEED = 6  # the server dies at 274 s, beside a rival that has filled the device


def main():
    with tempfile.TemporaryDirectory() as state:
        settings = Path(state) / "gpuwatch.yaml"
        settings.write_text(f"state_dir: {state}\nhost: gpu-a01\n")
        gpuwatch = [sys.executable, "-m", "gpuwatch"]
        play = ["run", "--config", settings, "--recording", RECORDING, "--speed", str(SPEED)]
        daemon = subprocess.Popen([*gpuwatch, *play], stderr=subprocess.PIPE, text=True)
        for line in daemon.stderr:
            if "VLLMDown firing" in line:
                break
        status = [*gpuwatch, "status", "--config", settings]
        shown = subprocess.run(status, capture_output=True, text=True, check=True).stdout
        daemon.terminate()
        daemon.wait(30)
    head, *rest = shown.splitlines()
    head = "gpuwatch on gpu-a01 · running" + head[head.index(" · mode") :]  # a recording's clock is not ours
    console = Console(record=True, width=104, file=io.StringIO())
    console.print(Text("$ gpuwatch status", style="bold"))
    for line in [head, *rest]:
        is_loud = any(word in line for word in ("DOWN", "FIRING", "CRITICAL", "WARNING"))
        console.print(Text(line, style="bold red" if is_loud else ""))
    drawn = console.export_svg(title="gpuwatch")
    drawn = re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.DOTALL)  # no fonts from elsewhere
    (ROOT / "docs/status.svg").write_text(re.sub(r"<!--.*?-->", "", drawn))


if __name__ == "__main__":
    main()
