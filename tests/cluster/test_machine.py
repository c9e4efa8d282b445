"""The processor's name and instruction sets, as read from `/proc/cpuinfo`."""

import builtins
import io
import platform

import pytest

from raybert.cluster import machine

INTEL = """processor\t: 0
model name\t: Some CPU @ 2.00GHz
flags\t\t: fpu avx512_bf16 avx512_vnni

processor\t: 1
model name\t: Another CPU
flags\t\t: fpu
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd\n\nprocessor\t: 1\n"


@pytest.fixture
def cpuinfo(monkeypatch):
    """Replace the content of `/proc/cpuinfo`; None: there is no such file."""

    def replace(text):
        def opened(path, *args, **kwargs):
            assert path == "/proc/cpuinfo"
            if text is None:
                raise FileNotFoundError(path)
            return io.StringIO(text)

        machine._cpu_info.cache_clear()
        monkeypatch.setattr(builtins, "open", opened)

    yield replace
    monkeypatch.undo()
    machine._cpu_info.cache_clear()


def test_name_and_flags_are_those_of_the_first_processor(cpuinfo):
    cpuinfo(INTEL)
    assert machine.cpu_name() == "Some CPU @ 2.00GHz"
    assert machine.cpu_flags() == {"fpu", "avx512_bf16", "avx512_vnni"}


@pytest.mark.parametrize("text", [ARM, "", None])
def test_without_a_model_name_the_architecture_is_the_name(cpuinfo, text):
    cpuinfo(text)
    assert machine.cpu_name() == platform.machine()
    assert machine.cpu_flags() == frozenset()
