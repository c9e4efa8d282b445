from raybert.cluster.machine import keep_freed_memory


def test_freed_memory_is_kept_on_glibc_only(monkeypatch):
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False
