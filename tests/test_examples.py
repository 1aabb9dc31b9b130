"""The examples run as a user would run them, on small inputs, and do what they claim."""

import ast
import importlib
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from dsmr_mlx import generate, load
from dsmr_mlx.generation.steering import MaxNoteSeconds
from dsmr_mlx.model.horizon_families import FAMILIES
from dsmr_mlx.music.midi import read_notes, read_text, write_notes
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "pytorch_muon")  # a module
TINY = ("d_model=16", "n_layers=2", "n_heads=2", "head_dim=8", "d_ff=24", "segment_length=8", "batch_size=2")
TICK = 0.01  # seconds


@pytest.fixture
def melodies(example):
    return importlib.import_module("melodies")


def test_every_example_is_listed_and_says_how_to_run_it():
    """And what a user copies needs no private names."""
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    there = {path.name for path in EXAMPLES.iterdir() if path.is_file()} - {"README.md"}
    assert set(re.findall(r"\]\(([^)]+)\)", text)) == there
    for name in NAMES:
        source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        assert f"python examples/{name}.py" in source.replace("`python\n# ", "python "), name
        attributes = [node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
        assert not [a for a in attributes if a.startswith("_") and not a.startswith("__")], name


KEYS = {
    "petzold": (7, ()),
    "ode": (2, (8,)),
    "elise": (0, (3, 8)),
    "satie": (2, ()),
    "brahms": (0, ()),
    "mozart": (0, ()),
}


@pytest.mark.parametrize(("name", "key", "also"), [(name, *key) for name, key in KEYS.items()])
def test_melodies_have_no_wrong_notes(melodies, name, key, also):
    """All are of the major scale of their key signature, but for the leading notes that are known."""
    scale = {(key + step) % 12 for step in (0, 2, 4, 5, 7, 9, 11)} | set(also)
    events = [event for voice in melodies.MELODIES[name].voices for event in voice]
    assert {pitch % 12 for _, _, pitch in events} <= scale


def test_melodies_have_complete_bars(melodies):
    """Their voices last equally long, a rest in the end aside; Bach's prelude has its 35 bars of sixteenths."""
    for melody in melodies.MELODIES.values():
        ends = [max(beat + length for beat, length, _ in voice) for voice in melody.voices]
        assert max(ends) - min(ends) <= 1
    assert len(melodies.MELODIES["bach"].voices[0]) == 34 * 16 + 5


def test_melodies_are_written_by_a_program(tmp_path, melodies):
    """As a user runs it; all files can be read, and say what they are."""
    done = subprocess.run([sys.executable, EXAMPLES / "melodies.py"], cwd=tmp_path, capture_output=True, check=True)
    files = sorted((tmp_path / "example-output/melodies").iterdir())
    assert [path.name for path in files] == sorted(f"{name}-1.mid" for name in melodies.MELODIES)
    for path in files:
        assert read_text(path) in done.stdout.decode()
        assert len(read_notes(path)) > 50


def test_performances_are_expressive_and_survive_tokenization(melodies):
    """No two sixteenths of the prelude last equally long, by some percent; a performance is always the same one."""
    tokenizer = PerformanceTokenizer()
    for melody in melodies.MELODIES.values():
        notes = melodies.perform(melody)
        assert notes == melodies.perform(melody)
        assert notes != melodies.perform(melody, take=1)
        assert notes.velocity.std() > 5
        again = tokenizer.decode(tokenizer.encode_notes(notes))
        assert len(again) == len(notes)
        assert abs(again.duration - notes.duration) < 2 * TICK
    between = np.diff(melodies.perform(melodies.MELODIES["bach"]).onset[: 32 * 16])
    assert 0.02 < between.std() / between.mean() < 0.3


def test_continue_midi(example, trained, tmp_path):
    """Every file begins with the prompt, note for note, and goes on from there."""
    melodies = importlib.import_module("melodies")
    midi = melodies.write_melodies(tmp_path / "midi") / "petzold-1.mid"
    shown = example("continue_midi", midi, "--from", 3, "--seconds", 2, "-n", 2, "--model", trained.run, "--out", "out")
    assert shown.startswith("56 tokens read")
    heard = read_notes(midi)
    begun = heard.take(heard.onset < 2.5)
    for path in (tmp_path / "out/1.mid", tmp_path / "out/2.mid"):
        notes = read_notes(path)
        same = notes.take(slice(len(begun)))
        np.testing.assert_array_equal(same.pitch, begun.pitch)
        np.testing.assert_allclose(same.onset, begun.onset, atol=TICK)
        assert notes.duration > 3
        assert path.with_suffix(".svg").read_text().startswith("<svg")
    assert (tmp_path / "out/1.mid").read_bytes() != (tmp_path / "out/2.mid").read_bytes()


def test_continue_midi_marks_where_the_new_music_starts(example, trained, tmp_path):
    """Of a file that is shorter than was asked for that is its end."""
    notes = Notes.sorted([5.0, 6.0], [5.5, 7.0], [60, 64], [70, 70])  # after a silence, which tokens do not have
    write_notes(notes, tmp_path / "short.mid")
    common = ("short.mid", "--seconds", 1, "-n", 1, "--model", trained.run, "--out", "out")
    example("continue_midi", *common, "--from", 1000)
    assert read_text(tmp_path / "out/1.mid") == "continued after 2 s"
    assert "new after 2 s" in (tmp_path / "out/1.svg").read_text()


def test_stream_notes(example, trained):
    """A line for each note, in the order in which keys go up."""
    *lines, last = example("stream_notes", "--seconds", 3, "--at-once", "--model", trained.run).splitlines()
    times = [float(line.split()[0]) for line in lines]
    assert times == sorted(times)
    assert last.startswith(f"{len(times)} notes; ")


@pytest.mark.slow
def test_logits_processor(example, trained, tmp_path):
    """The music rises and falls with the processor, and not without it."""
    example("logits_processor", "--seconds", 6, "--model", trained.run, "--out", "out")
    rises = {}
    for name in ("plain", "arch"):
        notes = read_notes(tmp_path / f"out/{name}.mid")
        first, middle, last = (notes.pitch[(notes.onset // 2) == third].mean() for third in range(3))
        rises[name] = middle - (first + last) / 2
    assert rises["arch"] > 20 > abs(rises["plain"])


@pytest.mark.slow
def test_the_constraint_of_logits_processor_always_holds(example, trained):
    """Where the music stays on few keys, which without it are soon pressed again."""
    module = importlib.import_module("logits_processor")
    model, tokenizer = load(trained.run)
    narrow, soonest = [module.Arch(60, 60, 1.0, width=1.0), MaxNoteSeconds(0.2)], []
    for processors in (narrow, [*narrow, module.NotAgain(0.5)]):
        stream = generate(model, tokenizer, seconds=3, processors=processors, as_notes=True)
        soonest.append(soonest_repeat(Notes.of(stream)))
    assert soonest[0] < 0.3 < 0.5 - TICK / 2 <= soonest[1]


def soonest_repeat(notes: Notes) -> float:
    """The least seconds between two presses of one key."""
    return min(np.diff(notes.onset[notes.pitch == key]).min(initial=np.inf) for key in np.unique(notes.pitch))


@pytest.mark.slow
def test_horizon_schedule(example, trained, tmp_path):
    """A family of one's own works wherever a schedule is named; the curve ends at the loss of the model under it."""
    pytest.importorskip("matplotlib")
    shown = example(
        "horizon_schedule", "staircase:top=12,step=1", "--model", trained.run, "--max-tokens", 500, "--out", "out"
    )
    assert "staircase: 1 × 12 + 1 × 6, budget 18 tokens" in shown
    perplexity = float(re.search(r"perplexity +([\d.]+) with staircase", shown)[1])
    (curve,) = re.findall(r"all layers capped: +(.*)", shown)
    assert float(curve.split()[-1]) == pytest.approx(math.log(perplexity), abs=2e-3)
    assert [float(word[:-1]) for word in curve.split()[::2]] == [0, 12]
    for name in ("schedule.svg", "context.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000


@pytest.mark.parametrize("name", ["schedule.svg", "schedule.png"])
def test_draw_schedule(example, tmp_path, name):
    pytest.importorskip("matplotlib")
    example("draw_schedule", "linear:budget=960", "--layers", 4, "--segment", 64, "--out", name)
    assert (tmp_path / name).stat().st_size > 1000


def test_the_readme_picture_is_up_to_date(example, tmp_path):
    """Up to the identifiers and versions that matplotlib writes: the same bars and the same words."""
    pytest.importorskip("matplotlib")
    example("draw_schedule", "two-scale:long=2x1024,short=128", "--layers", 6, "--segment", 128, "--out", "new.svg")
    old, new = (path.read_text().count("<path") for path in (EXAMPLES / "schedule.svg", tmp_path / "new.svg"))
    assert old == new


@pytest.mark.slow
def test_convert_pytorch(example, trained, tmp_path):
    """There and back: the same weights, and a verification that has passed."""
    pytest.importorskip("torch")
    from dsmr_mlx.model.checkpoint import load_arrays

    shown = example("convert_pytorch", "--model", trained.run, "--seconds", 1, "--out", "out")
    assert re.search(r"compared with .*: the same\n", shown)
    before, after = (load_arrays(p / "model.safetensors") for p in (trained.checkpoint, tmp_path / "out/model"))
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all().item() for name in before)
    assert example("convert_pytorch", "out/model.pt", "--seconds", 1, "--out", "again").startswith("family: dsmr")


@pytest.mark.slow
def test_call_and_response(example, trained, tmp_path, monkeypatch):
    """The other side hears all notes of the call and answers; what it has recorded is the call, note for note."""
    importlib.import_module("call_and_response").SILENCE = 0.5
    shown = example("call_and_response", "--seconds", 1.5, "--max-turn", 1, "--model", trained.run)
    notes = int(re.search(r"call: (\d+) notes", shown)[1])
    assert re.search(rf"you +{notes} notes", shown)
    assert "answer: " in shown
    assert len(read_notes(tmp_path / "example-output/call-and-response.mid")) >= notes


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("continue_midi", ["--model", "nowhere"]),
        ("convert_pytorch", ["nowhere.pt"]),
        ("draw_schedule", ["nowhere", "--layers", "4"]),
        ("horizon_schedule", ["--model", "nowhere"]),
        ("logits_processor", ["--model", "nowhere"]),
        ("stream_notes", ["--model", "nowhere"]),
        ("train_folder", ["nowhere"]),
    ],
)
def test_invalid_input_ends_with_one_line(monkeypatch, tmp_path, name, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with mock.patch.dict(FAMILIES), pytest.raises(SystemExit, match=rf"^{name}: error: .*nowhere") as ended:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert "\n" not in str(ended.value)


def test_the_commands_of_train_folder_have_folders_of_their_own():
    """A second corpus in the folder of the first is refused."""
    text = ast.get_docstring(ast.parse((EXAMPLES / "train_folder.py").read_text(encoding="utf-8")))
    commands = re.findall(r"^ *python examples/train_folder\.py.*", text, re.MULTILINE)
    folders = [re.findall(r"--out (\S+)", command) for command in commands]
    assert len({tuple(folder) for folder in folders}) == len(commands) == 3


def test_train_folder(example, tmp_path):
    """Trains, plays what it has learned, and called again goes on where it stopped, which is at the end."""
    settings = [word for setting in (*TINY, "horizons=uniform:8", "max_steps=3") for word in ("--set", setting)]
    arguments = ["--minutes", 1, "--seconds", 1, *settings, "--set", "eval_tokens=500", "--set", "sample_seconds=0"]
    midi = importlib.import_module("melodies").write_melodies(tmp_path / "midi")
    shown = example("train_folder", midi, *arguments, "--out", "out")
    assert re.search(r"corpus: \{'train': 6, 'validation': 1\}", shown)
    assert "the best so far" in shown
    assert "run: done" in shown
    before = (tmp_path / "out/music.mid").read_bytes()
    assert "validation" not in example("train_folder", midi, *arguments, "--out", "out").partition("run: done")[2]
    assert (tmp_path / "out/music.mid").read_bytes() == before


SMALLER = {
    "TAKES = 6 ": "TAKES = 1 ",
    "STEPS = 320 ": "STEPS = 2 ",
    "SECONDS = 20 ": "SECONDS = 1 ",
    '"tiny", ': '"tiny", d_model=16, n_heads=1, head_dim=16, d_ff=16, eval_tokens=500, ',
    "range(0, 600, size)": "range(0, 600 if size > 1 else 70, size)",
    "- expected,": "- expected[:, : 600 if size > 1 else 70],",
}


@pytest.mark.slow
def test_walkthrough(example, tmp_path, capsys):
    """All cells run, streaming is what the dense reference computes, and all pictures are drawn."""
    pytest.importorskip("matplotlib")
    source = (EXAMPLES / "walkthrough.py").read_text(encoding="utf-8")
    for text, smaller in SMALLER.items():
        assert source.count(text) == 1, text
        source = source.replace(text, smaller)
    exec(compile(source, "walkthrough.py", "exec"), {"__name__": "__main__"})
    shown = capsys.readouterr().out
    differences = [float(found) for found in re.findall(r"differs by (\S+) of", shown)]
    assert len(differences) == 4
    assert max(differences) < 1e-4
    assert len(set(re.findall(r"memory ([\d,]+) bytes", shown))) == 1
    drawn = {path.name for path in (tmp_path / "example-output/walkthrough").glob("*.png")}
    assert drawn == {"piece.png", "what-layers-see.png", "training.png", "context.png", "music.png"}
