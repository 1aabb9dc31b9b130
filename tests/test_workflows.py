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


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_step_fails_with_any_part_of_a_pipe(path):
    """Only `shell: bash` gives bash the option pipefail."""
    lines = [line.split("#")[0].rstrip() for line in path.read_text(encoding="utf-8").splitlines()]
    begin = lines.index("defaults:")
    assert lines[begin : begin + 3] == ["defaults:", "  run:", "    shell: bash"]


def test_the_tests_on_metal_run_even_if_the_doctor_finds_something_wrong():
    steps = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8").split("- name: ")
    (found,) = [step for step in steps if step.startswith("Compiled, on Metal")]
    assert "if: ${{ !cancelled() }}" in found
