"""The workflows on GitHub run what is there."""

import re
from pathlib import Path

import pytest

from dsmr_mlx.cli import make_parser

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_name_what_exists(path):
    text = path.read_text(encoding="utf-8")
    files = re.findall(r"(?:tests|\.ci)/[\w./-]+", text)
    assert files
    assert [name for name in files if not (ROOT / name).exists()] == []
    for words in re.findall(r"dsmr-mlx\"? ((?:doctor|models|generate)[^|>\n]*)", text):
        assert make_parser(words.split()[0]).parse_args(words.split()).run
