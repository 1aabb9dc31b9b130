"""The report of a run: every figure in it is one of the metrics', and a run in any state has a report."""

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
from support.tiny import random_notes, tiny_config, write_corpus

from dsmr_mlx import UserError
from dsmr_mlx.cli import main, make_parser
from dsmr_mlx.common import charts
from dsmr_mlx.common.charts import Axis, round_ticks, smoothed, thinned
from dsmr_mlx.common.formatting import compact
from dsmr_mlx.model.checkpoint import load
from dsmr_mlx.music.midi import read_notes, write_notes
from dsmr_mlx.training.config import PRESETS, TrainConfig
from dsmr_mlx.training.report import make_report, write_report
from dsmr_mlx.training.run import train
from dsmr_mlx.training.run_record import read_metrics
from dsmr_mlx.training.settings import build_config, train_arguments

NOT_A_NUMBER, INFINITE = float("nan"), float("inf")


@pytest.fixture(scope="module")
def real_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    corpus = write_corpus(folder / "corpus")
    train(tiny_config(max_steps=45, eval_every=15, sample_seconds=2.0), corpus.path, folder / "run")
    return folder / "run"


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
    """Every element that is opened is closed, in order."""

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
    """The page as a tree, after what must hold for every report."""
    parser = WellFormed()
    parser.feed(page)
    assert not parser.open
    assert not parser.names & {"script", "link", "img", "iframe", "object", "embed"}
    assert not re.search(r"https?://|@import|url\(", page)
    tree = ET.fromstring(page)
    for node in tree.iter():
        for name, value in node.attrib.items():
            assert "nan" not in value.lower().split(), (node.tag, name, value)
            assert "inf" not in value.lower().split(), (node.tag, name, value)
            if node.tag == "path" and name == "d":
                assert re.fullmatch(r"[MLh0-9. \-]+", value)
    return tree


def words(tree: ET.Element) -> str:
    return " ".join("".join(node for node in tree.find("body").itertext()).replace("\u202f", " ").split())


def points(path: ET.Element) -> int:
    return len(re.findall("[ML]", path.get("d")))


def lines_of(tree: ET.Element, style: str) -> list[ET.Element]:
    return [path for path in tree.iter("path") if path.get("class") == f"line {style}"]


def figures_called(tree: ET.Element, title: str) -> ET.Element:
    (found,) = (f for f in tree.iter("figure") if f.find("figcaption/h3").text == title)
    return found


def test_the_figures_are_those_of_the_metrics(real_run):
    tree = checked(make_report(real_run))
    shown, metrics = words(tree), read_metrics(real_run)
    steps = [line for line in metrics if line["kind"] == "train"]
    validations = [line for line in metrics if line["kind"] == "validation"]
    best = min(validations, key=lambda line: line["nats_per_token"])
    assert f"validation perplexity{best['perplexity']:.3f}best, after step {best['step']}" in shown
    for line in validations:
        keys = ("perplexity", *(f"nats_per_{what}" for what in ("token", "event", "note", "second")))
        figures = (line[key] for key in keys)
        assert "".join(f"{figure:,.3f}" for figure in figures) in shown
    assert f"tokens trained{compact(steps[-1]['tokens'])}".replace("\u202f", " ") in shown
    rate = np.median([line["tokens_per_second"] for line in steps])
    assert f"throughput{rate:,.0f}tokens a second, median" in shown
    assert f"peak memory{max(line['peak_memory'] for line in steps) / 2**20:.1f} MiB" in shown
    recent = np.mean([line["loss"] for line in steps][-2:])
    assert f"training perplexity{np.exp(recent):.3f}over the last 2 steps" in shown
    assert f"training {recent:.3f}, validation {validations[-1]['nats_per_token']:.3f} at the end" in shown
    assert "Step 45, 100 % of max_steps = 45." in shown
    clipped = np.mean([line["gradient_norm"] > 1 for line in steps])
    assert f"clipped in {100 * clipped:.0f} % of the steps" in shown


