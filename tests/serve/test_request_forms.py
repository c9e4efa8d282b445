"""Requests in other forms and to other names: compressed, with odd paths, Host and types."""

import gzip
import json
import logging
import zlib

import pytest
from in_process import LOG, Api, assert_error

from raybert.serve.http.api import PAGE
from raybert.serve.http.hosts import is_allowed_host
from raybert.serve.settings import ServeConfig


@pytest.fixture(scope="module")
def api(model, pretrained):
    made = Api(model, pretrained)
    yield made
    made.service.close()


def compressed(body, how):
    data = json.dumps(body).encode()
    if how == "raw deflate":
        made = zlib.compressobj(wbits=-15)
        return made.compress(data) + made.flush()
    if how == "two members":
        return gzip.compress(data[:9]) + gzip.compress(data[9:])
    return {"gzip": gzip.compress, "deflate": zlib.compress, "identity": bytes}[how](data)


ENCODINGS = ["gzip", "deflate", "identity", "raw deflate", "two members"]


@pytest.mark.parametrize("how", ENCODINGS)
def test_compressed_bodies_are_read(api, how):
    body = {"inputs": ["a superb film " * 200, "an awful film"]}
    name = {"raw deflate": "deflate", "two members": "GZip"}.get(how, how)
    headers = {"Content-Type": "application/json", "Content-Encoding": name}
    sent = compressed(body, how)
    answer = api.ask("POST", "/predict", content=sent, headers=headers)
    assert answer.json() == api.post("/predict", body).json()
    if how != "identity":
        for damaged in (sent[:-6], sent[:9], b"x" + sent):
            cut = api.ask("POST", "/predict", content=damaged, headers=headers)
            assert_error(cut, 400, "Content-Encoding")


@pytest.mark.parametrize("how", ["gzip", "deflate"])
def test_a_compressed_body_is_limited_by_what_it_holds(api, how):
    bomb = compressed({"inputs": "a" * (1 << 26)}, how)  # 64 MB in 64 KB
    headers = {"Content-Type": "application/json", "Content-Encoding": how}
    large = api.ask("POST", "/predict", content=bomb[:60_000], headers=headers)
    assert_error(large, 413, "decompressed body has more than 65,536 bytes")
    many = api.ask("POST", "/predict", content=gzip.compress(b"") * 2000,
                   headers={**headers, "Content-Encoding": "gzip"})  # fmt: skip
    assert_error(many, 400, "Content-Encoding")


def test_other_encodings_are_refused(api):
    for name in ("br", "zstd", "gzip, gzip", "x"):
        headers = {"Content-Type": "application/json", "Content-Encoding": name}
        refused = api.ask("POST", "/predict", content=b"{}", headers=headers)
        assert_error(refused, 415, "gzip or deflate")
        assert refused.headers["Accept-Encoding"] == "gzip, deflate"


def test_a_byte_order_mark_is_passed_over(api):
    body = {"inputs": "a superb film"}
    marked = api.send("/predict", b"\xef\xbb\xbf" + json.dumps(body).encode())
    assert marked.json() == api.post("/predict", body).json()
    assert_error(api.send("/predict", b"\xef\xbb\xbf"), 400, "no body")


@pytest.mark.parametrize("end", ["%0a", "%0d%0a", "%00", "%7f", "%c2%85", "%0A%0A"])
def test_a_path_with_control_characters_does_not_exist(api, end):
    for path in ("/predict", "/fill-mask", "/v2/models/run/infer"):
        assert_error(api.post(f"{path}{end}", {"inputs": "a"}), 404)
    for path in ("/info", "/metrics", "/docs", "/"):
        assert_error(api.ask("GET", f"{path}{end}"), 404)


@pytest.fixture(scope="module")
def named(model, pretrained):
    hosts = ServeConfig(host="10.1.2.3").with_allowed_hosts(has_keys=False).allowed_hosts
    others = ["*.Example.org", "named.test:8443", "fe80::2", "[0:0:0:0:0:0:0:3]:80", "dot.test."]
    made = Api(model, pretrained, allowed_hosts=[*hosts, *others])
    yield made
    made.service.close()


