"""`model.size` fills in what a configuration leaves out, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raybert.config import build, comment_out, dump
from raybert.errors import ConfigError
from raybert.experiment import Experiment
from raybert.model.sizes import DECIDED, SHAPES, finetuning_lr, heads_of, pretraining_lr
from raybert.yaml_values import parse_yaml

KEYS = [(section, key) for section, keys in DECIDED.items() for key in keys]
VALUES = {"hidden_size": 192, "num_layers": 3, "num_heads": 2, "lr": 7e-4}


def read(values):
    return build(Experiment, values, "test")


@given(
    size=st.sampled_from(list(SHAPES)),
    given_keys=st.sets(st.sampled_from([key for key in KEYS if key[1] in VALUES])),
    batch=st.none() | st.integers(1, 700),
    micro=st.none() | st.integers(1, 64),
)
def test_what_is_set_stays_and_the_rest_fits(size, given_keys, batch, micro):
    values = {"model": {"size": size}, "pretrain": {}, "finetune": {}}
    for section, key in given_keys:
        values[section][key] = VALUES[key]
    if {("model", "hidden_size"), ("model", "num_layers")} <= given_keys:
        with pytest.raises(ConfigError, match="decides width and layers"):
            read(values)
        return
    sizes = {"global_batch_size": batch, "micro_batch_size": micro}
    values["pretrain"] |= {key: value for key, value in sizes.items() if value is not None}
    if batch is not None and micro is not None and batch % micro:
        return
    found = read(values)
    shown = found.model_dump()
    for section in DECIDED:
        for key, value in values[section].items():
            assert shown[section][key] == value
    model, width = found.model, found.model.hidden_size
    if ("model", "num_layers") not in given_keys:
        assert model.num_layers == SHAPES[size].num_layers
    if ("model", "hidden_size") not in given_keys:
        assert width == SHAPES[size].hidden_size
    if ("pretrain", "lr") not in given_keys:
        assert found.pretrain.lr == pretraining_lr(width)
    assert read(parse_yaml(dump(found), "dump")) == found


@given(st.integers(1, 5000))
def test_heads_divide_the_width_and_are_wide_enough(width):
    heads = heads_of(width)
    assert width % heads == 0
    assert heads == 1 or width // heads >= 64


def test_wider_models_learn_more_slowly():
    widths = [shape.hidden_size for shape in SHAPES.values()]
    for rule in (pretraining_lr, finetuning_lr):
        rates = [rule(width) for width in widths]
        assert rates == sorted(set(rates), reverse=True)


def test_a_printed_configuration_leaves_the_size_open():
    decided = {f"{section}.{key}" for section, key in KEYS}
    text = comment_out(dump(Experiment()), decided)
    assert read(parse_yaml(text, "printed")) == Experiment()
    assert "  # hidden_size: 256\n" in text
    sized = parse_yaml(text.replace("size: null", "size: base", 1), "printed")
    assert read(sized).model.hidden_size == 768
    assert read(sized).finetune.lr == finetuning_lr(768)


def test_a_size_that_would_have_no_effect_is_refused():
    values = {"model": {"size": "base", "hidden_size": 128, "num_layers": 2}}
    with pytest.raises(ConfigError, match=r"model.size=base decides .*model.num_layers=2 and"):
        read(values)
