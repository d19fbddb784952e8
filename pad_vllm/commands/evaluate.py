"""``pad-vllm eval``"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="JSON or YAML file that says what to evaluate; see docs/training.md")
    parser.add_argument("--output", required=True, help="folder in which the table, the JSON and the plots are written")


def run(config: str, output: str) -> int:
    from pad_vllm.evaluation.evaluate import asked_of, cells_of, evaluate, read_config
    from pad_vllm.evaluation.report import plot, table

    sys.path.insert(0, str(Path(config).resolve().parent))  # the checker's module may stand beside its name
    settings, folder = read_config(config), Path(output)
    folder.mkdir(parents=True, exist_ok=True)  # before the hours that it takes, not after them
    result = evaluate(settings)
    print(table(result["rows"]))  # seen, should the disk be full
    (folder / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "evaluation.md").write_text(table(result["rows"]))
    methods = [asked.method for asked in asked_of(settings, cells_of(settings))]
    plot({"base": result["rows"]}, folder, methods)
    return 0
