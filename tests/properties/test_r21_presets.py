"""R21: configurations are values, presets meet exactly the modules they name, and cards say what
they are.
"""

import json
import pickle
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lora.card import DTYPES, LoRACard, LowRank
from lora.errors import LoRAError
from lora.factors import initial
from lora.presets import PRESETS, CardInfo, LoRAConfig, cost_table, fit
from lora.targets import match_targets
from lora.testing.plugin import requirement
from lora.testing.strategies import json_values, metadata, targets

ATTENTION = {f"attention.self.{part}": "hh" for part in ("query", "key", "value")}
ATTENTION |= {"attention.output.dense": "hh"}
BERT = ATTENTION | {"intermediate.dense": "hf", "output.dense": "fh"}
CROSS = {f"cross{name}": shape for name, shape in ATTENTION.items()}
LLAMA = {f"self_attn.{part}_proj": "hh" if part in "qo" else "hk" for part in "qkvo"}
LLAMA |= {"mlp.gate_proj": "hf", "mlp.up_proj": "hf", "mlp.down_proj": "fh"}
OTHERS = dict.fromkeys(
    ["pooler.dense", "classifier.dense", "dense", "cls.predictions.transform.dense"], "hh"
) | {"lm_head": "hf"}

SHORT = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output"}

texts = st.text(st.characters(exclude_categories=("C",)), max_size=6)
words = st.lists(texts, max_size=4, unique=True).map(tuple)


@st.composite
def models(draw):
    """Shapes of an encoder's or a decoder's Linears, nested under any prefix, with others beside
    them.
    """
    width = {name: draw(st.integers(1, 64)) for name in "hkf"}
    layer = dict(draw(st.sampled_from([BERT, LLAMA, BERT | CROSS])))
    nested = [
        "encoder.layer.",
        "bert.encoder.layer.",
        "model.layers.",
        "0.auto_model.encoder.layer.",
    ]
    prefix, shapes = draw(st.sampled_from(["", *nested])), {}
    indices = st.lists(st.sampled_from([0, 1, 2, 10, 11]), min_size=1, max_size=3, unique=True)
    for index in draw(indices):
        shapes |= {f"{prefix}{index}.{name}": shape for name, shape in layer.items()}
    shapes |= {name: OTHERS[name] for name in draw(st.sets(st.sampled_from(sorted(OTHERS))))}
    items = draw(st.permutations(sorted(shapes.items())))
    return {name: (width[shape[0]], width[shape[1]]) for name, shape in items}


def role(name):
    """What a module of a layer does, read off its name's components; None beside the layers."""
    *_, block, part, last = ("", "", *name.split("."))
    if name in OTHERS:
        return None
    if last != "dense":
        return SHORT.get(last, last.removesuffix("_proj"))
    if part == "intermediate":
        return "up"
    return "output" if block.endswith("attention") else "down"


NAN = float("nan")
BAD_VERSIONS = ["", "1", "1.0", "01.0.0", "1.0.0-", "1.0.0-01", "1.0.0+", "v1.0.0", "1.0.0\n"]
bad_times = st.sampled_from(
    [
        "today",
        "2026-13-01T00:00:00Z",
        "2026-01-01",
        "2026-01-01T24:00:00Z",
        "2026-01-01T00:00:00",
        5,
    ]
)


def any_of(**fields):
    """A field and a value for it."""
    return st.one_of(*(st.tuples(st.just(name), values) for name, values in fields.items()))


presets = st.sampled_from(sorted(PRESETS))


@requirement("R21.1", "R21.2")
@given(shapes=models(), preset=presets)
def test_a_presets_targets_match_the_modules_of_its_roles_and_no_other(shapes, preset):
    fitted = fit(preset, shapes)
    assert set(fitted.modules) == {name for name in shapes if role(name) in PRESETS[preset].roles}
    assert set(match_targets(shapes, fitted.config.target_modules)) == set(fitted.modules)


@requirement("R21.1")
@given(shapes=models(), preset=presets, data=st.data())
def test_the_order_of_modules_and_the_depth_change_nothing_in_the_targets(shapes, preset, data):
    shuffled = dict(data.draw(st.permutations(list(shapes.items()))))
    assert fit(preset, shuffled) == fit(preset, shapes)
    assert list(fit(preset, shuffled).modules) == sorted(fit(preset, shapes).modules)


@requirement("R21.2")
@given(shapes=models(), preset=presets, dtype=st.sampled_from(list(DTYPES)))
def test_parameters_and_bytes_are_those_of_a_card_with_these_modules(shapes, preset, dtype):
    fitted = fit(preset, shapes, dtype=dtype)
    config, rng = fitted.config, np.random.default_rng(0)
    pairs, dtype = {}, DTYPES[dtype]
    for name in fitted.modules:
        pair = initial(*shapes[name], config.rank, rng)
        pairs[name] = LowRank(pair.A.astype(dtype), pair.B.astype(dtype))
    card = LoRACard("card", config.rank, config.alpha, config.target_modules, pairs)
    assert (fitted.num_params, fitted.nbytes) == (card.num_params, card.nbytes)
    assert fitted.modules == {name: p.A.size + p.B.size for name, p in card.weights.items()}


