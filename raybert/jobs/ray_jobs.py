"""Ray Jobs: a command of raybert's, run on a cluster and followed from here.

A job carries the package and one resolved configuration, nothing else. The run's name makes
submitting idempotent: while a job of that run and command is alive, submitting it again follows
that one, and another command that would write the same stages is refused; a run that died is
resumed by the job that comes after, as it is on one machine.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shlex
import shutil
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from raybert.cluster import token
from raybert.cluster.internals.core import JOB_CLIENT_LOGGERS
from raybert.config import Settings, differences, dump, flatten
from raybert.errors import RaybertError, StorageError, UserError, one_line

PORT = 8265  # of Ray's dashboard, which takes jobs
CONFIG = "experiment.yaml"
CHECK_COMMAND = "doctor"
#: The stages that a command writes into its run, where it is not the one of its own name.
_WRITES = {
    "run": frozenset(("corpus", "pretrain", "finetune", "evaluate")),
    "predict": frozenset[str](),
    CHECK_COMMAND: frozenset[str](),
}
MOST_BYTES = 20 << 20  # of a package: code and a configuration are far below
_CONNECT_SECONDS = 4
_RETRY_SECONDS = 1.0
_AGENT_SECONDS = 60.0
_SILENCE_SECONDS = 300  # of a head that may come back
#: Without a line. The connection has no sign of life of its own: after a laptop has slept it may be
#: gone and never say so.
_HUSH_SECONDS = 60
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc")
_WANTED = "raybert.wanted"  # of a job's metadata
_ID = re.compile(r"raybert-(?P<run>.+)-(?P<command>[a-z]+)-(?P<number>\d+)")


@dataclass(frozen=True)
class ClusterJob:
    """A submitted command."""

    id: str
    run: str
    command: str
    status: str  # PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED
    begun: float | None = None  # Unix time, seconds
    ended: float | None = None
    message: str = ""

    @property
    def is_alive(self) -> bool:
        """Whether it waits or runs."""
        return self.status in ("PENDING", "RUNNING")


@dataclass(frozen=True)
class Submission:
    """A job to follow: submitted just now, or at work already."""

    job: ClusterJob
    package: int | None  # bytes that were sent; None: it was at work already
    #: Settings of the job at work that are not those asked for: key -> (its own, the one asked for)
    ignored: dict[str, tuple[Any, Any]]


class Cluster:
    """The jobs of a Ray cluster, through its dashboard's address."""

    def __init__(self, address: str | None) -> None:
        """Connect.

        Args:
            address: `http://head:8265`; None: RAY_API_SERVER_ADDRESS, or a Ray on this machine.

        Raises:
            UserError: nobody answers there, or the token is missing or wrong.
        """
        from ray.job_submission import JobSubmissionClient

        given = address or os.environ.get("RAY_API_SERVER_ADDRESS") or f"http://127.0.0.1:{PORT}"
        self.address = _checked(given)
        for name in JOB_CLIENT_LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)
        token.use_token()
        token.close_token()
        # Ray's client prefers the variable to its argument.
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address
        with self._told():
            self._client = JobSubmissionClient(self.address)

    def submit(
        self,
        command: str,
        run: str,
        settings: Settings,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> Submission:
        """Submit a command of a run, or find the job that is at it already.

        Args:
            command: of the command line: `pretrain`.
            run: the run's name.
            settings: the resolved configuration; it travels as it is.
            arguments: more of the command line.
            environment: variables of the job; they are shown to whoever may look at jobs.

        Raises:
            UserError: another command's job writes the same stages, the package is too large, or
                the cluster refuses.
        """
        found = self.at_work(command, run, settings, arguments)
        if found is not None:
            return found
        mine = [job for job in self.jobs() if (job.command, job.run) == (command, run)]
        number = 1 + max((_number(job.id) for job in mine), default=0)
        identity = f"raybert-{run}-{command}-{number}"
        with tempfile.TemporaryDirectory(prefix="raybert-job-") as folder:
            size = package(Path(folder), settings)
            words = ["python", "-u", "-m", "raybert", command, "-c", CONFIG, *arguments, "--json"]
            with self._told():
                self._send(
                    entrypoint=shlex.join(words),
                    submission_id=identity,
                    runtime_env={"working_dir": folder, "env_vars": dict(environment)},
                    metadata={
                        "raybert.run": run,
                        "raybert.command": command,
                        _WANTED: json.dumps(_wanted(settings, arguments)),
                    },
                )
        return Submission(self.job(identity), size, {})

    def at_work(
        self, command: str, run: str, settings: Settings, arguments: Sequence[str] = ()
    ) -> Submission | None:
        """The job that is at a command of a run already; None: there is none to follow.

        A command that writes nothing into its run may be at work twice, with other settings.

        Raises:
            UserError: a job of another command writes what this one would.
        """
        stages = _writes(command)
        alive = [job for job in self.jobs() if job.is_alive and job.run == run]
        for job in alive:
            if job.command != command and stages & _writes(job.command):
                both = " and ".join(sorted(stages & _writes(job.command)))
                raise UserError(
                    f"{job.id} is at work on {both} of {run}; wait for it, or end it with "
                    f"`raybert stop {job.id} --address {self.address}`, and submit {command} again"
                )
        for job in alive:
            if job.command == command:
                ignored = self._ignored(job, settings, arguments)
                if stages or not ignored:
                    return Submission(job, None, ignored)
        return None

    def _ignored(
        self, job: ClusterJob, settings: Settings, arguments: Sequence[str]
    ) -> dict[str, tuple[Any, Any]]:
        with self._told():
            metadata = self._client.get_job_info(job.id).metadata or {}
        theirs = json.loads(metadata.get(_WANTED, "null"))
        if theirs is None:  # of a version that did not write it down
            return {}
        standard = dict(flatten(type(settings)().model_dump(mode="json")))
        mine = json.loads(json.dumps(_wanted(settings, arguments)))
        return {
            key: (theirs.get(key, standard.get(key)), mine.get(key, standard.get(key)))
            for key in differences(theirs, mine)
        }

    def _send(self, **job: Any) -> None:
        """Submit; a head that has just started has no agent yet that takes jobs."""
        until = time.monotonic() + _AGENT_SECONDS
        while True:
            try:
                self._client.submit_job(**job)
            except RuntimeError as error:
                if "already exists" in str(error):  # somebody was faster: that one is followed
                    return
                if "No available agent" not in str(error) or time.monotonic() > until:
                    raise
                time.sleep(_RETRY_SECONDS)
            else:
                return

    def jobs(self) -> list[ClusterJob]:
        """The jobs that raybert submitted, the youngest last."""
        with self._told():
            found = self._client.list_jobs()
        ours = [_job(details) for details in found if _ID.fullmatch(details.submission_id or "")]
        return sorted(ours, key=lambda job: (job.begun or 0.0, job.id))

    def job(self, identity: str) -> ClusterJob:
        """One job, by its id."""
        with self._told():
            return _job(self._client.get_job_info(identity))

    def latest(self, run: str) -> ClusterJob:
        """The job of a run that is alive, or the last one.

        Raises:
            UserError: the cluster knows no job of that run.
        """
        ours = self.jobs()
        # A check of a run's cluster is no part of the run.
        mine = [j for j in ours if run == j.id or (run == j.run and j.command != CHECK_COMMAND)]
        if not mine:
            known = ", ".join(sorted({job.run for job in ours})) or "none"
            raise UserError(f"no job of a run named {run} at {self.address}; runs: {known}")
        return next((job for job in mine if job.is_alive), mine[-1])

    def resources(self) -> dict[str, float]:
        """What the nodes have in all, in Ray's words: CPU, GPU; empty where they can't be asked."""
        from ray.util.state import list_nodes

        total: Counter[str] = Counter()
        try:
            alive = [("state", "=", "ALIVE")]
            nodes = list_nodes(self.address, filters=alive, timeout=_CONNECT_SECONDS)
        except Exception:  # whatever it is: what is submitted does not need it
            return {}
        for node in nodes:
            total.update(node.resources_total)
        return {name: float(amount) for name, amount in total.items()}

    def logs(self, job: ClusterJob) -> str:
        """All that a job has printed."""
        with self._told():
            return str(self._client.get_job_logs(job.id))

    def follow(self, job: ClusterJob) -> Iterator[str]:
        """Yield the lines that a job prints, from its first one, until it ends.

        A connection that breaks or falls silent is made again, and the lines that have been yielded
        are passed over: a head that is replaced, or a laptop that sleeps, is no reason to lose
        sight of a job.

        Raises:
            StorageError: the cluster has not answered for minutes.
            RaybertError: its head was replaced, and the job is lost.
        """
        shown, heard = 0, time.monotonic()
        while True:
            try:
                number, rest, is_whole = 0, "", False
                for chunk in self._chunks(job):
                    heard = time.monotonic()
                    is_whole = chunk is None
                    *lines, rest = (rest + (chunk or "")).split("\n")
                    for line in lines:
                        number += 1
                        if number > shown:
                            shown = number
                            yield line
                has_ended = not self.job(job.id).is_alive
                heard = time.monotonic()
                if has_ended and is_whole:
                    if rest and number == shown:  # a last line without its end
                        yield rest
                    return
            except (RaybertError, aiohttp.ClientError) as error:
                if self._is_forgotten(job):
                    raise RaybertError(
                        f"{self.address} knows nothing of {job.id} any more: its head was "
                        "replaced; submit it again, and the run goes on from its last checkpoint"
                    ) from None
                if time.monotonic() - heard > _SILENCE_SECONDS:
                    raise StorageError(
                        f"{self.address} does not answer any more: {error}"
                    ) from None
            time.sleep(_RETRY_SECONDS)

    def _is_forgotten(self, job: ClusterJob) -> bool:
        """Whether the head that answers is another than the one that took the job."""
        with suppress(RaybertError, aiohttp.ClientError):
            return all(known.id != job.id for known in self.jobs())
        return False

    def exit_code(self, job: ClusterJob) -> int:
        """The exit code of a job that has ended; 1 where its command did not get to give one."""
        with self._told():
            details = self._client.get_job_info(job.id)
        code = details.driver_exit_code
        if str(details.status) == "SUCCEEDED":
            return 0
        return int(code) if code is not None and code > 0 else 1

    def stop(self, job: ClusterJob) -> bool:
        """Ask a job to end: it writes a checkpoint first. Returns whether it was alive."""
        with self._told():
            return bool(self._client.stop_job(job.id))

    def _chunks(self, job: ClusterJob) -> Iterator[str | None]:
        """What a job prints, in pieces; None after the last one, or nothing once all is silent."""
        stream = self._client.tail_job_logs(job.id)

        async def following() -> str | None:
            async with asyncio.timeout(_HUSH_SECONDS):  # `wait_for` may swallow a Ctrl-C (3.11)
                return await anext(stream, None)

        with asyncio.Runner() as runner, self._told():
            try:
                while (chunk := runner.run(following())) is not None:
                    yield chunk
                yield None
            except TimeoutError:
                return
            finally:  # also where nobody listens any more
                runner.run(_close(stream))

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Say what Ray's client raises in one line each."""
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError:
            raise UserError(token.format_refusal(self.address)) from None
        except (ConnectionError, OSError) as error:
            raise StorageError(f"{self.address} does not answer: {one_line(error)}") from None
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise RaybertError(f"{self.address}: {reason}") from None


async def _close(stream: Any) -> None:
    await stream.aclose()


def package(folder: Path, settings: Settings) -> int:
    """Put the package and a configuration into an empty folder; return its bytes.

    Raises:
        UserError: it is larger than code has any reason to be; names the largest file.
    """
    source = Path(__file__).resolve().parents[1]
    shutil.copytree(source, folder / "raybert", ignore=_LEFT_OUT)
    (folder / CONFIG).write_text(dump(settings), encoding="utf-8")
    sizes = {file: file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    total = sum(sizes.values())
    if total > MOST_BYTES:
        largest = max(sizes, key=lambda file: sizes[file])
        raise UserError(
            f"the package has {total / 1e6:.0f} MB, more than {MOST_BYTES >> 20} MB: "
            f"{source / largest.relative_to(folder / 'raybert')} has "
            f"{sizes[largest] / 1e6:.0f} MB; put data where every node reads it, not into the code"
        )
    return total


def result_of(lines: list[str]) -> dict[str, Any] | None:
    """The result that a command printed last, if it did."""
    for line in reversed(lines):
        if line.startswith("{"):
            try:
                value = json.loads(line)
            except ValueError:
                return None
            return value if isinstance(value, dict) else None
    return None


def _job(details: Any) -> ClusterJob:
    match = _ID.fullmatch(details.submission_id or "")
    metadata = details.metadata or {}
    return ClusterJob(
        id=details.submission_id,
        run=metadata.get("raybert.run") or (match["run"] if match else ""),
        command=metadata.get("raybert.command") or (match["command"] if match else ""),
        status=str(details.status),
        begun=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
        message=details.message or "",
    )


def _writes(command: str) -> frozenset[str]:
    return _WRITES.get(command, frozenset((command,)))


def _wanted(settings: Settings, arguments: Sequence[str]) -> dict[str, Any]:
    """What a job is asked to do beyond the defaults, by key: it tells two submissions apart."""
    chosen = settings.model_dump(mode="json")
    changed = differences(type(settings)().model_dump(mode="json"), chosen)
    wanted = {key: value for key, (_, value) in changed.items()}
    return wanted | ({"arguments": shlex.join(arguments)} if arguments else {})


def _number(identity: str) -> int:
    match = _ID.fullmatch(identity)
    return int(match["number"]) if match else 0


def _checked(address: str) -> str:
    """The address as Ray's client takes it, after somebody has answered there.

    Raises:
        UserError: it is no address, or nobody answers; Ray's client would wait for minutes.
    """
    try:
        url = urlsplit(address if "://" in address else f"http://{address}")
        host, port = url.hostname, url.port
    except ValueError:  # brackets that don't close, a port that is no number
        host = None
    if not host or url.scheme not in ("http", "https"):
        raise UserError(
            f"--address {address}: expected http://HEAD:{PORT}, the dashboard's address"
        )
    path = url.path.rstrip("/")
    if port is None:  # a dashboard has neither TLS nor a path: those are a proxy's before it
        port = 443 if url.scheme == "https" else 80 if path else PORT
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_SECONDS):
            pass
    except OSError as error:
        raise UserError(
            f"--address {address}: nobody answers ({one_line(error)}); start Ray's head with its "
            f"dashboard, or name another address: http://HEAD:{PORT}"
        ) from None
    return f"{url.scheme}://{f'[{host}]' if ':' in host else host}:{port}{path}"
