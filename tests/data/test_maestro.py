"""MAESTRO v1, v2 and v3 and other tables of files: official splits are taken, and works that they share are named."""

import codecs
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.maestro import COLUMNS, ROWS, csv_table, json_columns, json_rows, write_maestro
from support.midi_files import tune, write_midi_files
from support.processes import cpu_seconds

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.corpus import Corpus, work_key
from dsmr_mlx.data.encode import choose_workers
from dsmr_mlx.data.midi_folder import choose_splits, discover_files
from dsmr_mlx.data.prepare import prepare
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer

SHARED = [*ROWS, ("Bach", "FUGUE,  in C ", "test", "2009/e.midi"), ("Liszt", 'Ballade "2"', "train", "2009/f.midi")]
WARNING = """\
warning: 2 works in several of the official splits:
  Bach, Fugue, in C (2 train, 1 test)
  Liszt, Ballade "2" (1 train, 1 validation)
"""


def rows_of(corpus):
    return [(piece.composer, piece.title, piece.split, piece.source) for piece in corpus.pieces()]


def test_corpus_of_maestro(tmp_path):
    report = prepare(write_maestro(tmp_path / "midi"), tmp_path / "out")
    corpus = Corpus.load(tmp_path / "out")
    assert rows_of(corpus) == ROWS
    assert report.pieces == {"train": 2, "validation": 1, "test": 1}
    assert (report.tokens, report.notes, report.skipped) == (corpus.n_tokens, 80, [])
    assert (report.shared_works, corpus.origin["shared_works"]) == ([], [])
    assert report.seconds == sum(piece.duration for piece in corpus.pieces())
    for seed, piece in enumerate(corpus.pieces()):
        assert np.array_equal(corpus.tokens(piece), PerformanceTokenizer().encode(tune(seed)))
        assert piece.notes == 20
    corpus.verify()
    assert prepare(tmp_path / "midi", tmp_path / "out", seed=7, validation_fraction=0.5, strict_splits=True).up_to_date


def crlf(table):
    return table.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")


EXTRA = [{**row, "note": None, "tags": ["a"]} for row in json.loads(json_rows(ROWS))]
TABLES = {
    "v1": {"maestro-v1.0.0.csv": csv_table(ROWS), "maestro-v1.0.0.json": json_rows(ROWS)},
    "v1 json": {"maestro-v1.0.0.json": json_rows(ROWS)},
    "v2 json": {"maestro-v2.0.0.json": json_rows(ROWS)},
    "v3": {"maestro-v3.0.0.csv": csv_table(ROWS), "maestro-v3.0.0.json": json_columns(ROWS)},
    "v3 json": {"maestro-v3.0.0.json": json_columns(ROWS)},
    "csv of unix": {"maestro-v3.0.0.csv": csv_table(ROWS).replace(b"\r\n", b"\n")},
    "csv with a BOM": {"maestro-v3.0.0.csv": codecs.BOM_UTF8 + crlf(csv_table(ROWS))},
    "json with a BOM": {"maestro-v3.0.0.json": codecs.BOM_UTF8 + json_columns(ROWS)},
    "empty lines": {"maestro-v3.0.0.csv": csv_table(ROWS).replace(b"\r\n", b"\r\n\r\n") + b"\r\n"},
    "other order": {"maestro-v3.0.0.csv": csv_table(ROWS, ["duration", *COLUMNS[:-1][::-1]])},
    "few columns": {"maestro-v3.0.0.csv": csv_table(ROWS, [*COLUMNS[:3], "midi_filename"])},
    "more columns": {
        "maestro-v3.0.0.csv": b"".join(b"%d,%s" % (i, line) for i, line in enumerate(csv_table(ROWS).splitlines(True)))
    },
    "long rows": {"maestro-v3.0.0.csv": csv_table(ROWS).replace(b".wav,1.5", b".wav,1.5,more,and more")},
    "more fields": {"maestro-v2.0.0.json": json.dumps(EXTRA).encode()},
    "more json columns": {"maestro-v3.0.0.json": json.dumps(json.loads(json_columns(ROWS)) | {"about": 3}).encode()},
    "metadata.csv": {"metadata.csv": csv_table(ROWS)},
}


@pytest.mark.parametrize("tables", TABLES.values(), ids=TABLES)
def test_every_form_of_the_table(tmp_path, tables):
    found = discover_files(write_maestro(tmp_path, tables=tables))
    assert [(entry.composer, entry.title, entry.split, entry.source) for entry in found.entries] == ROWS
    assert (found.metadata, found.skipped, found.has_splits) == (next(iter(tables)), [], True)