@pytest.mark.parametrize(
    ("host", "is_known"),
    [
        ("localhost:8000", True),
        ("LOCALHOST", True),
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("10.1.2.3", True),
        ("api.example.org:443", True),
        ("named.test", True),
        ("named.test:1", True),
        ("[FE80::2]:8000", True),
        ("[::3]", True),
        ("[0:0:0:0:0:0:0:1]:8000", True),
        ("dot.test", True),
        ("dot.test.:80", True),
        ("fe80", False),
        ("[::4]", False),
        ("evil.example", False),
        ("evil.example:8000", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("example.org", False),
        ("evilexample.org", False),
        ("", False),
        ("[::1", False),
    ],
)
def test_requests_to_another_name_are_refused(named, host, is_known):
    headers = {"Host": host}
    for method, path in (("POST", "/predict"), ("GET", "/info"), ("GET", "/docs"), ("GET", "/x")):
        body = {"json": {"inputs": "a superb film"}} if method == "POST" else {}
        answer = named.ask(method, path, headers=headers, **body)
        if is_known:
            assert answer.status_code == (404 if path == "/x" else 200)
        else:
            assert_error(answer, 400, "serve.allowed_hosts")
    assert named.ask("GET", "/health", headers=headers).is_success  # load balancers name any


def test_any_name_is_allowed_where_keys_are_required_or_all_are_named():
    assert ServeConfig().with_allowed_hosts(has_keys=True).allowed_hosts is None
    assert ServeConfig(allowed_hosts=["a"]).with_allowed_hosts(has_keys=False).allowed_hosts == [
        "a"
    ]
    assert is_allowed_host("evil.example", ["*"])


@pytest.mark.parametrize("name", ["", " ", "https://a.example", "a/b", "a b", "[::1", ":80"])
def test_an_allowed_host_that_is_no_name_is_refused(name):
    with pytest.raises(ValueError, match="allowed_hosts"):
        ServeConfig(allowed_hosts=["localhost", name])


@pytest.mark.parametrize("header", [{"Origin": "https://a.example"}, {"Sec-Fetch-Site": "none"}])
def test_a_page_can_not_send_a_body_without_its_type(api, header):
    """A browser would send it without asking the server first."""
    body = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a film"]}]}
    path, content = "/v2/models/run/infer", json.dumps(body).encode()
    assert api.ask("POST", path, content=content).is_success  # as clients of the protocol do
    assert_error(api.ask("POST", path, content=content, headers=header), 415)
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        assert_error(api.send(path, content, kind), 415)
    typed = api.ask(
        "POST", path, content=content, headers={**header, "Content-Type": "application/json"}
    )
    assert typed.is_success
    for path in ("/predict", "/fill-mask"):
        assert_error(api.ask("POST", path, content=b'{"inputs": "a"}'), 415)


# Behind a proxy ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(model, pretrained):
    """A server that a proxy publishes under /reviews."""
    made = Api(model, pretrained, root_path="/reviews", page=PAGE)
    yield made
    made.service.close()


@pytest.mark.parametrize("prefix", ["", "/reviews"])  # which the proxy removes, or does not
def test_a_server_under_a_path_answers_with_and_without_it(published, prefix):
    page = published.ask("GET", f"{prefix}/")
    assert page.headers["content-type"].startswith("text/html")
    assert '<base href="/reviews/">' in page.text and "base-uri 'self'" in page.text
    for file in ("app.js", "style.css", "docs", "info", "health"):
        assert published.ask("GET", f"{prefix}/{file}").is_success
    assert published.post(f"{prefix}/predict", {"inputs": "a superb film"}).is_success
    assert published.post(f"{prefix}/v2/models/run/infer", {"inputs": []}).status_code == 422
    document = published.ask("GET", f"{prefix}/openapi.json").json()
    assert document["servers"] == [{"url": "/reviews"}]
    assert_error(published.ask("GET", f"{prefix}/nothing"), 404)


def test_the_page_under_a_path_is_found_without_the_last_slash(published):
    assert '<base href="/reviews/">' in published.ask("GET", "/reviews").text
    assert_error(published.ask("GET", "/reviewsx"), 404)


def test_a_path_that_begins_as_the_root_path_stays_whole(model, pretrained):
    """The proxy has removed the root path: `/app.js` is no `/a` with `pp.js` below it."""
    made = Api(model, pretrained, root_path="/a", page=PAGE, keys=["a-key-of-mine-0123456789"])
    try:
        for prefix in ("", "/a"):
            assert made.ask("GET", f"{prefix}/app.js").is_success
            assert made.ask("GET", f"{prefix}/health").is_success
            assert_error(made.ask("GET", f"{prefix}/info"), 401)
        admission = made.app.state.admission
        for path in ("/", "/a/", "/a", "/predict", "/a/predict"):
            assert admission.is_queued({"method": "POST", "path": path})
        assert not admission.is_queued({"method": "POST", "path": "/app"})
    finally:
        made.service.close()


@pytest.mark.parametrize("path", ["reviews", "/a/", "/a//b", "/a b", '/"><script>', "/a?b"])
def test_a_root_path_that_is_none_is_refused(path):
    with pytest.raises(ValueError, match="root_path"):
        ServeConfig(root_path=path)


TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def test_the_trace_of_a_request_is_logged_and_returned(api, caplog):
    caplog.set_level(logging.INFO, logger=LOG.name)
    headers = {"traceparent": TRACE}
    for method, path, body in (("POST", "/predict", {"inputs": "a film"}), ("GET", "/x", None)):
        answer = api.ask(method, path, json=body, headers=headers)
        assert answer.headers["traceparent"] == TRACE
    found = [vars(record).get("trace_id") for record in caplog.records if record.name == LOG.name]
    assert found == ["4bf92f3577b34da6a3ce929d0e0e4736"] * 2


NO_TRACES = [
    f"ff{TRACE[2:]}",  # the version that the standard forbids
    TRACE.replace("4bf92f3577b34da6a3ce929d0e0e4736", "0" * 32),
    TRACE.replace("00f067aa0ba902b7", "0" * 16),
]


@pytest.mark.parametrize(
    "value", ["", "x", TRACE[:-1], f"{TRACE}-x", TRACE.upper(), "\u00e9", *NO_TRACES]
)
def test_what_is_no_trace_is_dropped(api, caplog, value):
    caplog.set_level(logging.INFO, logger=LOG.name)
    headers = [(b"traceparent", value.encode()), (b"content-type", b"application/json")]
    answer = api.ask("POST", "/predict", content=b'{"inputs": "a film"}', headers=headers)
    assert answer.is_success and "traceparent" not in answer.headers
    assert all("trace_id" not in vars(record) for record in caplog.records)
