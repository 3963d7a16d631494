"""The Ray cluster of a run: start or join it, check its nodes, monitor it, disconnect."""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import ray
from ray._private import ray_constants, services
from ray.exceptions import RayError, RayTaskError
from ray.job_config import JobConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tune_kd.execute.monitoring import asks_for_token
from tune_kd.system.environment import guard_token, private, ray_folder
from tune_kd.system.errors import UserError, raise_problems
from tune_kd.system.signals import check, held_back, leave, note

T = TypeVar("T")
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Part:
    """A process of Ray that a run depends on."""

    name: str
    host: str
    port: int
    patience: float  # seconds without a response after which it counts as dead


@dataclass(frozen=True)
class Cluster:
    """The resources of a connected Ray, its dashboard and its processes."""

    cpus: float
    gpus: float
    dashboard: str | None
    guarded: bool  # whether the dashboard asks for Ray's token
    ours: bool  # `connect` made the connection, so `disconnect` closes it
    logs: Path  # folder with the logs of this node, which the dashboard shows
    parts: tuple[Part, ...]  # monitored by `watched`


def connect(address: str | None, metadata: Mapping[str, str] | None = None) -> Cluster:
    """Join the Ray cluster at `address`; None starts Ray on this machine. `metadata` describes this process, which Ray
    lists as a job. Raises `UserError` if Ray cannot be reached or started."""
    context: Any
    ours = not ray.is_initialized()
    if ours:
        settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        settings["job_config"] = JobConfig(metadata=dict(metadata or {}))
        if address is None:
            guard_token()
            settings |= {"dashboard_host": LOOPBACK, "_temp_dir": str(ray_folder())}
        around = on_this_machine if address is None or _is_on_loopback(address) else nullcontext
        try:
            with held_back(), _own_sigterm(), around():
                context = ray.init(address=address or "local", **settings)
        except SystemExit as left:
            if left.code == signal.SIGTERM:  # Ray's own handler exits with the bare number
                note(signal.SIGTERM)
            check()
            raise
        except (ConnectionError, ValueError, RuntimeError) as error:
            where = f"the cluster at {address}" if address else "Ray on this machine"
            if address and "RAY_AUTH_MODE" not in os.environ:
                where += " (if it asks for a token, set RAY_AUTH_MODE=token)"
            raise UserError(f"--address is {address}: {where} cannot be reached or started ({error})") from error
    else:
        context = ray.init(ignore_reinit_error=True)
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    dashboard = f"http://{context.dashboard_url}" if context.dashboard_url else None
    return Cluster(
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        dashboard=dashboard,
        guarded=asks_for_token(dashboard, unset="disabled"),  # Ray sets RAY_AUTH_MODE if it requires a token
        ours=ours,
        logs=Path(context.address_info["session_dir"], "logs"),
        parts=_parts(restarts=address is not None),
    )


@contextmanager
def on_this_machine() -> Iterator[None]:
    """Within this context, Ray starts in private: only this user can access its files, and all its processes listen on
    loopback, since they use no other address of this machine."""
    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before = os.environ.get(name)
    os.environ[name] = "0"  # inherited by Ray's processes
    try:
        with private(), patch.object(ray_constants, "ENABLE_RAY_CLUSTER", False):
            yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _is_on_loopback(address: str) -> bool:
    """Whether the Ray at an address listens only on loopback, as the Ray of another run on this machine does. By
    default, Ray would replace loopback with the machine's network address."""
    with suppress(ConnectionError):
        found = services.get_ray_address_from_environment(address, None) if address == "auto" else address
        running: frozenset[str] = services.find_gcs_addresses()  # type: ignore[no-untyped-call]
        return found in running and found.startswith(f"{LOOPBACK}:")
    return False


def _parts(restarts: bool) -> tuple[Part, ...]:
    """Return this node's raylet, which nothing restarts, and the control store, which a cluster may restart."""
    context = ray.get_runtime_context()
    here = next(node for node in alive() if node["NodeID"] == context.get_node_id())
    host, _, port = context.gcs_address.rpartition(":")
    return (
        Part("raylet", here["NodeManagerAddress"], here["NodeManagerPort"], patience=5.0),
        Part("control store", host.strip("[]"), int(port), patience=20.0 if restarts else 5.0),
    )


ALIKE = ("python", "ray", "tune_kd", "torch", "torchvision", "numpy")  # versions that affect results or Ray itself