def test_the_model_is_that_of_the_checkpoint(real_run):
    model, _ = load(real_run / "last")
    shown = words(checked(make_report(real_run)))
    assert f"({model.n_parameters:,}), 2 layers, width 16, 2 heads of 8, segment 8" in shown
    assert tiny_config().schedule.describe(2, 8, 4) in shown
    assert json.loads((real_run / "last" / "training.json").read_text())["corpus"] in shown


def test_samples_are_drawn_and_can_be_taken_out(real_run):
    tree = checked(make_report(real_run))
    for step in (15, 30, 45):
        path = real_run / "samples" / f"step-{step:08d}.mid"
        best = ", the best weights" if f"Step {step}, the best" in words(tree) else ""
        figure = figures_called(tree, f"Step {step}{best}")
        notes = read_notes(path)
        assert f"{len(notes)} notes in {notes.duration:.1f} s" in "".join(figure.itertext())
        drawn = sum(p.get("d").count("M") for p in figure.iter("path") if p.get("class") == "notes")
        assert drawn == len(notes)
        (link,) = figure.iter("a")
        assert link.get("download") == path.name
        header, _, data = link.get("href").partition(",")
        assert header == "data:audio/midi;base64"
        assert base64.b64decode(data) == path.read_bytes()


def test_horizons_are_bars_with_the_lowest_layer_at_the_bottom(real_run):
    figure = figures_called(checked(make_report(real_run)), "Memory horizons")
    low, high = [bar for bar in figure.iter("rect") if bar.get("class") == "memory"]
    assert float(low.get("y")) > float(high.get("y"))
    assert float(low.get("width")) == pytest.approx(3 * float(high.get("width")), abs=0.2)
    assert low.get("x") != high.get("x")


def test_curves_have_the_values_of_the_metrics(tmp_path):
    """The height of each point of the loss, read back with the help of two ticks of its axis."""
    losses = [4.0, 3.5, 3.0, 2.25, 2.0]
    run = hand_written(tmp_path / "run", [step_line(i + 1, loss=loss) for i, loss in enumerate(losses)])
    svg = figures_called(checked(make_report(run)), "Loss").findall("svg")[1]
    axis = [(float(t.text), float(t.get("y")) - 4) for t in svg.iter("text") if t.get("class") == "tick end"]
    (v0, y0), (v1, y1) = axis[0], axis[-1]
    (path,) = svg.iter("path")
    heights = [float(y) for _, y in re.findall(r"[ML](\S+) (\S+?)(?=L|$)", path.get("d"))]
    found = [v0 + (y - y0) * (v1 - v0) / (y1 - y0) for y in heights]
    np.testing.assert_allclose(found, losses, atol=0.01)


@pytest.mark.parametrize("schedule", ["none", "full:64", "custom:0,7", "uniform:3"])
def test_all_schedules_have_a_picture(tmp_path, schedule):
    checked(make_report(hand_written(tmp_path / "run", [], tiny_config(horizons=schedule))))


def test_a_deep_stack_has_a_picture(tmp_path):
    config = tiny_config(n_layers=100, horizons="linear:budget=12800,granularity=8")
    tree = checked(make_report(hand_written(tmp_path / "run", [], config)))
    assert sum(bar.get("class") == "memory" for bar in tree.iter("rect")) == 100


def test_a_run_in_any_state_has_a_report(tmp_path):
    nothing = words(checked(make_report(hand_written(tmp_path / "empty", []))))
    assert "No step is recorded yet." in nothing
    assert "No validation yet." in nothing
    assert "No samples." in nothing
    one = checked(make_report(hand_written(tmp_path / "one", [step_line(1)])))
    assert "5.000" in words(one)
    assert list(one.iter("circle"))
    only_validation = hand_written(tmp_path / "validation", [validation_line(10, 2.5)])
    assert "12.182best, after step 10" in words(checked(make_report(only_validation)))
    flat = [step_line(i, loss=2.0, perplexity=7.4, learning_rate=0.0, gradient_norm=0.0) for i in range(1, 60)]
    checked(make_report(hand_written(tmp_path / "flat", flat)))


