"""A client of Ray Jobs: submits a command of raybert to a cluster, finds its job, follows its log.

A job carries the package and one resolved configuration. The run's name makes submission
idempotent: while a job of the same run and command is alive, submitting again follows it, and
another command that would write the same stages is refused. A job that failed is resumed by the
next one, as on one machine.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import shlex
import socket
import tempfile
import time
import urllib.error
import urllib.request
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
from raybert.cluster.scratch import scratch_folder
from raybert.config import Settings, differences, flatten
from raybert.errors import RaybertError, StorageError, UserError, one_line
from raybert.jobs.log_stream import read_stream
from raybert.jobs.package import CONFIG, ENTRYPOINT, write_package
from raybert.storage.folder import check_texts

PORT = 8265  # Ray's dashboard, which accepts jobs
CHECK_COMMAND = "doctor"
#: The stages that a command writes into its run; default: the stage of its own name.
_WRITTEN_STAGES = {
    "run": frozenset(("corpus", "pretrain", "finetune", "evaluate")),
    "predict": frozenset[str](),
    CHECK_COMMAND: frozenset[str](),
}
_CONNECT_SECONDS = 4
_ANSWER_SECONDS = 10  # for the dashboard's version
_RETRY_SECONDS = 1.0
_AGENT_SECONDS = 60.0
_HEAD_TIMEOUT_S = 300  # a head may be replaced in this time
_STREAM_TIMEOUT_S = 60  # without a line, after which the connection is opened again
_REQUESTED = "raybert.wanted"  # key of a job's metadata: the requested settings
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
        """Whether the job is pending or running."""
        return self.status in ("PENDING", "RUNNING")


@dataclass(frozen=True)
class Submission:
    """A job to follow: a new one, or the active one of the same run and command."""

    job: ClusterJob
    package: int | None  # bytes that were sent; None: the job was already active
    #: Settings of the active job that differ from the requested ones: key -> (active, requested).
    ignored: dict[str, tuple[Any, Any]]


class Cluster:
    """The jobs of a Ray cluster, through the address of its dashboard."""

    def __init__(self, address: str | None) -> None:
        """Connect to `http://head:8265`; None: RAY_API_SERVER_ADDRESS, or a Ray on this machine.

        UserError: the address does not answer, or the token is missing or wrong.
        """
        from ray.job_submission import JobSubmissionClient

        address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or f"http://127.0.0.1:{PORT}"
        self.address = _check_address(address)
        _check_answers(self.address)
        for name in JOB_CLIENT_LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)
        token.use_token()
        token.close_token()
        # Ray's client prefers this variable to its argument.
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address
        with self._client_errors():
            self._client = JobSubmissionClient(self.address)

    def submit(
        self,
        command: str,
        run: str,
        settings: Settings,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> Submission:
        """Submit a command of a run, or return the active job of the same run and command.

        `environment` has variables of the job, visible to everybody who can list jobs. UserError:
        an active job of another command writes the same stages, the package is too large, or an
        address holds credentials: a job's command and settings can be read by all who can list it.
        """
        check_texts([*arguments, *texts_of(settings.model_dump(mode="json"))])
        active = self.active_job(command, run, settings, arguments)
        if active is not None:
            return active
        mine = [job for job in self.jobs() if (job.command, job.run) == (command, run)]
        numbers = [int(match["number"]) for job in mine if (match := _ID.fullmatch(job.id))]
        identity = f"raybert-{run}-{command}-{1 + max(numbers, default=0)}"
        with scratch_folder("rbj-", Path(tempfile.gettempdir())) as folder:
            package = folder / "package"
            size = write_package(package, settings)
            words = ["sh", ENTRYPOINT, command, "-c", CONFIG, *arguments, "--json"]
            with self._client_errors():
                self._send(
                    entrypoint=shlex.join(words),
                    submission_id=identity,
                    runtime_env={"working_dir": str(package), "env_vars": dict(environment)},
                    metadata={
                        "raybert.run": run,
                        "raybert.command": command,
                        _REQUESTED: json.dumps(_requested(settings, arguments)),
                    },
                )
        return Submission(self.job(identity), size, {})

    def active_job(
        self, command: str, run: str, settings: Settings, arguments: Sequence[str] = ()
    ) -> Submission | None:
        """Return the active job of a command and run; None where there is none to follow.

        A command that writes nothing into its run may be active twice, with different settings.
        UserError: an active job of another command writes the same stages.
        """
        stages = _written_stages(command)
        alive = [job for job in self.jobs() if job.is_alive and job.run == run]
        for job in alive:
            shared = stages & _written_stages(job.command)
            if job.command != command and shared:
                written = " and ".join(sorted(shared))
                raise UserError(
                    f"{job.id} is writing {written} of {run}; wait for it, or stop it with "
                    f"`raybert stop {job.id} --address {self.address}`, and submit {command} again"
                )
        for job in alive:
            if job.command == command:
                ignored = self._differing_settings(job, settings, arguments)
                if stages or not ignored:
                    return Submission(job, None, ignored)
        return None

    def _differing_settings(
        self, job: ClusterJob, settings: Settings, arguments: Sequence[str]
    ) -> dict[str, tuple[Any, Any]]:
        with self._client_errors():
            metadata = self._client.get_job_info(job.id).metadata or {}
        theirs = json.loads(metadata.get(_REQUESTED, "null"))
        if theirs is None:  # an earlier version did not store it
            return {}
        defaults = dict(flatten(type(settings)().model_dump(mode="json")))
        mine = json.loads(json.dumps(_requested(settings, arguments)))
        return {
            key: (theirs.get(key, defaults.get(key)), mine.get(key, defaults.get(key)))
            for key in differences(theirs, mine)
        }

    def _send(self, **job: Any) -> None:
        """Submit; retries while a head that has just started has no agent for jobs."""
        until = time.monotonic() + _AGENT_SECONDS
        while True:
            try:
                self._client.submit_job(**job)
                return
            except RuntimeError as error:
                if "already exists" in str(error):  # a concurrent submission won: follow it
                    return
                if "No available agent" not in str(error) or time.monotonic() > until:
                    raise
            time.sleep(_RETRY_SECONDS)

    def jobs(self) -> list[ClusterJob]:
        """List the jobs that raybert submitted, the newest last."""
        with self._client_errors():
            found = self._client.list_jobs()
        ours = [_job(details) for details in found if _ID.fullmatch(details.submission_id or "")]
        return sorted(ours, key=lambda job: (job.begun or 0.0, job.id))

    def job(self, identity: str) -> ClusterJob:
        """Return a job by its id."""
        with self._client_errors():
            return _job(self._client.get_job_info(identity))

    def latest(self, run: str) -> ClusterJob:
        """Return the active job of a run, or its last one; UserError: there is none."""
        ours = self.jobs()
        # Jobs that check the cluster are not part of the run.
        mine = [j for j in ours if run == j.id or (run == j.run and j.command != CHECK_COMMAND)]
        if not mine:
            known = ", ".join(sorted({job.run for job in ours})) or "none"
            raise UserError(f"no job of a run named {run} at {self.address}; runs: {known}")
        return next((job for job in mine if job.is_alive), mine[-1])

    def resources(self) -> dict[str, float]:
        """Return the total resources of the nodes by Ray's names; empty where they are unknown."""
        from ray.util.state import list_nodes

        total: Counter[str] = Counter()
        try:
            alive = [("state", "=", "ALIVE")]
            nodes = list_nodes(self.address, filters=alive, timeout=_CONNECT_SECONDS)
        except Exception:  # only the estimate needs it, so any failure may be ignored
            return {}
        for node in nodes:
            total.update(node.resources_total)
        return {name: float(amount) for name, amount in total.items()}

    def logs(self, job: ClusterJob) -> str:
        """Return the output of a job."""
        with self._client_errors():
            return str(self._client.get_job_logs(job.id))

    def follow(self, job: ClusterJob) -> Iterator[str]:
        """Yield the lines of a job's output, from the first one, until the job ends.

        A connection that breaks or is unresponsive is opened again, and lines that were yielded
        before are skipped: following survives a replaced head and a laptop that slept.

        Raises:
            StorageError: the cluster has not answered for minutes.
            RaybertError: the head was replaced, and the job is lost.
        """
        shown, last_response = 0, time.monotonic()
        while True:
            try:
                number, rest, is_complete = 0, "", False
                for chunk in self._chunks(job):
                    last_response = time.monotonic()
                    is_complete = chunk is None
                    *lines, rest = (rest + (chunk or "")).split("\n")
                    for line in lines:
                        number += 1
                        if number > shown:
                            shown = number
                            yield line
                has_ended = not self.job(job.id).is_alive
                last_response = time.monotonic()
                if has_ended and is_complete:
                    if rest and number == shown:  # a last line without a line break
                        yield rest
                    return
            except (RaybertError, aiohttp.ClientError) as error:
                if self._is_forgotten(job):
                    raise RaybertError(
                        f"{self.address} does not know {job.id} any more: its head was replaced; "
                        "submit it again, and the run resumes from its last checkpoint"
                    ) from None
                if time.monotonic() - last_response > _HEAD_TIMEOUT_S:
                    raise StorageError(f"{self.address} has stopped answering: {error}") from None
            time.sleep(_RETRY_SECONDS)

    def _is_forgotten(self, job: ClusterJob) -> bool:
        """Whether the head that answers now does not know the job."""
        with suppress(RaybertError, aiohttp.ClientError):
            return all(known.id != job.id for known in self.jobs())
        return False

    def exit_code(self, job: ClusterJob) -> int:
        """Return the exit code of a job that has ended; 1 where its command returned none."""
        with self._client_errors():
            details = self._client.get_job_info(job.id)
        code = details.driver_exit_code
        if str(details.status) == "SUCCEEDED":
            return 0
        return int(code) if code is not None and code > 0 else 1

    def stop(self, job: ClusterJob) -> bool:
        """Stop a job after a checkpoint; return whether it was active."""
        with self._client_errors():
            return bool(self._client.stop_job(job.id))

    def _chunks(self, job: ClusterJob) -> Iterator[str | None]:
        """Yield the log in chunks, and None after the last one unless the stream times out."""
        with self._client_errors():
            yield from read_stream(lambda: self._client.tail_job_logs(job.id), _STREAM_TIMEOUT_S)

    @contextmanager
    def _client_errors(self) -> Iterator[None]:
        """Convert errors of Ray's client into errors of one line."""
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