def check_nodes(folder: Path | None, patience: float = 120.0) -> None:
    """Raise `UserError` if another node of the connected Ray lacks a package, has another version of it, or does not
    see the shared folder. `folder` is None if the nodes share an object store instead."""
    names = tuple(name for name in ALIKE if name != "python")
    shared = None if folder is None else str(folder.absolute())

    def versions() -> dict[str, str]:  # a local function, which Ray pickles by value: the node may lack this package
        import os
        import platform
        from importlib.metadata import PackageNotFoundError, version

        found = {"python": platform.python_version()}
        for name in names:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = "missing"
        if shared is not None and not os.path.isdir(shared):
            found["lacks"] = shared
        return found

    own = versions()
    here = ray.get_runtime_context().get_node_id()
    found, silent = asked(versions, [node for node in alive() if node["NodeID"] != here], patience)
    problems = [f"--address: the node {node} {why}; allowed: nodes that run tasks" for node, why in silent.items()]
    for node, has in found.items():
        if has.pop("lacks", None) is not None:
            problems.append(
                f"--out: the node {node} does not see {shared}; allowed: a folder on storage that all nodes "
                "have mounted there, or s3://BUCKET/PATH"
            )
        for name, there in has.items():
            if there != own[name]:
                problems.append(f"--address: the node {node} has {name} {there}, and the driver has {own[name]}; "
                                "allowed: the same version on all nodes, since results depend on it")  # fmt: skip
    raise_problems(problems)


def alive() -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in nodes if node["Alive"]]


def asked(
    question: Callable[[], T], nodes: Sequence[Mapping[str, Any]], patience: float
) -> tuple[dict[str, T], dict[str, str]]:
    """Call a function on each node, each in a new process. Returns two mappings by node: the results, and the problems
    of nodes without a result within `patience` seconds."""
    questions = {}
    for node in nodes:
        ask: Any = ray.remote(max_calls=1)(question)
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        questions[ask.options(num_cpus=0, scheduling_strategy=strategy).remote()] = named(node)
    return answers(questions, "run a task", patience)


def named(node: Mapping[str, Any]) -> str:
    """Return the name of a node for messages."""
    return f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"


def answers(
    questions: Mapping["ray.ObjectRef[T]", str], what: str, patience: float
) -> tuple[dict[str, T], dict[str, str]]:
    """Wait for results from nodes. `questions` maps each object reference to a node; `what` describes the request.

    Returns two mappings by node: the results, and the problems of nodes without a result within `patience` seconds.
    """
    asked = list(questions)
    answered, late = ray.wait(asked, num_returns=len(asked), timeout=patience) if asked else ([], [])
    found, silent = {}, {questions[each]: f"does not {what} within {patience:.0f} s" for each in late}
    for each in answered:
        try:
            found[questions[each]] = ray.get(each)
        except RayError as error:  # the node or the result was lost, or the node cannot unpickle the function
            silent[questions[each]] = f"cannot {what} ({words(error)})"
    return found, silent


def slots(cluster: Cluster, cpus: float, gpus: float) -> int:
    """Return the number of concurrent trials with these shares that fit on a cluster, at least 1."""
    fits = [cluster.cpus / cpus]
    if gpus:
        fits.append(cluster.gpus / gpus)
    return max(1, int(min(fits) + 1e-9))


def disconnect(cluster: Cluster) -> None:
    if cluster.ours:
        with held_back(), _own_sigterm():
            ray.shutdown()


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Restore the handler of SIGTERM at the end of this context. Ray replaces it."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


class RayDied(OSError):
    """Ray died during a run. The ledger is intact."""


LEAVE_WITHIN = 10.0  # seconds for an orderly shutdown after Ray died


@contextmanager
def watched(cluster: Cluster, advice: str) -> Iterator[Callable[[], None]]:
    """Monitor the connected Ray in a thread. If the raylet dies, Tune waits forever. If the control store dies, Ray
    ends this process after a minute with status 1, which means failed trials in tune_kd.

    Yields a function that raises `RayDied` once Ray is dead. If the process is still in this context `LEAVE_WITHIN`
    seconds later, the thread ends the process with the exit status of `RayDied`.
    """
    died: list[str] = []
    over = threading.Event()

    def watch() -> None:
        heard = {part.name: time.monotonic() for part in cluster.parts}
        while not died and not over.wait(1.0):
            for part in cluster.parts:
                if _listens(part):
                    heard[part.name] = time.monotonic()
                elif time.monotonic() - heard[part.name] > part.patience:
                    died.append(f"Ray died: its {part.name} does not respond; {advice}")
        if died and not over.wait(LEAVE_WITHIN):
            leave(3, died[0])

    def check() -> None:
        if died:
            raise RayDied(died[0])

    threading.Thread(target=watch, name="tune_kd-watch", daemon=True).start()
    try:
        yield check
    finally:
        over.set()


@contextmanager
def told(advice: str) -> Iterator[None]:
    """Within this context, turn a RayError into `RayDied`."""
    try:
        yield
    except RayError as error:
        raise RayDied(f"Ray failed: {words(error)}; {advice}") from error


def words(error: RayError) -> str:
    """Return an error of Ray as one line: the last line of an exception in a task, the first line of other errors."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = lines[-1 if isinstance(error, RayTaskError) else 0] if lines else ""
    return f"{type(error).__name__}: {told}" if told else type(error).__name__


def _listens(part: Part) -> bool:
    try:
        socket.create_connection((part.host, part.port), timeout=3.0).close()
    except OSError:
        return False
    return True
