"""The metrics page of a machine on which no `concord up` runs: `python -m scripts.exporter --directory DIR/metrics`.

Actors on the nodes of a Ray cluster keep their counts in files as everywhere (`infra/metrics.py`), but the supervisor
that would serve them is on another machine. This serves them, and nothing else: read-only, no credentials, one page.
It runs beside the actors, as a process or a container that sees the same directory and, for memory and descriptors,
the same processes (in Kubernetes: `shareProcessNamespace`).
"""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from infra.metrics import metrics_page

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Exporter(ThreadingHTTPServer):
    """Serves `/metrics` of a directory. Raises OSError when the address is taken."""

    daemon_threads = True

    def __init__(self, directory: Path, address: tuple[str, int]) -> None:
        super().__init__(address, _Handler)
        self.directory = directory


class _Handler(BaseHTTPRequestHandler):
    server: Exporter
    server_version = "concord"
    sys_version = ""

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404, "there is only /metrics")
            return
        page = metrics_page(self.server.directory)
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, format: str, *arguments: object) -> None:
        """A scrape every few seconds is no news."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.exporter", description="The metrics page of a directory.")
    parser.add_argument("--directory", type=Path, required=True, help="where actors and workers count: DIR/metrics")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; the page is open to who reaches it")
    parser.add_argument("--port", type=int, default=9464, help="port to listen on")
    arguments = parser.parse_args()
    try:
        exporter = Exporter(arguments.directory, (arguments.host, arguments.port))
    except OSError as error:
        print(
            f"{arguments.host}:{arguments.port} cannot be listened on ({error}); choose another --port", file=sys.stderr
        )
        return 1
    print(f"http://{exporter.server_address[0]}:{exporter.server_address[1]}/metrics", flush=True)
    with suppress(KeyboardInterrupt):
        exporter.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
