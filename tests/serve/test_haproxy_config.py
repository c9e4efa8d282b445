"""Adapting Ray's HAProxy configuration: a template that has changed stops the start."""

import subprocess
import sys

import pytest

from raybert.serve.deploy import haproxy_config
from raybert.serve.deploy.haproxy_config import TemplateChangedError, adapt, check_template

RENDERED = """global
    maxconn 10
defaults
    mode http
    errorfile 502 /ray/500.http
frontend prometheus
    bind :9101
    mode http
frontend http_frontend
    bind 10.0.0.1:8000
    use_backend app
backend app
    server one 127.0.0.1:1
listen stats
  bind *:8404
  stats enable
"""


def test_internal_ports_are_bound_to_this_machine_and_the_lines_are_inserted():
    adapted = adapt(RENDERED, defaults="    d\n", rules="    r\n", table="backend t\n    k\n")
    lines = adapted.splitlines()
    binds = [line for line in lines if "bind" in line]
    assert binds == ["    bind 127.0.0.1:9101", "    bind 10.0.0.1:8000", "  bind 127.0.0.1:8404"]
    assert lines[lines.index("defaults") + 1] == "    d"
    assert lines[lines.index("backend app") + 1] == "    r"
    assert lines[-2:] == ["backend t", "    k"]
    assert "errorfile" not in adapted


CHANGES = {
    "another address": (":9101", "0.0.0.0:9101", "`bind 0.0.0.0:9101`"),
    "IPv6 as well": ("*:8404", ":::8404,*:8404", None),
    "two addresses": ("  bind *:8404", "  bind *:8404\n  bind *:8405", "has 2 lines `bind`"),
    "a new section": ("listen stats", "listen statistics", "section `listen statistics`"),
    "no metrics port": ("    bind :9101\n", "", "`frontend prometheus` has 0 lines `bind`"),
    "no port for clients": ("    bind 10.0.0.1:8000\n", "", "`frontend http_frontend` has 0"),
    "no defaults": ("defaults\n", "", "section `defaults` is missing"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_template_is_an_error(name):
    old, new, words = CHANGES[name]
    changed = RENDERED.replace(old, new)
    assert changed != RENDERED
    with pytest.raises(TemplateChangedError, match="set serve.ingress=proxy") as error:
        check_template(changed)
    assert (words or "unknown line") in str(error.value)


def test_a_template_without_backends_is_an_error():
    with pytest.raises(TemplateChangedError, match="no section `backend`"):
        check_template(RENDERED.replace("backend app", "listen_app"))


def test_the_template_of_the_installed_ray_can_be_adapted():
    check_template(
        pytest.importorskip("ray.serve._private.haproxy_templates").HAPROXY_CONFIG_TEMPLATE
    )


@pytest.mark.parametrize("changed", [False, True])
def test_the_script_adapts_the_file_or_fails_and_leaves_it(tmp_path, changed):
    text = RENDERED.replace("*:8404", "0.0.0.0:8404") if changed else RENDERED
    files = [tmp_path / name for name in ("haproxy.cfg", "defaults", "rules", "table")]
    for file, content in zip(files, [text, "    d\n", "    r\n", "backend t\n"], strict=True):
        file.write_text(content)
    command = [sys.executable, "-I", haproxy_config.__file__, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == int(changed)
    assert ("HAProxy is not started" in done.stderr) == changed
    assert (files[0].read_text() == text) == changed
