"""Addresses of storage: local paths and the URIs that pyarrow's filesystems read.

A URI never holds credentials: they come from where the store's own tools look for them, and stay
out of everything that is written here.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs

from raybert.errors import UserError, one_line

# Time limits of S3. A request without any answer ends after 47 s at most, one that is refused (503,
# no connection) after 7 s; other ranks may wait for two of them in a row.
_CONNECT_SECONDS = 5
_SILENT_SECONDS = 10  # without a byte in either direction
_TRIES = 4

_SECRET_PARAMETER = re.compile(r"[?&][^=&]*(key|secret|password|token)[^=&]*=", re.IGNORECASE)


def check_address(address: str) -> None:
    """Raise UserError if a URI holds credentials: files, logs and messages would show them."""
    scheme, mark, rest = address.partition("://")
    host = re.split("[/?]", rest, maxsplit=1)[0]
    # An S3 bucket's name has neither sign, and a secret may have a slash, which ends a host.
    holds = ("@" in host or ":" in host) if scheme == "s3" else ":" in host.rpartition("@")[0]
    if mark and (holds or _SECRET_PARAMETER.search(rest)):
        raise UserError(
            f"{scheme}://... holds a key or a password, which would be written wherever this "
            "address is; leave it out, and give it to every node by AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, by ~/.aws/credentials, or as its store's own tools take it"
        )


def split_query(address: str) -> tuple[str, str]:
    """Split a URI into its base and its query, which carries an object store's endpoint."""
    base, _, query = address.partition("?") if "://" in address else (address, "", "")
    return base, query


def open_filesystem(address: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of an address, and the path on it.

    Raises:
        UserError: the URI's scheme or bucket can't be opened, or it holds credentials.
    """
    check_address(address)
    try:
        if address.startswith("s3://"):
            base, query = split_query(address)
            bucket, _, inside = base.removeprefix("s3://").partition("/")
            return _s3(bucket, query), unquote(f"{bucket}/{inside}").rstrip("/")
        if "://" in address:
            filesystem, path = pafs.FileSystem.from_uri(address)
            return filesystem, path
        return pafs.LocalFileSystem(), str(Path(address).expanduser().resolve())
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{address}: can't be opened: {one_line(error)}") from None


@lru_cache(maxsize=64)
def _s3(bucket: str, query: str) -> pafs.FileSystem:
    """The filesystem of a bucket: one client for all folders in it, with time limits."""
    opened, _ = pafs.FileSystem.from_uri(f"s3://{bucket}" + (f"?{query}" if query else ""))
    if not bucket:
        raise pa.ArrowInvalid("it names no bucket")
    # A URI can't set the limits: a new client gets the options that the URI's one pickles as.
    _, (options,) = opened.__reduce__()
    options["connect_timeout"], options["request_timeout"] = _CONNECT_SECONDS, _SILENT_SECONDS
    options["retry_strategy"] = pafs.AwsStandardS3RetryStrategy(max_attempts=_TRIES)
    return pafs.S3FileSystem(**options)
