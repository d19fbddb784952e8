"""``pad-vllm playground``"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="a server that runs the plugin, such as http://localhost:8000")
    parser.add_argument("--host", default="127.0.0.1", help="address on which the page is served (default %(default)s)")
    parser.add_argument(
        "--port", type=int, default=8080, help="port of the page; 0 takes a free one (default %(default)s)"
    )
    parser.add_argument("--api-key", help="API key of the server, which the page does not see (default $VLLM_API_KEY)")


def run(url: str, host: str, port: int, api_key: str | None) -> int:
    from pad_vllm.playground.server import is_loopback, playground

    api_key = api_key or os.environ.get("VLLM_API_KEY") or None
    if api_key is not None and not is_loopback(host):
        print(f"warning: whoever reaches {host} uses the server with your API key", file=sys.stderr)
    with playground(url, host, port, api_key) as page, contextlib.suppress(KeyboardInterrupt):
        print(f"The playground of {url}: {page} (Ctrl-C ends it)", flush=True)
        threading.Event().wait()
    return 0
