"""The report of a run: its figures are those of the metrics, and a run in any state has a report."""

import base64
import json
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from support.music import random_notes
from support.svg import tick_labels
from support.tiny import tiny_config, write_corpus

from dsmr_mlx import UserError
from dsmr_mlx.cli import main, make_parser
from dsmr_mlx.common.formatting import format_bytes, format_number
from dsmr_mlx.common.html import text
from dsmr_mlx.common.plotting import DARK, LIGHT
from dsmr_mlx.model.checkpoint import load
from dsmr_mlx.music.midi import read_notes, write_notes
from dsmr_mlx.training.config import PRESETS, TrainConfig
from dsmr_mlx.training.report import make_report, reproduction, write_report
from dsmr_mlx.training.report_curves import MAX_POINTS
from dsmr_mlx.training.run import train
from dsmr_mlx.training.run_record import RunRecord, read_metrics
from dsmr_mlx.training.settings import build_config, train_arguments

NOT_A_NUMBER, INFINITE = float("nan"), float("inf")


@pytest.fixture(scope="module")
def real_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    corpus = write_corpus(folder / "corpus")
    train(tiny_config(max_steps=45, eval_every=15, sample_seconds=1.0), corpus.path, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def real_report(real_run):
    return make_report(real_run)


def step_line(step: int, **values) -> dict:
    line = {
        "step": step,
        "tokens": 1000 * step,
        "epoch": step / 10,
        "loss": 5.0 / step**0.2,
        "learning_rate": 1e-3,
        "gradient_norm": 2.0,
        "tokens_per_second": 500.0 + step % 7,
        "peak_memory": 300 << 20,
        "seconds": 2.0 * step,
    }
    return {"kind": "train", "perplexity": float(np.exp(line["loss"])), **line, **values}


def validation_line(step: int, loss: float, **values) -> dict:
    figures = {"perplexity": float(np.exp(loss)), "nats_per_token": loss, "nats_per_note": 3 * loss}
    rest = {"nats_per_second": 20 * loss, "tokens": 900, "pieces": 3}
    return {"kind": "validation", "step": step, "trained_tokens": 1000 * step, **figures, **rest, **values}


def hand_written(folder, lines, config=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text((config or tiny_config()).to_json())
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


class WellFormed(HTMLParser):
    """Check that every opened element is closed, in order."""

    def __init__(self):
        super().__init__()
        self.open, self.names = [], set()

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.names.add(tag)

    def handle_startendtag(self, tag, attrs):
        self.names.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def checked(page: str) -> ET.Element:
    """Return the page as a tree, after the checks that hold for every report."""
    parser = WellFormed()
    parser.feed(page)
    assert not parser.open
    assert not parser.names & {"script", "link", "img", "iframe", "object", "embed"}
    assert not re.search(r"https?://|@import|url\((?!#)", page)
    tree = ET.fromstring(page)
    for node in tree.iter():
        for name, value in node.attrib.items():
            assert "nan" not in value.lower().split(), (node.tag, name, value)
            assert "inf" not in value.lower().split(), (node.tag, name, value)
            if node.tag == "path" and name == "d":
                assert re.fullmatch(r"[MLCQz0-9. \n\-]+", value)
    return tree


def words(tree: ET.Element) -> str:
    return " ".join("".join(node for node in tree.find("body").itertext()).replace("\u202f", " ").split())


def points(path: ET.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path.get("d"))]


def paths_of(tree: ET.Element, paint: str, colour: str, opacity: str | None = None) -> list[ET.Element]:
    """Return the paths drawn or filled with a named colour, without those in definitions."""
    found = [path for path in tree.iter("path") if f"{paint}: {LIGHT[colour]}" in path.get("style", "")]
    wanted = f"stroke-opacity: {opacity}" if opacity else ""
    return [path for path in found if "id" not in path.attrib and wanted in path.get("style")]


def figure_named(tree: ET.Element, title: str) -> ET.Element:
    (found,) = (f for f in tree.iter("figure") if f.find("figcaption/h3").text == title)
    return found


@pytest.mark.slow
def test_figures_equal_the_metrics(real_run, real_report):
    tree = checked(real_report)
    shown, metrics = words(tree), read_metrics(real_run)
    steps = [line for line in metrics if line["kind"] == "train"]
    validations = [line for line in metrics if line["kind"] == "validation"]
    best = min(validations, key=lambda line: line["nats_per_token"])
    assert f"validation perplexity{best['perplexity']:.3f}best, after step {best['step']}" in shown
    for line in validations:
        keys = ("perplexity", *(f"nats_per_{what}" for what in ("token", "event", "note", "second")))
        figures = (line[key] for key in keys)
        assert "".join(f"{figure:,.3f}" for figure in figures) in shown
    assert f"tokens trained{format_number(steps[-1]['tokens'])}".replace("\u202f", " ") in shown
    rate = np.median([line["tokens_per_second"] for line in steps])
    assert f"throughput{rate:,.0f}tokens a second, median" in shown
    assert f"peak memory{format_bytes(max(line['peak_memory'] for line in steps))}" in shown
    recent = np.mean([line["loss"] for line in steps][-2:])
    assert f"training perplexity{np.exp(recent):.3f}over the last 2 steps" in shown
    assert f"training {recent:.3f}, validation {validations[-1]['nats_per_token']:.3f} at the end" in shown
    assert "Step 45, 100 % of max_steps = 45." in shown
    clipped = np.mean([line["gradient_norm"] > 1 for line in steps])
    assert f"clipped in {100 * clipped:.0f} % of the steps" in shown


@pytest.mark.slow
def test_the_model_is_described_from_the_checkpoint(real_run, real_report):
    model, _ = load(real_run / "last")
    shown = words(checked(real_report))
    assert f"({model.n_parameters:,}), 2 layers, width 16, 2 heads of 8, segment 8" in shown
    assert tiny_config().schedule.describe(2, 8, 4) in shown
    assert json.loads((real_run / "last" / "training.json").read_text())["corpus"] in shown


@pytest.mark.slow
def test_samples_are_drawn_and_embedded(real_run, real_report):
    tree = checked(real_report)
    for step in (15, 30, 45):
        path = real_run / "samples" / f"step-{step:08d}.mid"
        best = ", the best weights" if f"Step {step}, the best" in words(tree) else ""
        figure = figure_named(tree, f"Step {step}{best}")
        notes = read_notes(path)
        assert f"{len(notes)} notes in {notes.duration:.1f} s" in "".join(figure.itertext())
        drawn = sum(path.get("d").count("M") for path in paths_of(figure, "stroke", "train"))
        assert drawn == len(notes)
        (link,) = figure.iter("a")
        assert link.get("download") == path.name
        header, _, data = link.get("href").partition(",")
        assert header == "data:audio/midi;base64"
        assert base64.b64decode(data) == path.read_bytes()


@pytest.mark.slow
def test_horizons_are_bars_with_the_lowest_layer_at_the_bottom(real_report):
    figure = figure_named(checked(real_report), "Memory horizons")
    low, high = (np.array(points(bar)) for bar in paths_of(figure, "fill", "train"))
    assert low[:, 1].min() > high[:, 1].max()
    assert np.ptp(low[:, 0]) == pytest.approx(3 * np.ptp(high[:, 0]), abs=0.2)
    assert low[:, 0].min() != high[:, 0].min()
    assert low[:, 0].max() == high[:, 0].max()  # where the segment begins


@pytest.mark.slow
def test_curves_show_the_values_of_the_metrics(tmp_path):
    """The value of each point of the loss is read back with the grid lines and their labels."""
    losses = [4.0, 3.5, 3.0, 2.25, 2.0]
    run = hand_written(tmp_path / "run", [step_line(i + 1, loss=loss) for i, loss in enumerate(losses)])
    for svg in figure_named(checked(make_report(run)), "Loss").findall("svg"):
        labels = [float(label) for label in tick_labels(svg, "end") if label != "tokens"]
        heights = [points(line)[0][1] for line in paths_of(svg, "stroke", "grid")]
        (path,) = paths_of(svg, "stroke", "train")
        assert len(labels) == len(heights) >= 3
        slope = (labels[-1] - labels[0]) / (heights[-1] - heights[0])
        found = [labels[0] + (y - heights[0]) * slope for _, y in points(path)]
        np.testing.assert_allclose(found, losses, atol=0.01)


@pytest.mark.parametrize("schedule", ["none", "full:64", "custom:0,7", "uniform:3"])
def test_every_schedule_is_drawn(tmp_path, schedule):
    checked(make_report(hand_written(tmp_path / "run", [], tiny_config(horizons=schedule))))


def test_a_deep_stack_is_drawn(tmp_path):
    config = tiny_config(n_layers=100, horizons="linear:budget=12800,granularity=8")
    tree = checked(make_report(hand_written(tmp_path / "run", [], config)))
    assert len(paths_of(tree, "fill", "train")) == 100


@pytest.mark.slow
def test_a_run_in_any_state_has_a_report(tmp_path):
    nothing = words(checked(make_report(hand_written(tmp_path / "empty", []))))
    assert "No step is recorded yet." in nothing
    assert "No validation yet." in nothing
    assert "No samples." in nothing
    one = checked(make_report(hand_written(tmp_path / "one", [step_line(1)])))
    assert "5.000" in words(one)
    throughput = figure_named(one, "Throughput")
    assert len(list(throughput.iter("use"))) == len(tick_labels(throughput, "middle")) + 1  # ticks and a dot
    only_validation = hand_written(tmp_path / "validation", [validation_line(10, 2.5)])
    assert "12.182best, after step 10" in words(checked(make_report(only_validation)))
    flat = [step_line(i, loss=2.0, perplexity=7.4, learning_rate=0.0, gradient_norm=0.0) for i in range(1, 60)]
    checked(make_report(hand_written(tmp_path / "flat", flat)))


def test_values_that_are_not_finite_are_left_out_and_counted(tmp_path):
    lines = [step_line(i) for i in range(1, 9)]
    lines[3] |= {"loss": NOT_A_NUMBER, "perplexity": INFINITE, "gradient_norm": -INFINITE}
    lines[5] |= {"loss": None, "perplexity": "high", "tokens_per_second": 1e300, "learning_rate": True}
    lines += [{"kind": "train"}, {"kind": "other"}, validation_line(8, NOT_A_NUMBER), validation_line(9, 2.0)]
    lines += [validation_line(10, INFINITE)]
    run = hand_written(tmp_path / "run", lines)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('[]\n"text"\n{"kind": "train", "st')
    tree = checked(make_report(run))
    assert "Left out because not finite or not positive: 3 values." in words(figure_as_body(tree, "Loss"))
    assert f"{np.exp(2.0):.3f}best, after step 9" in words(tree)


def figure_as_body(tree: ET.Element, title: str) -> ET.Element:
    root = ET.Element("html")
    ET.SubElement(root, "body").append(figure_named(tree, title))
    return root


@pytest.mark.slow
def test_loss_by_position_shows_the_best_and_the_last_validation(tmp_path):
    def rows(*losses):
        edges = ((0, 512), (512, 1024), (1024, None))
        return [
            {"start": a, "end": b, "tokens": 9, "nats_per_token": x} for (a, b), x in zip(edges, losses, strict=False)
        ]

    lines = [
        validation_line(1, 3.0),
        validation_line(2, 2.0, by_position=rows(2.5, 2.25, 2.0)),
        validation_line(3, 2.1, by_position=[*rows(2.75, 2.5), "?", {"start": 4, "end": 5, "nats_per_token": None}]),
    ]
    figure = figure_named(checked(make_report(hand_written(tmp_path / "run", lines))), "Loss by position in the piece")
    assert [item.text or "".join(item.itertext()).strip() for item in figure.iter("li")] == [
        "last validation, step 3",
        "best validation, step 2",
    ]
    assert "from 2.500 at the start to 2.000 at 1\u202fk on tokens" in "".join(figure.itertext())
    assert tick_labels(figure, "middle") == ["0–512", "512–1\u202fk", "1\u202fk on"]
    (last,), (best,) = ([points(p) for p in paths_of(figure, "stroke", c)] for c in ("train", "validation"))
    assert len(last) == 2
    assert len(best) == 3
    assert last[0][0] == best[0][0]
    assert last[1][1] == best[0][1]  # 2.5 nats each
    assert last[0][1] < last[1][1] < best[1][1] < best[2][1]
    old = hand_written(tmp_path / "old", lines[:1])
    assert "Not recorded by this run." in words(checked(make_report(old)))


@pytest.mark.slow
def test_a_sample_that_cannot_be_drawn_shows_the_reason(tmp_path, monkeypatch):
    run = hand_written(tmp_path / "run", [validation_line(i, 3.0 - i / 10) for i in range(1, 4)])
    (run / "samples").mkdir()
    np.save(run / "samples" / "step-00000001.npy", np.arange(4))
    (run / "samples" / "step-00000002.mid").write_bytes(b"no music")
    (run / "samples" / "notes.txt").write_text("not a sample")
    shown = words(checked(make_report(run)))
    assert "Token ids only: the machine that trained has no MIDI library." in shown
    assert "Not drawn: not a readable MIDI file" in shown
    write_notes(random_notes(0, 9), run / "samples" / "step-00000003.mid")
    monkeypatch.setitem(sys.modules, "symusic", None)
    assert "9 notes" in words(checked(make_report(run)))


@pytest.mark.slow
def test_the_last_four_samples_and_the_best_are_shown(tmp_path):
    run = hand_written(tmp_path / "run", [validation_line(i, 2.0 + abs(i - 2)) for i in range(1, 9)])
    (run / "samples").mkdir()
    for step in range(1, 9):
        write_notes(random_notes(step, 20), run / "samples" / f"step-{step:08d}.mid")
    shown = words(checked(make_report(run)))
    assert re.findall(r"Step (\d)(, the best weights)?\d+ notes", shown) == [
        *((str(step), "") for step in (8, 7, 6, 5)),
        ("2", ", the best weights"),
    ]


def test_a_long_sample_is_shortened(tmp_path):
    run = hand_written(tmp_path / "run", [])
    (run / "samples").mkdir()
    write_notes(random_notes(0, 30_000), run / "samples" / "step-00000001.mid")
    page = make_report(run)
    tree = checked(page)
    assert "its beginning" in words(tree)
    assert not list(tree.iter("a"))
    assert len(page) < 200_000


@pytest.mark.slow
def test_a_long_run_stays_small(tmp_path):
    rng = np.random.default_rng(0)
    losses = 2 + 3 * np.arange(1, 10_001) ** -0.3 + rng.normal(0, 0.1, 10_000)
    losses[6_234] = 9.75  # a spike, which must stay visible
    lines = [step_line(i + 1, loss=float(loss), perplexity=float(np.exp(loss))) for i, loss in enumerate(losses)]
    lines += [validation_line(i, 2.5) for i in range(1, 10_001, 5)]
    page = make_report(hand_written(tmp_path / "run", lines))
    assert len(page.encode()) < 500_000
    tree = checked(page)
    raw = paths_of(figure_named(tree, "Loss"), "stroke", "train", opacity="0.4")
    assert all(len(points(path)) <= MAX_POINTS for path in tree.iter("path"))
    assert len(raw) == 2
    for path in raw:
        assert len(points(path)) > MAX_POINTS / 3
        heights = [y for _, y in points(path)]
        assert min(heights) < 40  # the spike, at the top of the picture


def test_names_are_escaped(tmp_path):
    name = "<script>alert('&amp;')<|script> \x07"
    run = hand_written(tmp_path / name, [step_line(1)])
    (run / "samples").mkdir()
    (run / "samples" / "step-00000001.mid").write_bytes(b"no music")
    page = make_report(run)
    tree = checked(page)
    assert "<script" not in page
    assert tree.find("body/main/header/h1").text == "<script>alert('&amp;')<|script> \ufffd"
    assert text('\udcff<\u2028\x00"') == "\ufffd&lt;\u2028\ufffd&quot;"


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        *(build_config(preset) for preset in PRESETS),
        build_config("base", max_tokens=10**9, seed=3, horizons="custom:" + ",".join(["128"] * 12)),
        build_config("small", n_heads=8, n_kv_heads=2, rope_dims=16, compile=True, eval_tokens=None, norm_eps=1e-6),
        build_config("tiny", max_minutes=1.5, dtype="bfloat16", min_learning_rate=1e-5),
        build_config("small", optimizer="muon", adamw_learning_rate=1e-3, lr_schedule="wsd", cooldown=0.5),
        tiny_config(max_steps=7, max_tokens=100),
    ],
)
def test_the_command_repeats_the_configuration(tmp_path, config):
    command = command_in(reproduction(RunRecord.read(hand_written(tmp_path / "run", [], config))))
    a = make_parser("train").parse_args(shlex.split(command.replace("\\\n", " "))[1:])
    limits = {name: getattr(a, name) for name in ("max_steps", "max_tokens", "max_minutes") if getattr(a, name)}
    assert build_config(a.preset, a.config, a.settings, None, **limits) == config


