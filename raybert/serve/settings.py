"""The `serve` section of the configuration; `serve deploy` passes the same keys as `args`."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from raybert.config import NumberOrRange, Range, Settings, build
from raybert.serve.http.hosts import host_name


class Autoscaling(Range):
    """A number of replicas that follows the load."""

    min: int = Field(1, ge=1, description="minimum number, kept ready")
    max: int = Field(ge=1, description="maximum number")
    target: float = Field(
        32,
        gt=0,
        description="running requests per replica to aim at, and fewer where their texts are work "
        "for more than 0.7 of the time",
    )


Replicas = NumberOrRange[Autoscaling]


class CanaryConfig(Settings):
    """A new model that answers a share of the requests in place of `model`."""

    model: str = Field(description="as `model`")
    share: float = Field(0.05, gt=0, lt=1, description="of the requests that name no model")


class ServeConfig(Settings):
    """Models, address, resources and limits of a server."""

    model: str | None = Field(
        None,
        description="a model/ folder, a run, an experiment, or a name in the registry; null: this "
        "experiment's classifier",
    )
    fill_mask: str | None = Field(
        None, description="the same, for filling masks; null: the experiment's pretrained model"
    )
    models: dict[str, str] = Field({}, description="more classifiers, by name; values as `model`")
    canary: CanaryConfig | None = Field(
        None, description="a new model for a share of the requests; null: none"
    )
    registry: str | None = Field(
        None,
        description="storage whose registry has the names; null: run.storage, or none in the args "
        "of `serve deploy`, which belong to no run",
    )
    poll_s: float = Field(10, gt=0, description="seconds between two reads of the registry")

    host: str = Field(
        "127.0.0.1", description="address to listen on; one that others can reach requires a key"
    )
    port: int = Field(8000, ge=1, le=65535, description="port to listen on")
    keys: str | None = Field(
        None, description="file with one bearer key per line; null: RAYBERT_API_KEYS, if it is set"
    )
    root_path: str = Field(
        "",
        pattern=r"^(/[\w.~-]+)*$",
        description="path under which a proxy in front publishes the server, such as /reviews, "
        "whether it removes it from the requests or not",
    )
    cors: list[str] = Field(
        [], description="origins whose pages may send requests; none by default"
    )
    allowed_hosts: list[str] | None = Field(
        None,
        description="names by which requests may address the server (Host), *.example.org and * "
        "among them; null: any where keys are required, else localhost and `host`: pages of other "
        "sites can't send requests through a name that they let point here",
    )
    tls_cert: str | None = Field(None, description="certificate chain, PEM; with tls_key: HTTPS")
    tls_key: str | None = Field(None, description="its private key, PEM")
    ingress: Literal["auto", "haproxy", "proxy"] = Field(
        "auto",
        description="haproxy, or Ray Serve's own proxy, which adds milliseconds and supports TLS; "
        "auto: HAProxy where it is installed and TLS is off",
    )

    replicas: Replicas = Field(1, description="number of processes, or {min, max, target}")
    cpus: float = Field(1, gt=0, description="logical CPUs of the cluster for each replica")
    threads: int | None = Field(
        None, ge=1, description="threads of each replica; null: its share of the machine's cores"
    )
    gpus: float | None = Field(
        None,
        ge=0,
        le=1,
        description="GPUs for each replica; null: 1 if the cluster has any, else 0",
    )
    surge_percent: int = Field(
        25,
        ge=0,
        le=100,
        description="percent of the replicas, at least one, that an update starts before old ones "
        "end, for which the cluster needs room; 0: old ones end first",
    )
    precision: Literal["auto", "fp32", "bf16", "int8", "compiled"] = Field(
        "auto",
        description="auto: the choice stored with the model, or the fastest as measured at "
        "start-up; `raybert bench serve` says what each costs; `raybert predict` takes it, too",
    )

    tokens_per_batch: int | None = Field(
        None, ge=1, description="maximum tokens of a batch; null: 2,048 on CPUs, 32,768 on GPUs"
    )
    wait_ms: float = Field(
        0,
        ge=0,
        description="milliseconds that a batch which is not full waits for more texts on an idle "
        "server",
    )
    queue_s: float = Field(
        3, gt=0, description="maximum seconds of work in the queue; further requests get 429"
    )
    timeout_s: float = Field(10, gt=0, description="seconds after which a request gets 504")
    drain_s: float = Field(
        30, ge=0, description="seconds that a stopping replica has to complete its requests"
    )
    max_body_kb: int = Field(
        1024, ge=1, description="maximum KiB of a request; larger ones get 413"
    )
    max_texts: int = Field(128, ge=1, description="maximum texts of a request; larger ones get 413")
    max_tokens: int = Field(
        131_072,
        ge=1,
        description="maximum tokens of a request, after truncation; larger ones get 413",
    )
    long_texts: Literal["cut", "windows"] = Field(
        "windows",
        description="texts past the model's length: windows reads all of it and averages the "
        "scores, as `evaluate` and `predict` do; cut keeps head and tail, as in training",
    )
    explain: bool = Field(True, description="whether requests may ask for the weights of words")

    @field_validator("allowed_hosts")
    @classmethod
    def _are_names(cls, hosts: list[str] | None) -> list[str] | None:
        for host in hosts or []:
            if not host_name(host) or re.search(r"[\s/@]", host):
                raise ValueError(f"{host!r} is no name; give one as api.example.org or ::1")
        return hosts

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            missing = "tls_key" if self.tls_key is None else "tls_cert"
            raise ValueError(f"{missing}=null: TLS needs both tls_cert and tls_key; set it")
        if self.tls_cert is not None and self.ingress == "haproxy":
            raise ValueError(
                "ingress=haproxy speaks no TLS in Ray 2.60; use ingress=proxy, or end TLS before it"
            )
        return self

    def changed(self, given: Mapping[str, object], *, model: str, registry: str) -> ServeConfig:
        """Return the same with other values, and with defaults for null, or raise ConfigError.

        `model` is the default where neither `model` nor `fill_mask` is set.
        """
        values = {**self.model_dump(), **given}
        if values["model"] is None and values["fill_mask"] is None:
            values["model"] = model
        if values["registry"] is None:
            values["registry"] = registry
        return build(_Section, {"serve": values}, "").serve

    def with_allowed_hosts(self, *, has_keys: bool) -> ServeConfig:
        """Return the same with the default of `allowed_hosts`, None where any is allowed."""
        hosts = self.allowed_hosts
        if hosts is None and not has_keys:
            own = f"[{self.host}]" if ":" in self.host else self.host
            hosts = [*dict.fromkeys(["localhost", "127.0.0.1", "[::1]", own])]
        return self.model_copy(update={"allowed_hosts": hosts})

    @property
    def max_replicas(self) -> int:
        """The maximum number of replicas."""
        return self.replicas if isinstance(self.replicas, int) else self.replicas.max


class _Section(Settings):
    """Lets errors name keys as the user knows them: `serve.port`."""

    serve: ServeConfig


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a host name
        return False