@requirement("R21.2")
@given(named=st.dictionaries(st.sampled_from(["bert", "llama"]), models(), min_size=1))
def test_the_table_states_what_fitting_finds(named):
    rows = [
        line.strip("| ").replace(",", "").split(" | ") for line in cost_table(named).splitlines()
    ]
    expected = []
    for title, shapes in named.items():
        for task in PRESETS:
            f = fit(task, shapes)
            settings = [title, task, str(f.config.rank), f"{f.config.alpha:g}"]
            expected.append([*settings, *map(str, (len(f.modules), f.num_params, f.nbytes))])
    assert rows[2:] == expected


configs = st.builds(
    LoRAConfig,
    rank=st.integers(1, 2**31 - 1),
    alpha=st.floats(1e-300, 1e300),
    dropout=st.floats(0, 1, exclude_max=True),
    target_modules=targets,
    task_type=texts,
    tags=words,
)


@requirement("R21.3")
@given(config=configs)
def test_a_config_survives_json_and_pickle(config):
    assert LoRAConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False))) == config
    assert pickle.loads(pickle.dumps(config)) == config  # noqa: S301 - our own bytes
    assert LoRAConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert hash(LoRAConfig.from_dict(config.to_dict())) == hash(config)


@requirement("R21.3")
@given(config=configs, data=st.data())
def test_a_config_never_changes(config, data):
    field = data.draw(st.sampled_from(sorted(config.to_dict())))
    with pytest.raises(FrozenInstanceError):
        setattr(config, field, getattr(LoRAConfig(), field))
    given_list = ["query"]
    config = LoRAConfig(target_modules=given_list, tags=given_list)
    given_list.append("key")
    assert config.target_modules == config.tags == ("query",)


@requirement("R21.3")
@given(config=configs, data=st.data())
def test_what_is_left_out_has_its_default(config, data):
    given_fields = data.draw(st.sets(st.sampled_from(sorted(config.to_dict()))))
    part = {key: value for key, value in config.to_dict().items() if key in given_fields}
    loaded, default = LoRAConfig.from_dict(part).to_dict(), LoRAConfig().to_dict()
    assert loaded == {key: part.get(key, default[key]) for key in default}
    assert (default["rank"], default["alpha"]) == (8, 16.0)


@requirement("R21.3")
@given(
    bad=any_of(
        rank=st.integers(max_value=0) | st.sampled_from([1.5, "8", None, True, 2**31]),
        alpha=st.floats(max_value=0) | st.sampled_from([NAN, float("inf"), "x", None]),
        dropout=st.floats(min_value=1) | st.sampled_from([-0.1, NAN, "x", None, True]),
        target_modules=st.sampled_from([3, None, ["a", "a"], ["\n"], [1]]),
        task_type=st.sampled_from([3, None, b"x"]),
        tags=st.sampled_from([3, None, ["a", "a"], [1]]),
    )
    | st.tuples(texts.filter(lambda key: key not in LoRAConfig().to_dict()), json_values)
)
def test_a_bad_field_or_an_unknown_one_makes_no_config(bad):
    with pytest.raises(LoRAError):
        LoRAConfig.from_dict(dict([bad]))


numbers = st.integers(0, 10**6)
identifiers = st.from_regex(r"[a-z][0-9a-z-]{0,4}", fullmatch=True) | st.integers(0, 99).map(str)
versions = st.builds(
    "{}.{}.{}{}{}".format,
    *[numbers] * 3,
    st.lists(identifiers, max_size=2).map(lambda parts: "-" * bool(parts) + ".".join(parts)),
    st.sampled_from(["", "+001", "+sha.5114f85"]),
)
times = st.datetimes().map(lambda t: t.strftime("%Y-%m-%dT%H:%M:%SZ").rjust(20, "0"))


@st.composite
def infos(draw):
    created, modified = sorted([draw(times), draw(times)])
    times_told = st.sampled_from(["", created]), st.sampled_from(["", modified])
    fields = versions, texts, st.none() | st.floats(0, 1), *times_told, texts, words
    return CardInfo(*map(draw, fields))


@requirement("R21.7")
@given(info=infos(), others=metadata)
def test_what_a_card_says_of_itself_is_read_back_from_among_other_metadata(info, others):
    card = LoRACard("docs", 1, 1.0, [], {}, {**others, **info.to_metadata()})
    assert CardInfo.from_metadata(card.metadata) == info
    assert card.metadata == {**json.loads(json.dumps(others)), **info.to_metadata()}


@requirement("R21.7")
@given(
    bad=any_of(
        version=st.sampled_from([*BAD_VERSIONS, "1.\N{ARABIC-INDIC DIGIT ZERO}.0", 1]),
        quality=st.floats(min_value=1, exclude_min=True) | st.sampled_from([-0.1, "x", True]),
        created=bad_times,
        modified=bad_times,
        description=st.sampled_from([None, 3, ["x"]]),
        training_data=st.sampled_from([None, 3, ["x"]]),
        tags=st.sampled_from([["a", "a"], [1], 3, None]),
    ),
    info=infos(),
)
def test_a_bad_field_of_the_metadata_is_refused(bad, info):
    assume(info.to_metadata().get(bad[0]) != bad[1])
    with pytest.raises(LoRAError, match=f"card info: {bad[0]}"):
        CardInfo.from_metadata({**info.to_metadata(), bad[0]: bad[1]})


@requirement("R21.7")
@given(info=infos(), one=times, other=times)
def test_a_card_is_not_modified_before_it_was_created(info, one, other):
    first, second = sorted([one, other])
    assert replace(info, created=first, modified=second).modified == second
    if first < second:
        with pytest.raises(LoRAError, match="not before created"):
            replace(info, created=second, modified=first)