def spelled(source: str, choices: list[str]) -> str:
    """The path with other separators."""
    first, *parts = source.split("/")
    return "./" * (len(choices) % 2) + first + "".join(c + part for c, part in zip(choices, parts, strict=False))


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(["/", "//", "/./", "/.//./"]), min_size=1, max_size=2), min_size=4, max_size=4)
)
def test_paths_may_be_spelled_in_any_way(choices):
    rows = [(*row[:3], spelled(row[3], choice)) for row, choice in zip(ROWS, choices, strict=True)]
    again = [(*row[:3], f".//{row[3]}") for row in ROWS[:2]]
    with TemporaryDirectory() as name:
        folder = write_maestro(Path(name), tables={"maestro-v3.0.0.csv": csv_table([*rows, *again])})
        found = discover_files(folder)
    assert [entry.source for entry in found.entries] == [row[3] for row in ROWS]
    twice = [(row[3], "named twice in maestro-v3.0.0.csv") for row in ROWS[:2]]
    assert [(entry.source, entry.reason) for entry in found.skipped] == twice


@pytest.mark.parametrize("source", ["../x.midi", "2004/../2004/a.midi", "./../midi/2004/a.midi", "/2004/a.midi"])
def test_paths_outside_the_folder_are_skipped(tmp_path, source):
    rows = [*ROWS[1:], ("X", "out", "train", source)]
    folder = write_maestro(tmp_path / "midi", tables={"maestro-v3.0.0.csv": csv_table(rows)})
    assert [(entry.source, entry.reason) for entry in discover_files(folder).skipped] == [
        (source, "outside the folder"),
        ("2004/a.midi", "not in maestro-v3.0.0.csv"),
    ]


def test_a_broken_link_is_skipped_once(tmp_path):
    """As in a clone of a git-annex repository without the files."""
    folder = write_maestro(tmp_path)
    (folder / "2006/c.midi").unlink()
    (folder / "2006/c.midi").symlink_to("../.git/annex/objects/none.midi")
    assert [(entry.source, entry.reason) for entry in discover_files(folder).skipped] == [
        ("2006/c.midi", "named in maestro-v3.0.0.csv, but there is no such file")
    ]


HEADERS = [
    '"composer", "title", "midi_filename"',
    '"composer" ,"title" , "midi_filename"',
    "composer,\ttitle ,midi_filename",
]


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_spaces_and_quotes_in_a_metadata_csv(tmp_path, header, end):
    table = f'{header}{end}"Bach", "Aria, in G", "a.mid"{end}Bach ,Aria,b.mid{end}'
    found = discover_files(write_midi_files(tmp_path, {"a.mid": b"", "b.mid": b"", "metadata.csv": table.encode()}))
    assert [(entry.composer, entry.title, entry.source) for entry in found.entries] == [
        ("Bach", "Aria, in G", "a.mid"),
        ("Bach", "Aria", "b.mid"),
    ]


INVALID = {
    "no json": ("maestro-v3.0.0.json", b"<html>", "not a table in MAESTRO's form"),
    "json of numbers": ("maestro-v3.0.0.json", b"[1, 2]", "not a table in MAESTRO's form"),
    "json null": ("maestro-v3.0.0.json", b"null", "not a table in MAESTRO's form"),
    "empty json": ("maestro-v3.0.0.json", b"{}", r"columns canonical_composer, .* are missing, .*\(found none\)"),
    "ragged json": (
        "maestro-v3.0.0.json",
        json_columns(ROWS).replace(b'"3": "2006/d.midi"', b'"9": "2006/d.midi"'),
        r"not a table in MAESTRO's form \(KeyError: '3'\)",
    ),
    "semicolons": ("maestro-v3.0.0.csv", b"canonical_composer;split\n", r"\(found canonical_composer;split\)"),
    "Latin-1": ("maestro-v3.0.0.csv", csv_table(ROWS).decode().encode("latin-1"), "not a table .*utf-8"),
    "short row": ("maestro-v3.0.0.csv", csv_table(ROWS) + b"Bach\r\n", r"row 5 has split ''"),
    "null split": ("maestro-v2.0.0.json", json_rows(ROWS).replace(b'"test"', b"null"), "row 3 has split ''"),
    "no splits": ("maestro-v3.0.0.csv", csv_table(ROWS, [*COLUMNS[:2], "midi_filename"]), "columns split are missing"),
    "a name of two lines": (
        "metadata.csv",
        b'composer,title,"midi_filename\nx"\nBach,Aria,a.mid\n',
        "columns midi_filename are missing, expected those of MAESTRO or ASAP",
    ),
    "a split missing": ("metadata.csv", csv_table(ROWS).replace(b",test,", b",,"), "row 3 has split ''"),
}


