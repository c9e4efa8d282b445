"""Mutations of the files of a model directory: of JSON, of a safetensors header, of bytes."""

import copy
import json
import struct

from hypothesis import strategies as st

#: What an editor, a script or a damaged disk may leave in place of any value.
ODD = [
    None, True, False, 0, -1, 1, 2, 3, 7, 1 << 31, 1 << 63, 10**12, 4_000_000_000, 10**30,
    0.5, -0.5, 1e-30, 1e300, float("inf"), float("nan"),
    "", "86", "x", "\x1b[2J\n", "\ud800", "é" * 300, [], {}, [1], ["x", "x"], [[[]]],
    {"x": {}}, {"0": None}, [0] * 2000,
]  # fmt: skip


def places(value, path=()):
    """The paths of all values in a JSON document; of long lists and objects, some."""
    found = [path] if path else []
    if isinstance(value, dict):
        keys = list(value)
        for key in [*keys[:30], *keys[-4:]]:
            found += places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(min(4, len(value))):
            found += places(value[index], (*path, index))
    return found


@st.composite
def json_values(draw, document):
    """A document with one or two values replaced, removed, renamed, repeated or scaled."""
    changed = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 2))):
        known = places(changed)
        if not known:
            return changed
        *parents, key = draw(st.sampled_from(known))
        inside = changed
        for parent in parents:
            inside = inside[parent]
        value = inside[key]
        how = draw(st.sampled_from(["odd", "odd", "remove", "rename", "number", "other", "repeat"]))
        if how == "remove":
            del inside[key]
        elif how == "rename" and isinstance(inside, dict):
            new = draw(st.sampled_from(["x", "", f"{key}s", "__metadata__"]))
            inside[new] = inside.pop(key)
        elif how == "number" and isinstance(value, int | float):
            others = [value + 1, value - 1, 2 * value, -value, str(value)]
            inside[key] = draw(st.sampled_from(others))
        elif how == "repeat" and isinstance(value, list):
            inside[key] = value * draw(st.sampled_from([0, 2, 50]))
        elif how == "other":
            inside[key] = copy.deepcopy(_at(document, draw(st.sampled_from(places(document)))))
        else:
            inside[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
    return changed


def _at(document, path):
    for part in path:
        document = document[part]
    return document


@st.composite
def byte_strings(draw, data, first=None):
    """Bytes with some of the first ones flipped, a part removed or repeated, or cut short."""
    length = len(data) if first is None else min(first, len(data))
    how = draw(st.sampled_from(["flip", "remove", "cut", "insert"]))
    at = draw(st.integers(0, max(0, length - 1)))
    size = draw(st.sampled_from([1, 1, 2, 8, 64]))
    if how == "cut":
        return data[:at]
    if how == "remove":
        return data[:at] + data[at + size :]
    if how == "insert":
        piece = draw(st.sampled_from([b"\x00", b"[" * 5000, b"9" * 400, b'"', b"\xff", b"{}"]))
        return data[:at] + piece + data[at:]
    flipped = bytes(byte ^ draw(st.integers(1, 255)) for byte in data[at : at + size])
    return data[:at] + flipped + data[at + size :]


def as_json(value):
    return json.dumps(value).encode()


@st.composite
def safetensors_headers(draw, data):
    """A safetensors file with a mutated header, whose length is right."""
    [length] = struct.unpack("<Q", data[:8])
    header = draw(json_values(json.loads(data[8 : 8 + length])))
    for name in draw(st.lists(st.sampled_from(sorted(header)), max_size=1)) if header else ():
        entry = header[name]
        if isinstance(entry, dict) and "shape" in entry:
            kinds = ["I32", "F16", "BF16", "BOOL", "F64", "F8_E4M3", "C64", "U64", "F4", "X"]
            entry["dtype"] = draw(st.sampled_from(kinds))
    content = json.dumps(header).encode()
    return struct.pack("<Q", len(content)) + content + data[8 + length :]
