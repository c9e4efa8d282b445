"""Keys from a file or the environment, compared in constant time."""

import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raybert.errors import UserError
from raybert.serve.http import authentication
from raybert.serve.http.authentication import VARIABLE, Keys, digest, read_keys

KEYS = ["k" * 32, "another-key-of-mine-0123456789"]


def bearer(key):
    return b"Bearer " + key.encode()


def test_keys_of_a_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# of the team\n{KEYS[0]}\n\n  {KEYS[1]}  \n")
    keys = Keys(read_keys(str(path)))
    assert [keys.allow(bearer(key)) for key in KEYS] == [True, True]
    assert not keys.allow(bearer(KEYS[0][:-1]))
    assert not keys.allow(bearer("# of the team"))


def test_keys_of_the_environment(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert read_keys(None) == []
    monkeypatch.setenv(VARIABLE, f"{KEYS[0]}, {KEYS[1]}\n")
    assert read_keys(None) == [digest(key.encode()) for key in KEYS]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "there is no key in it"),
        ("# nothing\n", "there is no key in it"),
        ("short\n", "key 1 is not 16 or more printable ASCII"),
        (f"{KEYS[0]}\nwith a space in between\n", "key 2 is not"),
        (f"{KEYS[0]}\nü{'k' * 20}\n", "key 2 is not"),
    ],
)
def test_an_invalid_file_is_rejected_without_showing_its_keys(tmp_path, content, words):
    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(UserError, match=words) as error:
        read_keys(str(path))
    assert KEYS[0] not in str(error.value)
    assert "short" not in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"^serve.keys=.*/none: No such file"):
        read_keys(str(tmp_path / "none"))


@pytest.mark.parametrize("given", [KEYS[0], f"{KEYS[0]}\n{KEYS[1]}", f"./a\n{KEYS[0]}"])
def test_keys_in_the_place_of_their_file_are_not_shown(given):
    with pytest.raises(
        UserError, match="^serve.keys: .*name a file with one key per line"
    ) as error:
        read_keys(given)
    assert KEYS[0] not in str(error.value)


def test_the_mode_of_a_file_of_keys_is_checked(tmp_path, caplog):
    path = tmp_path / "keys"
    path.write_text(KEYS[0])
    for mode, line in ((0o600, ""), (0o640, ""), (0o644, "other users of this machine can read")):
        path.chmod(mode)
        caplog.clear()
        assert len(read_keys(str(path))) == 1
        assert line in caplog.text and bool(line) == bool(caplog.text)
    path.chmod(0o666)
    with pytest.raises(UserError, match="other users can write to it, and add keys"):
        read_keys(str(path))


@given(st.binary(max_size=80))
def test_only_the_keys_are_accepted(value):
    keys = Keys([digest(key.encode()) for key in KEYS])
    scheme, _, given = value.partition(b" ")
    known = [key.encode() for key in KEYS]
    assert keys.allow(value) == (scheme.lower() == b"bearer" and given.strip() in known)
    assert not keys.allow(None)
    assert Keys([]).allow(value)


def test_all_keys_are_compared_in_constant_time(monkeypatch):
    """hmac compares digests of one length, and the loop continues after a match."""
    compared = []

    def note(one, other):
        compared.append((len(one), len(other)))
        return compare(one, other)

    compare = hmac.compare_digest
    monkeypatch.setattr(authentication.hmac, "compare_digest", note)
    keys = Keys([digest(key.encode()) for key in KEYS])
    for key, allowed in ((KEYS[0], True), (KEYS[1], True), ("x" * 500, False)):
        compared.clear()
        assert keys.allow(bearer(key)) is allowed
        assert compared == [(64, 64)] * 2