def test_values_that_are_no_numbers_are_left_out_and_counted(tmp_path):
    lines = [step_line(i) for i in range(1, 9)]
    lines[3] |= {"loss": NOT_A_NUMBER, "perplexity": INFINITE, "gradient_norm": -INFINITE}
    lines[5] |= {"loss": None, "perplexity": "high", "tokens_per_second": 1e300, "learning_rate": True}
    lines += [{"kind": "train"}, {"kind": "other"}, validation_line(8, NOT_A_NUMBER), validation_line(9, 2.0)]
    lines += [validation_line(10, INFINITE)]
    run = hand_written(tmp_path / "run", lines)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('[]\n"text"\n{"kind": "train", "st')
    tree = checked(make_report(run))
    assert "Left out because not finite or not positive: 3 values." in words(figures_called_as_body(tree, "Loss"))
    assert f"{np.exp(2.0):.3f}best, after step 9" in words(tree)


def figures_called_as_body(tree: ET.Element, title: str) -> ET.Element:
    root = ET.Element("html")
    ET.SubElement(root, "body").append(figures_called(tree, title))
    return root


def test_loss_by_position_of_the_best_and_the_last(tmp_path):
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
    figure = figures_called(
        checked(make_report(hand_written(tmp_path / "run", lines))), "Loss by position in the piece"
    )
    told = [title.text.replace("\u202f", " ") for title in figure.iter("title")]
    assert told == [
        "last validation, step 3: 2.75 nats per token, 0–512",
        "last validation, step 3: 2.5 nats per token, 512–1 k",
        "best validation, step 2: 2.5 nats per token, 0–512",
        "best validation, step 2: 2.25 nats per token, 512–1 k",
        "best validation, step 2: 2 nats per token, 1 k on",
    ]
    old = hand_written(tmp_path / "old", lines[:1])
    assert "Not recorded by this run." in words(checked(make_report(old)))


def test_samples_that_cannot_be_drawn_say_why(tmp_path, monkeypatch):
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
    assert "Not drawn: symusic is not installed." in words(checked(make_report(run)))


def test_the_last_four_samples_and_the_best(tmp_path):
    run = hand_written(tmp_path / "run", [validation_line(i, 2.0 + abs(i - 2)) for i in range(1, 9)])
    (run / "samples").mkdir()
    for step in range(1, 9):
        write_notes(random_notes(step, 20), run / "samples" / f"step-{step:08d}.mid")
    shown = words(checked(make_report(run)))
    assert re.findall(r"Step (\d)(, the best weights)?\d+ notes", shown) == [
        *((str(step), "") for step in (8, 7, 6, 5)),
        ("2", ", the best weights"),
    ]


def test_a_long_sample_is_cut(tmp_path):
    run = hand_written(tmp_path / "run", [])
    (run / "samples").mkdir()
    write_notes(random_notes(0, 30_000), run / "samples" / "step-00000001.mid")
    page = make_report(run)
    tree = checked(page)
    assert "its beginning" in words(tree)
    assert not list(tree.iter("a"))
    assert len(page) < 200_000


def test_a_long_run_stays_small(tmp_path):
    rng = np.random.default_rng(0)
    losses = 2 + 3 * np.arange(1, 50_001) ** -0.3 + rng.normal(0, 0.1, 50_000)
    losses[31_234] = 9.75  # one spike, which must still be seen
    lines = [step_line(i + 1, loss=float(loss), perplexity=float(np.exp(loss))) for i, loss in enumerate(losses)]
    lines += [validation_line(i, 2.5) for i in range(1, 50_001, 25)]
    page = make_report(hand_written(tmp_path / "run", lines))
    assert len(page.encode()) < 500_000
    tree = checked(page)
    raw = lines_of(tree, "train raw")
    assert raw
    assert all(points(path) <= charts.MAX_POINTS for path in tree.iter("path"))
    assert all(points(path) > charts.MAX_POINTS / 3 for path in raw[:1])
    heights = [float(y) for _, y in re.findall(r"[ML](\S+) (\S+?)(?=L|$)", raw[0].get("d"))]
    assert min(heights) < 45  # at the top of the picture


