"""JSON documents for property tests: any values, under keys that the code reads."""

from hypothesis import strategies as st


def json_documents(keys, *, max_size, max_leaves):
    """Documents of any form; the keys of their objects are among `keys`."""
    return st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(keys.split()), inner, max_size=max_size)
        ),
        max_leaves=max_leaves,
    )
