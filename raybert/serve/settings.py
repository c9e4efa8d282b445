"""How models are served: the `serve` section, which is also what `serve deploy` passes as args."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from raybert.config import NumberOrRange, Range, Settings, build


class Autoscaling(Range):
    """A number of replicas that follows the load."""

    min: int = Field(1, ge=1, description="kept ready at all times")
    max: int = Field(ge=1, description="no more, however many requests come")
    target: float = Field(32, gt=0, description="requests under way in each, which it aims at")


Replicas = NumberOrRange[Autoscaling]


class Canary(Settings):
    """A new model that answers some of the requests, beside the one that it may replace."""

    model: str = Field(description="as `model`")
    share: float = Field(0.05, gt=0, lt=1, description="of the requests to the first model")


class ServeConfig(Settings):
    """Where, what and how much is served."""

    model: str | None = Field(
        None,
        description="a model/ folder, a run, an experiment, or a name in the registry; null: this "
        "experiment's classifier",
    )
    fill_mask: str | None = Field(
        None, description="the same, for filling masks; null: the experiment's pretrained model"
    )
    models: dict[str, str] = Field({}, description="more classifiers: a name, and as `model`")
    canary: Canary | None = Field(None, description="a new model on trial; null: none")
    registry: str | None = Field(
        None,
        description="the storage whose registry has the names; null: run.storage, but in the args "
        "of `serve deploy`, where no run stands behind them: none",
    )
    poll_s: float = Field(10, gt=0, description="seconds between looks at the registry")

    host: str = Field("127.0.0.1", description="any but this machine's own asks for a key")
    port: int = Field(8000, ge=1, le=65535, description="of the host")
    keys: str | None = Field(
        None, description="a file with a bearer key a line; null: RAYBERT_API_KEYS, if it is set"
    )
    cors: list[str] = Field([], description="origins whose pages may ask; none by default")
    tls_cert: str | None = Field(None, description="certificate chain, PEM; with tls_key: HTTPS")
    tls_key: str | None = Field(None, description="its private key, PEM")
    ingress: Literal["auto", "haproxy", "proxy"] = Field(
        "auto",
        description="who takes connections: HAProxy where it is installed, or Ray Serve's own "
        "proxy, which costs some milliseconds more and speaks TLS",
    )

    replicas: Replicas = Field(1, description="processes that answer, or {min, max, target}")
    cpus: float = Field(1, gt=0, description="logical CPUs that each takes of the cluster")
    threads: int | None = Field(
        None, ge=1, description="of each replica; null: its share of the machine's cores"
    )
    gpus: float | None = Field(
        None, ge=0, le=1, description="of a GPU for each; null: 1 where the cluster has one, or 0"
    )
    surge_percent: int = Field(
        25,
        ge=0,
        le=100,
        description="of the replicas, one at least, that an update starts before old ones end, for "
        "which the cluster must have room; 0: old ones end first",
    )
    precision: Literal["auto", "fp32", "bf16", "int8", "compiled"] = Field(
        "auto",
        description="auto: the choice stored with the model, or the fastest as measured at "
        "start-up; `raybert bench serve` says what each costs; `raybert predict` takes it, too",
    )

    tokens_per_batch: int | None = Field(
        None, ge=1, description="in a batch at most; null: 2,048 on CPUs, 32,768 on GPUs"
    )
    wait_ms: float = Field(
        0, ge=0, description="that a batch which is not full waits for company while nothing runs"
    )
    queue_s: float = Field(
        3, gt=0, description="of work in the queue at most; what comes then is refused with 429"
    )
    timeout_s: float = Field(10, gt=0, description="after which a request is given up with 504")
    drain_s: float = Field(
        30, ge=0, description="that a replica which is to end may take over what it has begun"
    )
    max_body_kb: int = Field(1024, ge=1, description="of a request; more is refused with 413")
    max_texts: int = Field(128, ge=1, description="in a request; more are refused with 413")
    max_tokens: int = Field(
        131_072, ge=1, description="in a request, after cutting; more are refused with 413"
    )
    long_texts: Literal["cut", "windows"] = Field(
        "cut",
        description="past the model's length: cut reads head and tail, as in training; windows "
        "reads all of it, and averages",
    )
    explain: bool = Field(True, description="whether weights of words may be asked for")

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
        """The same with other values, and with what stands for null.

        Args:
            given: new values, by key.
            model: what is served where nothing is named.
            registry: where names are looked up, where no registry is named.

        Raises:
            ConfigError: a value that does not fit.
        """
        values = {**self.model_dump(), **given}
        if values["model"] is None and values["fill_mask"] is None:
            values["model"] = model
        if values["registry"] is None:
            values["registry"] = registry
        return build(_Section, {"serve": values}, "").serve

    @property
    def most_replicas(self) -> int:
        """The most replicas that answer."""
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
