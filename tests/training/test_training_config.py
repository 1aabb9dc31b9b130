import dataclasses
from pathlib import Path

import pytest
from support.tiny import TOKENIZER

from dsmr_mlx import UserError
from dsmr_mlx.cli import make_parser
from dsmr_mlx.common.config import parse_setting
from dsmr_mlx.model.config import Architecture, ModelConfig
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.tokenizers.ids import IdTokenizer
from dsmr_mlx.training.config import LIMITS, PRESETS, TrainConfig
from dsmr_mlx.training.settings import build_config, train_arguments

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(("preset", "millions"), [("tiny", 1), ("small", 5), ("base", 40)])
def test_presets_have_their_documented_size(preset, millions):
    config = build_config(preset)
    assert DSMR(config.model_config(TOKENIZER)).n_parameters == pytest.approx(millions * 1e6, rel=0.15)
    assert config.head_dim == 64
    assert config.schedule.family == "two-scale"


def test_precedence(tmp_path):
    toml = tmp_path / "run.toml"
    toml.write_text('seed = 1\nbatch_size = 3\nhorizons = "uniform:64"\n')
    config = build_config("tiny", toml, ["batch_size=4", "compile=true"], {"seed": 9, "dropout": 0.1}, max_steps=7)
    assert (config.seed, config.batch_size, config.max_steps, config.compile) == (1, 4, 7, True)
    assert (config.dropout, config.horizons, config.d_model) == (0.1, "uniform:64", PRESETS["tiny"]["d_model"])


def test_counts_may_have_an_exponent():
    config = build_config(settings=["max_tokens=1e6", "batch_size=4.0"])
    assert (config.max_tokens, config.batch_size) == (1_000_000, 4)
    assert type(config.max_tokens) is type(config.batch_size) is int
    with pytest.raises(UserError, match=r"max_tokens = 1\.5: expected int"):
        build_config(settings=["max_tokens=1.5"])
    with pytest.raises(UserError, match=r"max_steps = 1e\+300: expected at most 9223372036854775807"):
        build_config(settings=["max_steps=1e300"])


def test_a_given_limit_replaces_the_limit_of_the_preset():
    assert build_config("tiny").max_steps == 2000
    config = build_config("tiny", max_tokens=10**9)
    assert (config.max_steps, config.max_tokens) == (None, 10**9)
    config = build_config("tiny", settings=["max_minutes=5"], max_tokens=100)
    assert (config.max_steps, config.max_tokens, config.max_minutes) == (None, 100, 5.0)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("seed=3", ("seed", 3)),
        (" seed = 1_000 ", ("seed", 1000)),
        ("learning_rate=2e-3", ("learning_rate", 2e-3)),
        ("compile=false", ("compile", False)),
        ("eval_tokens=none", ("eval_tokens", None)),
        ("horizons=none", ("horizons", "none")),
        ("horizons=custom:1,2", ("horizons", "custom:1,2")),
        ('dtype="bfloat16"', ("dtype", "bfloat16")),
        ("init=runs/first", ("init", "runs/first")),
        ("init=none", ("init", None)),
    ],
)
def test_settings_are_toml_without_quotes(setting, expected):
    assert parse_setting(setting, TrainConfig) == expected


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("batchsize=3", "unknown key batchsize"),
        ("seed", "expected key=value"),
        ("seed=x", "seed = 'x': expected int"),
        ("horizons=uniform:x", "uniform:x"),
        ("horizons=custom:1,2", "custom:1,2"),
        ("batch_size=0", "batch_size = 0: expected at least 1"),
        ("dtype=float16", "dtype = 'float16': expected one of float32, bfloat16"),
        ("min_learning_rate=1", "min_learning_rate = 1.0: expected at most"),
        ("max_steps=none", "max_steps = None: expected an end"),
        ("n_heads=3", "n_kv_heads"),
        ("augment_stretch=2", "augment_stretch = 2.0"),
        ("init=2024", "init = 2024: expected str"),
    ],
)
def test_an_invalid_setting_is_named(setting, message):
    with pytest.raises(UserError, match=message):
        build_config("tiny", settings=[setting, "n_kv_heads=2"])


def test_an_invalid_file_is_named(tmp_path):
    path = tmp_path / "run.toml"
    with pytest.raises(UserError, match=r"run\.toml"):
        build_config(config=path)
    path.write_text("seed = \n")
    with pytest.raises(UserError, match=r"run\.toml"):
        build_config(config=path)
    path.write_text("sed = 1\n")
    with pytest.raises(UserError, match=r"run\.toml: unknown key sed"):
        build_config(config=path)


def test_json_round_trip():
    config = build_config("base", settings=["max_minutes=3", "compile=true"])
    assert TrainConfig.from_json(config.to_json()) == config


def test_a_model_gets_all_architecture_settings():
    config = build_config("tiny", settings=["norm=layer", "gated=false", "rope_theta=500", "dropout=0.2"])
    model_config = config.model_config(IdTokenizer(100, "other"))
    assert isinstance(model_config, ModelConfig)
    for field in dataclasses.fields(Architecture):
        assert getattr(model_config, field.name) == getattr(config, field.name)
    assert model_config.horizons == [512, 64, 64, 64]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"d_model": 64, "norm": "layer", "n_kv_heads": 1},
        {"horizons": "none", "segment_length": 32, "dropout": 0.5, "seed": 3, "max_tokens": 100},
    ],
)
def test_the_command_of_a_warm_start_repeats_its_configuration(tmp_path, options):
    """Settings fixed by the checkpoint are left out; free ones are always given, because the checkpoint is not read."""
    start = build_config("tiny", d_model=32, n_heads=2, head_dim=16)
    (tmp_path / "c").mkdir()
    fixed = {key: value for key, value in options.items() if key in ("d_model", "norm", "n_kv_heads")}
    model_config = dataclasses.replace(start, **fixed).model_config(TOKENIZER)
    for name in ("tokenizer/tokenizer.json", "model.safetensors"):
        (tmp_path / "c" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "c" / name).touch()
    (tmp_path / "c" / "config.json").write_text(model_config.to_json())
    config = build_config("base", init=str(tmp_path / "c"), **options)
    arguments = train_arguments(config)
    a = make_parser("train").parse_args(["train", "--data", "corpus", "--out", "run", *arguments])
    limits = {name: getattr(a, name) for name in LIMITS if getattr(a, name) is not None}
    assert build_config(a.preset, a.config, a.settings, init=a.init, **limits) == config
    assert not any(argument.startswith("d_model=") for argument in arguments)


def test_a_resumed_run_keeps_its_own_architecture():
    resumed = build_config("tiny", d_model=48, horizons="none").to_dict() | {"init": "gone"}
    config = build_config("base", resumed=resumed, init="gone")
    assert (config.d_model, config.horizons, config.segment_length) == (48, "none", 128)
    assert config.batch_size == PRESETS["base"]["batch_size"]


def test_the_settings_in_the_examples(tmp_path):
    """And in a TOML file, "none" is None."""
    (tmp_path / "plain.toml").write_text('logit_softcap = "none"')
    assert build_config(config=tmp_path / "plain.toml").logit_softcap is None
    config = build_config(config=EXAMPLES / "maestro-small.toml")
    assert (config.canon, config.optimizer, config.n_kv_heads, config.fill) == (True, "muon", 2, 0.3)
    with pytest.raises(UserError, match="logit_softcap = 'all'"):
        TrainConfig(logit_softcap="all")