def command_in(page: str) -> str:
    return ET.fromstring(page).find(".//pre/code").text


@pytest.mark.slow
def test_the_command_is_in_the_report(real_run, real_report):
    assert command_in(real_report) == command_in(reproduction(RunRecord.read(real_run)))


def test_the_command_is_short():
    assert train_arguments(TrainConfig()) == ["--preset", "small"]
    assert train_arguments(build_config("base", n_heads=4)) == ["--preset", "base", "--set", "n_heads=4"]


def test_settings_other_than_the_default_are_marked(tmp_path):
    config = build_config("small", dropout=0.25)
    tree = checked(make_report(hand_written(tmp_path / "run", [], config)))
    marked = [[cell.text for cell in row] for row in tree.iter("tr") if row.get("class") == "marked"]
    assert ["dropout", "0.25"] in marked
    assert not any(name == "d_model" for name, *_ in marked)


@pytest.mark.parametrize("missing", ["config.json", "metrics.jsonl"])
def test_a_folder_that_is_not_a_run_is_an_error_that_names_missing_files(tmp_path, missing):
    run = hand_written(tmp_path / "run", [])
    (run / missing).unlink()
    with pytest.raises(UserError, match=rf"run: not a training run, {missing} missing"):
        write_report(run)
    assert not (run / "report.html").exists()
    with pytest.raises(UserError, match="gone: no such folder"):
        make_report(tmp_path / "gone")


