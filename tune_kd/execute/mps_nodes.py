"""NVIDIA's MPS on the nodes of the connected Ray: check whether it serves their GPUs, or start it for a run."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tune_kd.execute import mps, mps_daemon
from tune_kd.execute.cluster import Cluster, RayDied, alive, answers, asked, named
from tune_kd.execute.resources import Mps
from tune_kd.records.run_folder import Run
from tune_kd.system.errors import UserError
from tune_kd.system.object_store import Mirror

PATIENCE = 60.0  # seconds for a node to respond
Nodes = Sequence[Mapping[str, Any]]


def serving(run: Run, cluster: Cluster) -> AbstractContextManager[Mps]:
    """Return a context in which MPS serves the GPUs of the connected Ray, if possible and useful. See `served`."""
    asked, most = run.settings["gpus_per_trial"], run.settings["max_concurrent"] or math.inf
    together = min(most, cluster.cpus / run.settings["cpus_per_trial"])
    # Shares from a probe hold only with MPS, or only without it.
    matters = asked == "auto" and run.settings.get("packing", {"mps": True})["mps"]
    shares = together > cluster.gpus and (matters if asked == "auto" else 0 < asked < 1)
    mirror = Mirror.of(run.folder)
    place = str(run.folder.resolve()) if mirror.url is None else mirror.place(run.folder)
    return served(place, run.settings.get("mps") or "auto", matters=matters, pays=shares)


@contextmanager
def served(run: str, mode: str, *, matters: bool, pays: bool) -> Iterator[Mps]:
    """Within this context, MPS may serve the GPUs of the connected Ray: an existing MPS, or our own, which ends with
    the context. Yields whether MPS serves them.

    `run` is the path or URL of a run, and `mode` its option `--mps`. `matters`: a trial's share depends on MPS. `pays`:
    trials would share a GPU. Starts MPS only if it pays or if `mode` is on. Raises `UserError` if `mode` is on and MPS
    cannot be started.
    """
    folder = mps_daemon.folder_of(run)
    mps_daemon.end(folder)  # left here by a killed run; on other nodes, starting a new daemon ends the old one
    begins = pays or mode == "on"
    if mode == "off" or not (matters or begins):
        yield Mps(False, "--mps is off" if mode == "off" else "")
        return
    nodes = [node for node in alive() if node["Resources"].get("GPU")]
    by_another, problem = _found(nodes)
    if by_another:
        yield Mps(True, "MPS serves the GPUs")
        return
    with ExitStack() as around:
        if begins and not problem:
            problem = around.enter_context(_own(folder, nodes))
            if not problem:
                yield Mps(
                    True, "MPS, started for this run, serves the GPUs", tuple(mps_daemon.variables(folder).items())
                )
                return
    if mode == "on":
        raise UserError(f"--mps is on, and MPS cannot be started: {problem}; allowed: auto or off")
    yield Mps(False, f"MPS does not serve the GPUs{f' ({problem})' if begins else ''}")


def _found(nodes: Nodes) -> tuple[bool, str]:
    """Return whether MPS serves all nodes, and if not, the reason why we cannot start it; empty if we can."""
    found, problems = asked(_question({}), nodes, PATIENCE)
    serving = [node for node, (serves, _) in found.items() if serves]
    if nodes and len(serving) == len(nodes):
        return True, ""
    problems |= {node: f"there is no {mps_daemon.PROGRAM}" for node, (_, program) in found.items() if not program}
    problems |= dict.fromkeys(serving, "another MPS is already running")
    return False, _told(problems, nodes)


def _question(variables: Mapping[str, str]) -> Callable[[], tuple[bool, bool]]:
    """Return a function that tells whether MPS serves a node's GPUs, and whether the node has NVIDIA's MPS program.
    With `variables`, only the MPS in their folder counts."""
    serves = mps.serves

    def ask() -> tuple[bool, bool]:  # runs in a new process; Ray hides the GPUs from a task that requests none
        import os

        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        os.environ.update(variables)
        return serves(), mps_daemon.is_there()

    return ask


def _told(problems: Mapping[str, str], nodes: Nodes) -> str:
    """Return the first problem, with its node if there are several nodes."""
    return next((f"{why}, on the node {node}" if len(nodes) > 1 else why for node, why in problems.items()), "")


class _Keeper:
    """The actor that starts MPS on a node. MPS ends when `end` is called or the actor dies."""

    def __init__(self) -> None:
        self._held = ExitStack()

    def begin(self, folder: Path) -> str:
        """Start MPS. Returns the reason if it did not start, else an empty string."""
        try:
            self._held.enter_context(mps_daemon.started(folder))
        except mps_daemon.NotStarted as error:
            return str(error)
        return ""

    def end(self) -> None:
        self._held.close()


@contextmanager
def _own(folder: Path, nodes: Nodes) -> Iterator[str]:
    """Within this context, an MPS of our own runs on each node. Yields the reason if a node is not served, else an
    empty string."""
    machines = {node["NodeManagerAddress"]: node for node in nodes}.values()  # two nodes may share one in tests
    keepers: list[Any] = []
    ray_lives = True
    try:
        begun = {}
        for node in machines:
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            keepers.append(ray.remote(_Keeper).options(num_cpus=0, scheduling_strategy=strategy).remote())
            begun[keepers[-1].begin.remote(folder)] = named(node)
        reasons, problems = answers(begun, "start MPS", PATIENCE)
        problems |= {node: why for node, why in reasons.items() if why}
        if not problems:
            found, problems = asked(_question(mps_daemon.variables(folder)), nodes, PATIENCE)
            problems |= {
                node: "MPS started, but CUDA does not use it" for node, (served, _) in found.items() if not served
            }
        yield _told(problems, nodes)
    except (RayError, RayDied):
        ray_lives = False  # the keepers die with it
        raise
    finally:
        if ray_lives:
            _end(keepers)


def _end(keepers: Sequence[Any]) -> None:
    with suppress(RayError):
        ray.wait([each.end.remote() for each in keepers], num_returns=len(keepers), timeout=2 * mps_daemon.ENDING)
        for each in keepers:
            ray.kill(each)
