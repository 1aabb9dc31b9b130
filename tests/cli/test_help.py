"""The help of every command, on a terminal of 80 columns."""

import argparse

import pytest

from dsmr_mlx.cli import COMMANDS, make_parser


@pytest.fixture
def parsers(monkeypatch) -> dict[str, argparse.ArgumentParser]:
    monkeypatch.setenv("COLUMNS", "80")
    return {command: make_parser(command).commands.choices[command] for command in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_and_has_an_example_and_all_options(parsers, command):
    text = parsers[command].format_help()
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert f"\n  dsmr-mlx {command}" in text.partition("\nexample")[2]
    assert [action.dest for action in parsers[command]._actions if not action.help] == []


def test_the_help_of_train_has_the_limits_and_the_settings(parsers):
    text = " ".join(parsers["train"].format_help().split())
    assert "(default: the preset's, 5,000 for small; none if" in text
    assert "RUN/config.json" in text


SPELLINGS = [
    ("prepare", "validation_fraction", "--validation-fraction"),
    ("tokenize", "tokenizer_config", "--tokenizer-config"),
    ("train", "resume", "--resume"),
    ("train", "settings", "--set"),
    ("train", "batch_size", "--set batch_size"),
    ("train", "reverse", "reverse"),
    ("evaluate", "distances", "--distances"),
    ("evaluate", "checkpoint", "CHECKPOINT"),
    ("compare", "max_tokens", "--max-tokens"),
    ("generate", "n", "-n"),
    ("generate", "continuation_only", "--continuation-only"),
    ("live", "in_port", "--in"),
    ("live", "out_port", "--out"),
    ("assess", "training", "--training"),
    ("show", "start", "--start"),
    ("models", "start", "start"),
    ("convert", "logits_file", "--verify"),
    ("convert", "map_file", "--map"),
    ("convert", "segment_length", "--segment"),
    ("convert", "n_heads", "--set n_heads"),
    ("horizons", "kv_heads", "--kv-heads"),
    ("report", "out", "--out"),
    ("doctor", "full", "--full"),
    ("studio", "allow_network", "--allow-network"),
]


@pytest.mark.parametrize(("command", "argument", "spelling"), SPELLINGS)
def test_arguments_of_the_library_are_shown_as_options(parsers, command, argument, spelling):
    message = parsers[command].with_options(f"`{argument}` 9: expected `pip install x`")
    assert message == f"{spelling} 9: expected `pip install x`"


def test_every_command_has_a_spelling():
    assert {command for command, _, _ in SPELLINGS} == set(COMMANDS)


@pytest.mark.parametrize("words", [["generate", "`seed`"], ["generate", "--prompt", "`seed`.mid"]])
def test_backquotes_of_the_user_are_left_alone(run, words):
    """A file that is called like an argument keeps its name in messages."""
    result = run(*words)
    assert result.code == 2
    assert "`seed`" in result.err
    assert "--seed" not in result.err
