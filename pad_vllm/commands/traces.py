"""``pad-vllm traces``"""

from __future__ import annotations

import argparse
import json
import sys

from pad_vllm.evaluation.traces import FIELDS, grouped, plot_traces, read_traces, trace_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="the folder that pad.trace names in the server's configuration")
    parser.add_argument(
        "--by", default="persona", choices=FIELDS, help="group requests by this field (default %(default)s)"
    )
    parser.add_argument("--plot", metavar="FILE", help="also write a plot (PNG, SVG or PDF); needs pad-vllm[plot]")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(folder, by, plot, **settings) -> int:
    found = read_traces(folder)
    groups = grouped(found.lines, by)
    if settings["json"]:
        print(json.dumps([group._asdict() for group in groups]))
    else:
        print(trace_table(groups, by))
    if plot is not None:
        plot_traces(groups, plot, by)
    if found.num_unread:
        print(f"{found.num_unread} lines are not traces and were skipped.", file=sys.stderr)
    return 0