@pytest.mark.parametrize(("name", "table", "reason"), INVALID.values(), ids=INVALID)
def test_invalid_tables_are_named(tmp_path, name, table, reason):
    with pytest.raises(UserError, match=reason) as caught:
        discover_files(write_maestro(tmp_path, tables={name: table}))
    message = str(caught.value)
    assert message.startswith(str(tmp_path / name))
    assert "\n" not in message


def test_works_in_several_official_splits_are_taken_and_named(run, tmp_path):
    folder = write_maestro(tmp_path / "midi", SHARED)
    shown = run("prepare", folder, "--out", "corpus")
    assert (shown.code, shown.err) == (0, WARNING)
    assert shown.out.startswith("corpus: 3 train, 1 validation, 2 test\n")
    assert Corpus.load("corpus").origin["shared_works"] == [
        {"composer": "Bach", "title": "Fugue, in C", "files": {"train": 2, "test": 1}},
        {"composer": "Liszt", "title": 'Ballade "2"', "files": {"train": 1, "validation": 1}},
    ]
    assert run("prepare", folder, "--out", "corpus").err == WARNING  # also if it is up to date
    strict = run("prepare", folder, "--out", "strict", "--strict-splits")
    assert (strict.code, strict.out) == (2, "")
    assert strict.err.endswith(
        "maestro-v3.0.0.csv: expected every work in one split, 2 in several: "
        'Bach, Fugue, in C (2 train, 1 test); Liszt, Ballade "2" (1 train, 1 validation)\n'
    )


def test_only_files_that_are_there_share_a_work(tmp_path):
    folder = write_maestro(tmp_path / "midi", SHARED)
    for name in ("2009/e.midi", "2009/f.midi"):
        (folder / name).unlink()
    report = prepare(folder, tmp_path / "out", strict_splits=True)
    assert report.shared_works == []
    assert [entry.source for entry in report.skipped] == ["2009/e.midi", "2009/f.midi"]


def test_many_files_missing_for_one_reason_are_summarized(run, tmp_path):
    """As when MAESTRO's test part is left out."""
    missing = [("Bach", f"No. {i}", "test", f"2018/{i}.midi") for i in range(40)]
    folder = write_maestro(tmp_path / "midi", tables={"maestro-v3.0.0.csv": csv_table([*ROWS, *missing])})
    (folder / "2006/c.midi").write_bytes(b"bad")
    shown = run("prepare", folder, "--out", "corpus")
    assert shown.err.splitlines() == [
        "skipped 40 files (2018/0.midi, …; all in corpus/corpus.json): "
        "named in maestro-v3.0.0.csv, but there is no such file",
        "skipped 2006/c.midi: not a readable MIDI file (it does not begin with MThd; audio is not MIDI)",
    ]
    assert shown.out.startswith("corpus: 2 train, 1 validation\n")
    assert "; 41 files skipped; " in shown.out
    assert {entry.source for entry in Corpus.load("corpus").skipped} == {"2006/c.midi", *(row[3] for row in missing)}


def test_maestro_in_a_folder_below_is_named(run, tmp_path):
    write_maestro(tmp_path / "midi" / "maestro-v3.0.0")
    shown = run("prepare", tmp_path / "midi", "--out", "corpus")
    assert shown.err == (
        "warning: the split in maestro-v3.0.0/maestro-v3.0.0.csv is not used, prepare its folder to use it\n"
    )
    assert shown.out.startswith("corpus: 3 train, 1 validation\n")


ASAP = "composer,title,folder,midi_score,midi_performance,start\r\n" + "".join(
    f"Bach,Fugue_{i % 3},Bach,Bach/{i % 3}/midi_score.mid,Bach/{i % 3}/{i}.mid,\r\n" for i in range(12)
)