def result_of(lines: list[str]) -> dict[str, Any] | None:
    """Return the JSON result that a command printed last; None where there is none."""
    last = next((line for line in reversed(lines) if line.startswith("{")), "null")
    with suppress(ValueError):
        value: dict[str, Any] | None = json.loads(last)
        return value
    return None


def texts_of(value: Any) -> Iterator[str]:
    """Yield the texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from texts_of(inner)


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


def _written_stages(command: str) -> frozenset[str]:
    return _WRITTEN_STAGES.get(command, frozenset((command,)))


def _requested(settings: Settings, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the settings that differ from the defaults, by key, to compare submissions."""
    chosen = settings.model_dump(mode="json")
    changed = differences(type(settings)().model_dump(mode="json"), chosen)
    values = {key: value for key, (_, value) in changed.items()}
    return values | ({"arguments": shlex.join(arguments)} if arguments else {})


def _check_address(address: str) -> str:
    """Return the address in the form of Ray's client, after a connection has succeeded.

    UserError: it is malformed or does not answer, for which Ray's client would wait minutes.
    """
    try:
        url = urlsplit(address if "://" in address else f"http://{address}")
        host, port = url.hostname, url.port
    except ValueError:  # unbalanced brackets, or a port that is not a number
        host = None
    if not host or url.scheme not in ("http", "https"):
        raise UserError(
            f"--address {address}: expected http://HEAD:{PORT}, the dashboard's address"
        )
    path = url.path.rstrip("/")
    if port is None:  # TLS and a path belong to a proxy in front of the dashboard
        port = 443 if url.scheme == "https" else 80 if path else PORT
    try:
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"--address {address}: nobody answers ({one_line(error)}); start Ray's head with its "
            f"dashboard, or name another address: http://HEAD:{PORT}"
        ) from None
    return f"{url.scheme}://{f'[{host}]' if ':' in host else host}:{port}{path}"


def _check_answers(address: str) -> None:
    """Raise UserError unless HTTP is answered there, for which Ray's client would wait minutes."""
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=_ANSWER_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # without a token
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)  # of a URLError
        raise UserError(
            f"--address {address}: something listens there, but it does not answer as Ray's "
            f"dashboard does ({one_line(reason)}); name its address: http://HEAD:{PORT}"
        ) from None