def test_an_invalid_configuration_is_an_error(tmp_path):
    run = hand_written(tmp_path / "run", [])
    (run / "config.json").write_text('{"wings": 2}')
    with pytest.raises(UserError, match=r"config\.json: unknown key wings"):
        make_report(run)


@pytest.mark.slow
def test_the_path_of_a_report(tmp_path):
    run = hand_written(tmp_path / "run", [step_line(1)])
    assert write_report(run) == run / "report.html"
    assert write_report(run) == run / "report.html"  # its own product
    page = (run / "report.html").read_text(encoding="utf-8")
    other = tmp_path / "other.html"
    other.write_text("mine")
    with pytest.raises(UserError, match=r"other\.html: already exists, `force` overwrites it"):
        write_report(run, other)
    assert other.read_text() == "mine"
    assert write_report(run, other, force=True).read_text(encoding="utf-8") == page
    with pytest.raises(UserError, match=r"metrics\.jsonl: expected a name that ends in \.html"):
        write_report(run, run / "metrics.jsonl", force=True)
    with pytest.raises(UserError, match=r"no such folder .*nowhere"):
        write_report(run, tmp_path / "nowhere" / "a.html")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UserError, match=r"folder\.html: is a folder"):
        write_report(run, tmp_path / "folder.html", force=True)
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "metrics.jsonl", "report.html"]