@pytest.mark.parametrize("n", [1, 2, 599, 600, 601, 5000])
def test_thinned_lines_keep_ends_and_extremes(n):
    rng = np.random.default_rng(n)
    x, y = np.sort(rng.random(n)), rng.normal(size=n)
    a, b = thinned(x, y)
    assert len(a) == len(b) <= charts.MAX_POINTS
    assert (a[0], a[-1], b[0], b[-1]) == (x[0], x[-1], y[0], y[-1])
    assert (b.min(), b.max()) == (y.min(), y.max())
    assert set(zip(a, b, strict=True)) <= set(zip(x, y, strict=True))
    assert (np.diff(a) >= 0).all()
    if n <= charts.MAX_POINTS:
        np.testing.assert_array_equal(b, y)


def test_points_at_one_place_are_thinned_too():
    a, _ = thinned(np.ones(5000), np.arange(5000.0))
    assert len(a) <= charts.MAX_POINTS


@pytest.mark.parametrize("reach", [0, 1, 5])
def test_smoothing_is_a_mean_over_the_neighbours(reach):
    y = np.random.default_rng(reach).normal(size=37)
    reaches = [min(i // 4, reach) for i in range(len(y))]
    expected = [np.mean(y[i - r : i + r + 1]) for i, r in enumerate(reaches)]
    np.testing.assert_allclose(smoothed(y, reach), expected, atol=1e-12)
    assert smoothed(y, reach)[-1] == pytest.approx(y[-reach - 1 :].mean())


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [
        *((0, 1, False), (1.7, 7.1, False), (-3, 400, False), (0, 1e12, False), (2.0, 2.0001, False)),
        *((1e-3, 1e3, True), (1.9, 2.3, True), (1, 1e90, True), (4, 50, True)),
    ],
)
def test_ticks_are_few_and_inside(low, high, log):
    ticks = Axis("", low, high, log).ticks(6)
    assert 2 <= len(ticks) <= 6
    assert all(low - 1e-9 * abs(low) <= value <= high * (1 + 1e-9) for value, _ in ticks)
    assert len({label for _, label in ticks}) == len(ticks)


def test_ticks_are_round_and_look_alike():
    def texts(axis: Axis) -> str:
        return " ".join(label.replace("\u202f", "") for _, label in axis.ticks(6))

    assert round_ticks(0, 1, 6) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert texts(Axis("", 1.7, 7.1)) == "2 3 4 5 6 7"
    assert texts(Axis("", 0, 2.4e6)) == "0 0.5M 1.0M 1.5M 2.0M"
    assert texts(Axis("", 0, 14_000)) == "0 2.5k 5.0k 7.5k 10.0k 12.5k"
    assert texts(Axis("", -2048, 512)) == "−2,000 −1,500 −1,000 −500 0 500"
    assert texts(Axis("", 2000, 3e6, log=True)) == "10k 100k 1M"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *((0, "0"), (912.4, "912"), (999.6, "1 k"), (2.5e6, "2.5 M"), (4.1e8, "410 M"), (0.018, "0.018")),
        *((2e-5, "2 × 10⁻⁵"), (1e-4, "10⁻⁴"), (3.217e20, "3.22 × 10²⁰"), (-4200, "−4.2 k"), (float("nan"), "–")),
    ],
)
def test_numbers_for_people(value, shown):
    assert compact(value).replace("\u202f", " ") == shown


def test_names_cannot_break_the_page(tmp_path):
    name = "<script>alert('&amp;')<|script> \x07"
    run = hand_written(tmp_path / name, [step_line(1)])
    (run / "samples").mkdir()
    (run / "samples" / "step-00000001.mid").write_bytes(b"no music")
    page = make_report(run)
    tree = checked(page)
    assert "<script" not in page
    assert tree.find("body/main/header/h1").text == "<script>alert('&amp;')<|script> \ufffd"
    assert charts.text('\udcff<\u2028\x00"') == "\ufffd&lt;\u2028\ufffd&quot;"