@pytest.mark.parametrize(
    "table",
    [
        ASAP,
        ASAP.replace("composer,title", "canonical_composer,canonical_title").replace(
            "midi_performance", "midi_filename"
        ),
    ],
)
def test_works_of_a_table_without_splits_stay_together(tmp_path, table):
    """ASAP's own table, and MAESTRO's columns without splits: scores are not performances, works are known."""
    files = {f"Bach/{i % 3}/{i}.mid": tune(i) for i in range(12)} | {"Bach/0/midi_score.mid": tune(20)}
    folder = write_midi_files(tmp_path / "midi", files | {"metadata.csv": table.encode()})
    report = prepare(folder, tmp_path / "out", validation_fraction=0.4)
    corpus = Corpus.load(tmp_path / "out")
    assert report.pieces == {"train": 8, "validation": 4}
    assert len({piece.work for piece in corpus.pieces("validation")}) == 1
    assert corpus.origin["options"] == {"validation_fraction": 0.4, "seed": 0}
    assert [(entry.source, entry.reason) for entry in report.skipped] == [
        ("Bach/0/midi_score.mid", "not in metadata.csv")
    ]
    with pytest.raises(UserError, match="`force` replaces it"):
        prepare(folder, tmp_path / "out", validation_fraction=0.4, seed=1)


def by_file(n: int) -> dict[str, tuple[str, ...]]:
    return {f"{i}.mid": (f"{i}.mid",) for i in range(n)}


def test_splits_are_seeded_and_not_empty():
    works = by_file(100)
    splits = choose_splits(works, 0.1, seed=0)
    assert list(splits.values()).count("validation") == 10
    assert choose_splits(dict(reversed(works.items())), 0.1, seed=0) == splits
    assert choose_splits(works, 0.1, seed=1) != splits
    assert set(choose_splits(works, 0.0, seed=0).values()) == {"train"}
    assert sorted(choose_splits(by_file(2), 0.01, seed=0).values()) == ["train", "validation"]
    assert sorted(choose_splits(by_file(2), 0.99, seed=0).values()) == ["train", "validation"]
    assert list(choose_splits(by_file(1), 0.5, seed=0).values()) == ["train"]
    moved = sum(
        split != splits[source] for source, split in choose_splits(by_file(101), 0.1, 0).items() if source in splits
    )
    assert moved <= 1


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=30),
    fraction=st.floats(0, 0.99),
    seed=st.integers(0, 2**40),
)
def test_works_stay_together_in_any_seeded_split(sizes, fraction, seed):
    """The fraction is met from below, up to the smallest work that is left in training; no split is empty."""
    works = {f"{work}/{i}.mid": ("composer", str(work)) for work, size in enumerate(sizes) for i in range(size)}
    splits = choose_splits(works, fraction, seed)
    assert splits.keys() == works.keys()
    assert len({(works[source], split) for source, split in splits.items()}) == len(sizes)
    validation = {works[source] for source, split in splits.items() if split == "validation"}
    if fraction == 0 or len(sizes) == 1:
        assert not validation
        return
    assert 0 < len(validation) < len(sizes)
    n, wanted = list(splits.values()).count("validation"), max(round(fraction * len(works)), 1)
    left = min(size for work, size in enumerate(sizes) if ("composer", str(work)) not in validation)
    assert n <= wanted < n + left or n == min(sizes) > wanted or wanted == len(works)


def test_a_work_is_known_by_composer_and_title():
    assert work_key("Claude Debussy", "L'isle  joyeuse ", "a") == work_key("claude debussy", "L'Isle Joyeuse", "b")
    assert work_key("", "Fugue", "a.mid") == work_key("Bach", "", "a.mid") == ("a.mid",)


@pytest.mark.slow
@pytest.mark.maestro
def test_all_of_maestro(maestro_dir, tmp_path, monkeypatch):
    """The whole data set or its train and validation parts, in less than 10 s on two cores."""
    before = cpu_seconds()
    report = prepare(maestro_dir, tmp_path / "out")
    assert cpu_seconds() - before < 20
    assert (report.pieces["train"], report.pieces["validation"]) == (962, 137)
    haydn = [work for work in report.shared_works if work.title == "Sonata in B-flat Major, Hob.XVI:41"]
    assert [(work.composer, work.files) for work in haydn] == [("Joseph Haydn", {"train": 1, "validation": 1})]
    complete = report.pieces.get("test") == 177
    assert len(report.shared_works) == (5 if complete else 1)
    assert all(entry.reason.endswith("there is no such file") for entry in report.skipped)
    corpus = Corpus.load(tmp_path / "out")
    corpus.verify()
    assert len(corpus.origin["shared_works"]) == len(report.shared_works)
    paths = [maestro_dir / piece.source for piece in corpus.pieces()]
    monkeypatch.setattr("dsmr_mlx.data.encode.cores", lambda: 2)
    assert choose_workers(paths, PerformanceTokenizer()) == 2