@pytest.mark.slow
def test_the_command_line(tmp_path, capsys):
    run = hand_written(tmp_path / "run", [step_line(1)])
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.startswith(f"{run / 'report.html'}: ")
    out = tmp_path / "other.html"
    out.write_text("mine")
    assert main(["report", str(run), "--out", str(out)]) == 2
    assert main(["report", str(run), "--out", str(out), "--force"]) == 0
    capsys.readouterr()
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error == f"dsmr-mlx: error: {tmp_path}: not a training run, config.json and metrics.jsonl missing\n"


@pytest.mark.slow
def test_the_same_run_gives_the_same_bytes(real_run, real_report):
    assert make_report(real_run) == real_report


@pytest.mark.slow
def test_a_report_needs_no_mlx(tmp_path):
    run = hand_written(tmp_path / "run", [step_line(1)])
    code = (
        "import sys; sys.modules['mlx'] = None; from dsmr_mlx.training.report import write_report; "
        "write_report(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(run)], check=True)
    assert (run / "report.html").is_file()


def test_a_report_without_matplotlib_says_what_to_install(tmp_path, capsys, monkeypatch):
    run = hand_written(tmp_path / "run", [step_line(1)])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["report", str(run)]) == 2
    error = capsys.readouterr().err
    assert "matplotlib is not installed, expected `pip install 'dsmr-mlx[plot]'`" in error
    assert error.count("\n") == 1
    assert not (run / "report.html").exists()


def test_pictures_follow_the_color_scheme(tmp_path):
    page = make_report(hand_written(tmp_path / "run", [step_line(1), step_line(2)]))
    dark = " ".join(re.findall(r"@media screen and \(prefers-color-scheme: dark\) \{(.*?)\}</style>", page, re.DOTALL))
    for use, name in (("stroke", "train"), ("stroke", "grid"), ("fill", "muted"), ("fill", "paper")):
        assert f'[style*="{use}: {LIGHT[name]}"] {{ {use}: {DARK[name]} !important; }}' in dark
