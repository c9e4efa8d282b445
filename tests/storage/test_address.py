"""Addresses: what can be opened, and credentials, which are refused."""

import pytest

from raybert.errors import UserError
from raybert.storage.folder import Folder, check_address


@pytest.mark.parametrize("address", ["nope://bucket/x", "://x"])
def test_an_unknown_scheme_is_refused(address):
    with pytest.raises(UserError, match=f"^{address}: can't be opened: "):
        Folder(address)


@pytest.mark.parametrize(
    "address",
    [
        "s3://AKIA:hush@bucket/x",
        "s3://AKIA:hu/sh@bucket/x",  # secrets may have a slash, which should be %2F
        "s3://hush@bucket",
        "hdfs://me:hush@host:9000/x",
        "s3://bucket/x?region=x&secret_key=hush",
        "abfss://box@account/x?client_secret=hush",
    ],
)
def test_credentials_in_an_address_are_refused_and_not_repeated(address):
    for opens in (Folder, Folder.of_file, check_address):
        with pytest.raises(UserError, match="holds a key or a password.*AWS_ACCESS_KEY") as refused:
            opens(address)
        assert "hush" not in str(refused.value)
        assert "AKIA" not in str(refused.value)
        assert "sh@" not in str(refused.value)


@pytest.mark.parametrize(
    "address",
    ["s3://b/x?endpoint_override=localhost:1", "hdfs://me@host:9000/x", "/a:b@c?token=x", "a:b@c",
     "abfss://box@account/x"],
)  # fmt: skip
def test_addresses_without_credentials_are_accepted(address):
    check_address(address)
