"""``pad-vllm traces``"""

from __future__ import annotations

import argparse
import json
import sys

from pad_vllm.evaluation.traces import FIELDS, grouped, plot_traces, read_traces, trace_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="that pad.trace names in the server's configuration")
    parser.add_argument("--by", default="persona", choices=FIELDS, help="field of a row (default %(default)s)")
    parser.add_argument("--plot", metavar="FILE", help="write a plot too: PNG, SVG or PDF; takes pad-vllm[plot]")
    parser.add_argument("--json", action="store_true", help="print JSON, and no tables")


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
        print(f"{found.num_unread} lines are no traces, and were left out.", file=sys.stderr)
    return 0
