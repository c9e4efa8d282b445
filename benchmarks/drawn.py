"""hypothesis strategies for requests to a server, valid and invalid ones."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

NAME = "under-test"  # the model's name in requests

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
texts = st.text(max_size=300) | st.text(st.characters(categories=["Cc", "Cf", "Cs", "Co"]))
asked = st.fixed_dictionaries(
    {"inputs": texts | st.lists(texts, max_size=5) | anything},
    optional={
        "truncate": st.booleans() | anything,
        "raw_scores": st.booleans() | anything,
        "all_scores": st.booleans() | anything,
        "explain": st.booleans() | anything,
        "top_k": st.integers() | anything,
        "model": st.just(NAME) | anything,
    },
)
tensors = st.fixed_dictionaries(
    {
        "inputs": st.lists(
            st.fixed_dictionaries(
                {"datatype": st.just("BYTES") | anything, "data": st.lists(texts) | anything},
                optional={"name": st.text() | anything, "shape": st.lists(st.integers())},
            ),
            max_size=2,
        )
    },
    optional={"id": texts, "outputs": anything, "parameters": anything},
)
HUGE = [  # large requests, and small ones with a high cost
    json.dumps({"inputs": "word " * 50_000}),
    json.dumps({"inputs": "x" * 1_000_000}),
    json.dumps({"inputs": "\x00\ud800" * 20_000}),
    json.dumps({"inputs": ["[MASK]"] * 5_000}),
    json.dumps({"inputs": ["[MASK] " * 500] * 128, "top_k": 100}),
    json.dumps({"inputs": ["[MASK] " * 100] * 8, "top_k": 100}),
    '{"inputs": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "[" * 500_000,
    '{"inputs": "' + "a" * 2_000_000,
    "",
]
readable = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=2000)
labelled = st.fixed_dictionaries(
    {"inputs": readable | st.lists(readable, min_size=1, max_size=5)},
    optional={"truncate": st.booleans(), "raw_scores": st.booleans(), "model": st.just(NAME)},
)
explained = st.fixed_dictionaries({"inputs": readable, "explain": st.just(True)})
masked = readable.map(lambda text: {"inputs": f"{text[:100]} [MASK]"})
tensor = st.lists(readable, min_size=1, max_size=5).map(
    lambda data: {"inputs": [{"shape": [len(data)], "datatype": "BYTES", "data": data}]}
)
paths = st.sampled_from(
    ["/predict", "/fill-mask", f"/v2/models/{NAME}/infer", "/v2/models/%ff/infer"]
)


def posts(where: st.SearchStrategy[str], body: st.SearchStrategy[Any]) -> Any:
    """Draw requests: a path and a JSON body."""
    return st.tuples(where, body.map(json.dumps).map(str.encode))


requests = st.one_of(  # the first half is valid
    *[posts(st.just("/predict"), labelled)] * 5,
    posts(st.just("/predict"), explained),
    posts(st.just("/fill-mask"), masked),
    posts(st.just(f"/v2/models/{NAME}/infer"), tensor),
    *[posts(paths, asked | tensors | anything)] * 4,
    *[st.tuples(paths, st.binary(max_size=400))] * 3,
    st.tuples(paths, st.sampled_from([body.encode() for body in HUGE])),
)
kinds = st.sampled_from(["application/json"] * 9 + ["text/plain", "application/json; charset=x"])
