"""Object stores for tests: moto's S3 on loopback, with faults on request, and an emulator of Google's store."""

import logging
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from conftest import free_port

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass
class Store:
    """The requests so far, and the faults of the next ones. Requests are numbered from 1."""

    port: int = 0
    requests: list[tuple[str, str]] = field(default_factory=list)  # method and path of each request
    fault: Callable[[int], str | None] = lambda number: None  # "error", "denied", "cut" or "slow"
    before: Callable[[str, str], object] = lambda method, path: None  # called before a request is served

    def url(self, path: str) -> str:
        return f"s3://bucket/{path}?endpoint_override=127.0.0.1:{self.port}&scheme=http"

    def gets(self, end: str) -> int:
        """Return the number of GET requests for objects whose path ends with `end`."""
        return sum(method == "GET" and path.endswith(end) for method, path in self.requests)


@contextmanager
def store() -> Iterator[Store]:
    """Serve an S3 store with a bucket named `bucket`."""
    found = Store()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = DomainDispatcherApplication(create_backend_app)
    lock = threading.Lock()

    def faulty(environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        with lock:
            found.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
            fault = found.fault(len(found.requests))
        found.before(environ["REQUEST_METHOD"], environ["PATH_INFO"])
        if fault == "slow":
            time.sleep(0.3)
        elif fault == "error" or (fault == "cut" and environ["REQUEST_METHOD"] not in ("GET", "PUT")):
            start("503 Slow Down", [("Content-Length", "0"), ("Connection", "close")])
            return []
        elif fault == "denied":
            start("403 Forbidden", [("Content-Length", "0"), ("Connection", "close")])
            return []
        elif fault == "cut":
            start("200 OK", [("Content-Length", "1000"), ("Connection", "close")])
            return [b"half of"]
        return app(environ, start)

    server = make_server("127.0.0.1", 0, faulty, threaded=True)
    found.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        for path, method in (("moto-api/reset", "POST"), ("bucket", "PUT")):  # moto's stores share state
            request = urllib.request.Request(f"http://127.0.0.1:{found.port}/{path}", method=method)
            urllib.request.urlopen(request, timeout=30).close()
        found.requests.clear()
        yield found
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def google() -> Iterator[str]:
    """Serve an emulated Google store with a bucket named `bucket`. Yields the URL of a folder in it."""
    from gcp_storage_emulator.server import create_server

    port = free_port()
    logging.getLogger("gcp_storage_emulator").setLevel(logging.ERROR)
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    try:
        yield f"gs://anonymous@bucket/kd?scheme=http&endpoint_override=127.0.0.1:{port}"
    finally:
        server.stop()
