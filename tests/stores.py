"""A real object store for tests: moto's S3 on loopback, behind which requests can fail, dawdle or break off."""

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
    """What was asked of it, and what to do with the next request: nothing, or a fault by its number from 1."""

    port: int = 0
    asked: list[tuple[str, str]] = field(default_factory=list)  # method and path
    fault: Callable[[int], str | None] = lambda number: None  # "error", "denied", "cut" or "slow"
    before: Callable[[str, str], object] = lambda method, path: None  # is called before a request is done

    def url(self, path: str) -> str:
        return f"s3://bucket/{path}?endpoint_override=127.0.0.1:{self.port}&scheme=http"

    def gets(self, end: str) -> int:
        """How often an object was fetched whose name ends like this."""
        return sum(method == "GET" and path.endswith(end) for method, path in self.asked)


@contextmanager
def store() -> Iterator[Store]:
    """A store with a bucket named `bucket`."""
    found = Store()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = DomainDispatcherApplication(create_backend_app)
    lock = threading.Lock()

    def faulty(environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        with lock:
            found.asked.append((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
            fault = found.fault(len(found.asked))
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
        for path, method in (("moto-api/reset", "POST"), ("bucket", "PUT")):  # all stores of a process are one
            asked = urllib.request.Request(f"http://127.0.0.1:{found.port}/{path}", method=method)
            urllib.request.urlopen(asked, timeout=30).close()
        found.asked.clear()
        yield found
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def google() -> Iterator[str]:
    """A store as Google's, with a bucket named `bucket`; gives the URL of a folder in it."""
    from gcp_storage_emulator.server import create_server

    port = free_port()
    logging.getLogger("gcp_storage_emulator").setLevel(logging.ERROR)
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    try:
        yield f"gs://anonymous@bucket/kd?scheme=http&endpoint_override=127.0.0.1:{port}"
    finally:
        server.stop()