@pytest.mark.parametrize(
    "config",
    [
        *(build_config(preset) for preset in PRESETS),
        build_config("base", max_tokens=10**9, seed=3, horizons="custom:" + ",".join(["128"] * 12)),
        build_config("small", n_heads=8, n_kv_heads=2, rope_dims=16, compile=True, eval_tokens=None, norm_eps=1e-6),
        build_config("tiny", max_minutes=1.5, dtype="bfloat16", min_learning_rate=1e-5),
        tiny_config(max_steps=7, max_tokens=100),
    ],
)
def test_the_command_makes_the_configuration_again(tmp_path, config):
    command = make_report_command(hand_written(tmp_path / "run", [], config))
    a = make_parser("train").parse_args(shlex.split(command.replace("\\\n", " "))[1:])
    limits = {name: getattr(a, name) for name in ("max_steps", "max_tokens", "max_minutes") if getattr(a, name)}
    assert build_config(a.preset, a.config, a.settings, None, **limits) == config


def make_report_command(run) -> str:
    return checked(make_report(run)).find(".//pre/code").text


def test_the_command_is_short():
    assert train_arguments(TrainConfig()) == ["--preset", "small"]
    assert train_arguments(build_config("base", n_heads=4)) == ["--preset", "base", "--set", "n_heads=4"]


def test_settings_that_are_not_the_default_stand_out(tmp_path):
    config = build_config("small", dropout=0.25)
    tree = checked(make_report(hand_written(tmp_path / "run", [], config)))
    marked = [[cell.text for cell in row] for row in tree.iter("tr") if row.get("class") == "marked"]
    assert ["dropout", "0.25"] in marked
    assert not any(name == "d_model" for name, *_ in marked)


@pytest.mark.parametrize("missing", ["config.json", "metrics.jsonl"])
def test_what_is_no_run_is_refused_naming_what_is_missing(tmp_path, missing):
    run = hand_written(tmp_path / "run", [])
    (run / missing).unlink()
    with pytest.raises(UserError, match=rf"run: not a training run, {missing} missing"):
        write_report(run)
    assert not (run / "report.html").exists()
    with pytest.raises(UserError, match="gone: no such folder"):
        make_report(tmp_path / "gone")


def test_a_configuration_that_is_not_valid_is_refused(tmp_path):
    run = hand_written(tmp_path / "run", [])
    (run / "config.json").write_text('{"wings": 2}')
    with pytest.raises(UserError, match=r"config\.json: unknown key wings"):
        make_report(run)


def test_where_a_report_goes(tmp_path):
    run = hand_written(tmp_path / "run", [step_line(1)])
    assert write_report(run) == run / "report.html"
    assert write_report(run) == run / "report.html"  # its own product
    other = tmp_path / "other.html"
    other.write_text("mine")
    with pytest.raises(UserError, match=r"other\.html: already exists, --force overwrites it"):
        write_report(run, other)
    assert other.read_text() == "mine"
    assert write_report(run, other, force=True).read_text(encoding="utf-8") == make_report(run)
    with pytest.raises(UserError, match=r"metrics\.jsonl: expected a name that ends in \.html"):
        write_report(run, run / "metrics.jsonl", force=True)
    with pytest.raises(UserError, match=r"no such folder .*nowhere"):
        write_report(run, tmp_path / "nowhere" / "a.html")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UserError, match=r"folder\.html: is a folder"):
        write_report(run, tmp_path / "folder.html", force=True)
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "metrics.jsonl", "report.html"]


def test_the_command_line(tmp_path, capsys):
    run = hand_written(tmp_path / "run", [step_line(1)])
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.startswith(f"{run / 'report.html'}: ")
    out = tmp_path / "other.html"
    assert main(["report", str(run), "--out", str(out)]) == 0
    assert main(["report", str(run), "--out", str(out)]) == 2
    assert main(["report", str(run), "--out", str(out), "--force"]) == 0
    capsys.readouterr()
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error == f"dsmr-mlx: error: {tmp_path}: not a training run, config.json and metrics.jsonl missing\n"


def test_the_same_run_gives_the_same_bytes(real_run):
    assert make_report(real_run) == make_report(real_run)


def test_a_report_needs_no_mlx(tmp_path):
    run = hand_written(tmp_path / "run", [step_line(1)])
    code = "import sys; sys.modules['mlx'] = None; from dsmr_mlx.training.report import write_report; write_report(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(run)], check=True)
    assert (run / "report.html").is_file()
