"""The files of the page: their size, and nothing that their Content-Security-Policy forbids."""

import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest

import raybert.serve.http

PAGE = Path(raybert.serve.http.__file__).parent / "page"
FILES = {path.name: path.read_text(encoding="utf-8") for path in sorted(PAGE.iterdir())}
SCRIPTS = {name: text for name, text in FILES.items() if name.endswith(".js")}


class Elements(HTMLParser):
    """Every start tag with its attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


HTML = Elements(FILES["index.html"]).found


@pytest.mark.parametrize("name", FILES)
def test_no_file_is_long(name):
    assert len(FILES[name].splitlines()) <= 250


def test_the_package_ships_them():
    project = tomllib.loads((PAGE.parents[3] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["raybert"]
    shipped = {path.name for pattern in patterns for path in PAGE.parents[2].glob(pattern)}
    templates = {path.name for path in PAGE.with_name("templates").iterdir()}
    assert set(FILES) | templates <= shipped


@pytest.mark.parametrize("name", SCRIPTS)
def test_text_never_becomes_markup(name):
    found = re.findall(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|setHTML|DOMParser|\beval\b"
        r"|new Function|createContextualFragment|srcdoc",
        SCRIPTS[name],
    )
    assert found == []


def test_the_policy_allows_this_server_alone():
    policy = next(a["content"] for t, a in HTML if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.split(maxsplit=1) for rule in policy.split(";"))
    assert rules.pop("default-src") == "'none'"
    assert set(rules.values()) <= {"'self'", "'none'"}


def test_nothing_is_inline():
    for tag, attributes in HTML:
        assert tag != "style"
        assert tag != "script" or "src" in attributes
        assert not [name for name in attributes if name == "style" or name.startswith("on")]


def test_every_address_is_a_file_beside_the_page():
    addresses = [v for _, a in HTML for k, v in a.items() if k in ("src", "href")]
    for text in SCRIPTS.values():
        addresses += [path.removeprefix("./") for path in re.findall(r'from "(.+)"', text)]
    assert {"app.js", "client.js", "style.css"} <= set(addresses)
    assert set(addresses) <= set(FILES)
    for name, text in FILES.items():
        assert "url(" not in text and "@import" not in text
        outside = set(re.findall(r"https?://[^\s\"']+", text))
        assert outside <= {"http://www.w3.org/2000/svg"}, name  # a name, not an address


def test_every_field_has_a_label_of_its_own():
    labelled = [attributes.get("for") for tag, attributes in HTML if tag == "label"]
    fields = [attributes["id"] for tag, attributes in HTML if tag in ("input", "textarea")]
    assert sorted(labelled) == sorted(fields)
    ids = [attributes["id"] for _, attributes in HTML if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in HTML:
        for name in ("aria-describedby", "aria-labelledby"):
            assert name not in attributes or attributes[name] in ids
