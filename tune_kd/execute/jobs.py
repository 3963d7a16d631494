"""Run commands on a remote cluster as Ray jobs: submit a job, follow its log, find it again. A job's working directory
is a copy of this project, so a command works there as it does here."""

import asyncio
import logging
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import distribution, requires, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from packaging.requirements import Requirement
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from tune_kd.execute.monitoring import is_url
from tune_kd.study.source import INSTALLED
from tune_kd.system.environment import token_file
from tune_kd.system.errors import UserError
from tune_kd.system.files import MOST_RECORD_BYTES, read

START = "tune_kd.sh"  # script that starts a job
STARTING = 60.0  # seconds to wait for the dashboard agents of a cluster
CHATTY = ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging")
UNREACHABLE = (ConnectionError, RuntimeError, ValueError, OSError)  # what Ray raises for a bad address


def client(address: str) -> JobSubmissionClient:
    """Connect to the dashboard at `address`. Raises `UserError` if it does not respond or refuses our token."""
    if not is_url(address):
        raise UserError(
            f"--address is {address}; allowed: the URL of the cluster's dashboard, such as http://HEAD:8265"
        )
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    token = os.environ.get("RAY_AUTH_TOKEN")
    with suppress(OSError):
        token = token or read(token_file(), MOST_RECORD_BYTES).decode().strip()
    try:
        found = JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"} if token else {})
        found.list_jobs()
    except AuthenticationError as error:
        raise UserError(
            f"--address is {address}, which {'refuses this token' if token else 'asks for a token'}; allowed: the "
            f"token that `ray get-auth-token` prints on its head node, in RAY_AUTH_TOKEN or in {token_file()}"
        ) from error
    except UNREACHABLE as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"--address is {address}, where no Ray dashboard responds ({why})") from error
    return found


def submit(
    cluster: JobSubmissionClient,
    arguments: Sequence[str],
    metadata: Mapping[str, str],
    *,
    study: Mapping[str, Path] = MappingProxyType({}),
    install: bool = False,
) -> str:
    """Submit `python -m tune_kd` with these arguments to a cluster, and return the job's id.

    The job works in a copy of this project plus the files of a user's `study`, under the names given. With `install`,
    Ray first installs this project's dependencies there, in the versions installed here. Raises `UserError` if the
    cluster refuses the job.
    """
    with _copy(study) as folder:
        environment: dict[str, Any] = {"working_dir": str(folder)}
        if install:
            environment["pip"] = {"packages": dependencies(), "pip_check": False}
        command = f"sh {START} {shlex.join(arguments)}"
        last = time.monotonic() + STARTING
        while True:
            try:
                return cluster.submit_job(entrypoint=command, runtime_env=environment, metadata=dict(metadata))
            except UNREACHABLE as error:
                if "No available agent" not in str(error) or time.monotonic() > last:
                    raise UserError(f"--address: the cluster does not accept the job ({error})") from error
            time.sleep(1.0)


@contextmanager
def _copy(study: Mapping[str, Path]) -> Iterator[Path]:
    """Make a temporary folder for a job: this project, its metadata (for the version) and a study."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for source in (Path(__file__).parents[1], INSTALLED):
            shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        home = folder / f"tune_kd-{version('tune_kd')}.dist-info"
        home.mkdir()
        (home / "METADATA").write_text(distribution("tune_kd").read_text("METADATA") or "")
        # Use the interpreter of this process if the cluster has it, else the one that started the cluster.
        python = f'P={shlex.quote(sys.executable)}; [ -x "$P" ] || P=python'
        (folder / START).write_text(f'{python}; exec "$P" -m tune_kd "$@"\n')
        for place, file in study.items():
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder / place)
        yield folder


def dependencies() -> list[str]:
    """Return this project's requirements without Ray, which a cluster has, pinned to the versions installed here."""
    names = (Requirement(each) for each in requires("tune_kd") or ())
    return [f"{each.name}=={version(each.name)}" for each in names if each.name != "ray" and each.marker is None]


def follow(cluster: JobSubmissionClient, job: str, show: Callable[[str], None]) -> int:
    """Show a job's log as it grows, and return the exit status of its command. Raises `UserError` if the job never
    started."""
    shown = 0

    async def tail() -> None:
        nonlocal shown
        passed = 0
        async for text in cluster.tail_job_logs(job):
            new = text[max(0, shown - passed) :]  # after a lost connection, Ray sends the log again from its start
            passed += len(text)
            shown = max(shown, passed)
            if new:
                show(new)

    while not (info := cluster.get_job_info(job)).status.is_terminal():
        with suppress(*UNREACHABLE):
            asyncio.run(tail())
        time.sleep(0.2)
    if rest := cluster.get_job_logs(job)[shown:]:  # written after the last read
        show(rest)
    if info.driver_exit_code is not None:
        return int(info.driver_exit_code)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.status == JobStatus.STOPPED:
        return 143
    lines = [line.strip() for line in (info.message or "").splitlines() if line.strip()]
    raise UserError(f"--address: the cluster could not start the job: {lines[-1] if lines else info.status}")


def find(cluster: JobSubmissionClient, run: str) -> dict[str, str]:
    """Return the metadata of the newest job of a run, as given to `submit`. Raises `UserError` if no job is found."""
    jobs = [(each.start_time or 0, each.metadata or {}) for each in cluster.list_jobs() if each.submission_id]
    ours = {at: told for at, told in jobs if {"run", "out"} <= set(told)}
    theirs = [at for at, told in ours.items() if told["run"] == run]
    if not theirs:
        names = ", ".join(sorted({told["run"] for told in ours.values()}))
        raise UserError(f"RUN is {run!r}; allowed: a run that was submitted to this cluster ({names or 'it has none'})")
    return ours[max(theirs)]
