"""A model card as Markdown, from what `model_card.py` has measured. Sections without figures are left out."""

import math
from typing import Any

from dsmr_mlx.common.formatting import clock, duration, size
from dsmr_mlx.evaluation.music.shared_runs import READINGS
from dsmr_mlx.model.horizons import parse

AIMED = {"density", "polyphony", "velocity", "duration"}  # distributions that should overlap
LOSSES = ("first", "repeat", "control")  # of a motif
LEAST_OVERLAP, MOST_SILENCE, MOST_COPIES, MOST_PERPLEXITY = 0.8, 3.0, 3, 9.0


def readme(card: dict[str, Any]) -> str:
    """The whole card."""
    sections = (head, use, data, licence, model, training, evaluation, memory, precision, music, copies, limits, again)
    return "\n\n".join(filter(None, (section(card) for section in sections))) + "\n"


def table(columns: list[str], rows: list[list[Any]], words: int = 0) -> str:
    """The first column is text, as are the last `words` ones, the others are numbers."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1 - words), *["---"] * words], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def console(card: dict[str, Any], part: str) -> str:
    """The command that prints the figures of a part."""
    return f"```sh\n{card['commands'][part]['command']}\n```"


def head(card: dict[str, Any]) -> str:
    c, e = card, card["evaluation"]
    front = f"---\nlicense: {c['licence']['id'].lower()}\nlibrary_name: mlx\ntags: [music, midi, piano, dsmr]\n---"
    about = (
        f"A model of piano performances that comes with `dsmr-mlx`: {c['parameters']:,} parameters, trained on "
        f"{c['data']['name']}, perplexity {e['perplexity']:.3f} on its {e['split']} split. It writes performances, "
        "with their timing, loudness and pedalling, event by event, as long as one likes, or goes on from a MIDI file."
    )
    return f"{front}\n\n# {c['name']}\n\n{about}"


def use(card: dict[str, Any]) -> str:
    options = ", ".join(f"`--{name.replace('_', '-')} {value}`" for name, value in card["generation"].items())
    played = f"\n\nWhere nothing else is asked for it is played with {options}." if options else ""
    name = card["name"]
    return (
        f"```sh\ndsmr-mlx generate\ndsmr-mlx generate {name} --prompt song.mid --prompt-seconds 20 --seconds 60\n"
        f'dsmr-mlx live {name} --in Piano --out Piano\npython -c "import dsmr_mlx; dsmr_mlx.load()"\n```{played}'
    )


def data(card: dict[str, Any]) -> str:
    d = card["data"]
    rows = [
        [split, f"{s['pieces']:,}", f"{s['works']:,}", f"{s['hours']:.1f}", f"{s['notes']:,}", f"{s['tokens']:,}"]
        for split, s in d["splits"].items()
    ]
    counts = table(["split", "performances", "works", "hours", "notes", "tokens"], rows)
    cited = "\n".join(f"- {citation}" for citation in d["citations"])
    shared = d["works_in_two_splits"]
    apart = "No work is in two splits." if not shared else f"{shared:,} works are in two splits or more."
    return (
        f"## Data\n\n[{d['name']}]({d['url']}): {d['about']}. {apart} Prepared with "
        f"`dsmr-mlx prepare`, tokenizer `{d['tokenizer']}`, fingerprint of the corpus `{d['fingerprint'][:12]}`."
        f"\n\n{counts}\n\n{cited}"
    )


def licence(card: dict[str, Any]) -> str:
    found = card["licence"]
    return (
        f"## Licence\n\nThe weights are under [{found['name']}]({found['url']}), {found['because']}: {found['terms']}. "
        "The program that plays them is under the MIT licence, which does not cover them."
    )


def model(card: dict[str, Any]) -> str:
    m = card["model"]
    horizons = parse(f"custom:{','.join(map(str, m['horizons']))}", m["n_layers"])
    state = horizons.state_bytes(m["n_kv_heads"], m["head_dim"])
    weights = card["evaluation"]["weights"]
    return (
        f"## Model\n\nA DSMR ([arXiv 2602.19816](https://arxiv.org/abs/2602.19816)): {m['n_layers']} layers of width "
        f"{m['d_model']}, {m['n_heads']} heads of {m['head_dim']}, {card['parameters']:,} parameters, stored as "
        f"{weights['dtype']}, {size(weights['bytes'])}. It reads segments of {m['segment_length']} tokens. What the "
        f"layers remember from before a segment, the lowest first: {horizons.summary} tokens, together "
        f"{horizons.budget:,}, {size(state)} in half precision."
    )


def training(card: dict[str, Any]) -> str:
    t, d = card["training"], card["data"]
    epochs = t["tokens"] / d["splits"]["train"]["tokens"]
    command = (
        f"dsmr-mlx train --data corpus --out {t['out']} --config {t['recipe']}"
        if t["by"] == "dsmr_mlx.train"
        else f"python {t['by']} --data corpus --out {t['out']} --config {t['recipe']}"
    )
    s = t["settings"]
    moved = f"±{s['augment_transpose']} semitones, ±{s['augment_stretch']:.0%} tempo, ±{s['augment_velocity']} velocity"
    return (
        f"## Training\n\n```sh\ndsmr-mlx prepare {d['name'].lower()} --out corpus\n{command}\n"
        f"{card['commands']['conversion']['command']}\n```\n\n{t['tokens']:,} tokens in {t['step']:,} steps, "
        f"{epochs:.1f} epochs, {duration(t['seconds'])}; {s['batch_size']} pieces side by side, "
        f"augmented by {moved}. The weights are those of the best validation."
    )


def evaluation(card: dict[str, Any]) -> str:
    e = card["evaluation"]
    rows = [
        [span(row), f"{row['tokens']:,}", f"{row['nats_per_token']:.4f}", f"{math.exp(row['nats_per_token']):.3f}"]
        for row in e["by_position"]
    ]
    pieces = [f"{p['source']} ({p['perplexity']:.2f})" for p in (e["best"][0], e["worst"][-1])]
    return (
        f"## How well it predicts\n\n{console(card, 'evaluation')}\n\n**Perplexity {e['perplexity']:.4f}** on "
        f"{e['tokens']:,} tokens of {e['pieces']} {e['split']} performances, whole and streamed; "
        f"{e['nats_per_token']:.4f} nats a token, {e['nats_per_note']:.3f} a note, {e['nats_per_second']:.2f} a second "
        f"of music. Best and worst: {pieces[0]}, {pieces[1]}.\n\n"
        + table(["position in the piece", "tokens", "nats a token", "perplexity"], rows)
    )


def span(row: dict[str, Any]) -> str:
    return f"{row['start']:,} – {'…' if row['end'] is None else format(row['end'], ',')}"


def error(value: dict[str, float] | None) -> str:
    """A mean and its standard error, which that of a single piece has not."""
    if value is None:
        return ""
    return f"{value['nats']:.4f}" + (f" ± {value['error']:.4f}" if value["error"] is not None else "")


def memory(card: dict[str, Any]) -> str | None:
    if "context" not in card:
        return None
    context, motifs = card["context"]["context"], card["context"]["motifs"]
    rows = [
        [
            *("" if i else curve["label"], f"{p['visible']:,}", f"{p['nats_per_token']:.4f}"),
            *(error(p["gain"]) if i else "", error(p["step"])),
        ]
        for curve in context["curves"]
        for i, p in enumerate(curve["points"])
    ]
    text = (
        f"## What its memory is worth\n\n{console(card, 'context')}\n\nThe loss when layers carry less of the past, on "
        f"{context['tokens']:,} tokens of {context['pieces']} pieces, ± standard error over pieces:\n\n"
        + table(["truncated", "tokens carried", "nats a token", "gain over none", "gain of this step"], rows)
    )
    if motifs is None:
        return text
    rows = [
        [
            f"{r['tokens']:,.0f}",
            *(f"{r[name]['nats']:.3f}" for name in ("first", "repeat", "control")),
            error(r["gain"]),
        ]
        for r in motifs["distances"]
    ]
    return (
        f"{text}\n\n{motifs['probes']} motifs of {motifs['motif_tokens']:.0f} tokens that return after music of other "
        "pieces; the control heard another motif first:\n\n"
        + table(["returns after", "first time", "repeat", "control", "gain"], rows)
    )


def precision(card: dict[str, Any]) -> str | None:
    if "precision" not in card:
        return None
    rows = [
        [
            *(row["checkpoint"], weight_type(row["weights"]), size(row["weights"]["bytes"])),
            *(f"{row['perplexity']:.4f}", f"{row['change']['perplexity_percent']:+.3f} %" if i else ""),
        ]
        for i, row in enumerate(card["precision"])
    ]
    tokens = card["precision"][0]["tokens"]
    return (
        f"## What storing it in fewer bits costs\n\n{console(card, 'precision')}\n\nOn {tokens:,} tokens, computed in "
        "the stored type:\n\n" + table(["", "weights", "size", "perplexity", "change"], rows)
    )


def weight_type(weights: dict[str, Any]) -> str:
    return weights["dtype"] if weights["bits"] is None else f"{weights['bits']} bits, {weights['dtype']}"


def music(card: dict[str, Any]) -> str | None:
    if "music" not in card:
        return None
    m = card["music"]
    features = [
        [f["title"], *(centre(f[name]) for name in ("generated", "reference"))]
        + [shown(f[name]) for name in ("overlap", "real_overlap", "kl", "oa", "real_oa")]
        for f in m["features"]
    ]
    samples = [
        [
            *(
                s["name"],
                f"{s['notes_per_second']:.1f}",
                s["range"],
                f"{s['mean_polyphony']:.1f} / {s['max_polyphony']}",
            ),
            *(f"{s['mean_velocity']:.0f} ± {s['velocity_spread']:.0f}", f"{s['longest_silence']:.1f} s"),
            *(loop(s["loop"]), s["words"]),
        ]
        for s in m["shown"]
    ]
    columns = ["", "notes/s", "keys", "voices / most", "velocity", "silence", "loop", "in words"]
    return (
        f"## What its music is like\n\n```sh\n{card['commands']['samples']['command']}\n"
        f"{card['commands']['music']['command']}\n```\n\n{m['samples']} pieces, {m['seconds'] / 60:.0f} minutes, from "
        f"nothing, beside {m['reference']['excerpts']} excerpts of {m['reference']['kind']} that are as long.\n\n"
        f"{aims(card)}\n\n"
        + table(["median / mean", "generated", "reference", "overlap", "real", "KL", "OA", "real"], features)
        + "\n\n`overlap`: mass that the histograms of all notes or moments share; `KL`: their divergence; `OA`: of the "
        "distances of pieces (Yang & Lerch 2020); `real`: the same for as many other real excerpts.\n\nThe first "
        f"{len(samples)} of them; key and register are those of the notes, voices what sounds at once:\n\n"
        + table(columns, samples, words=1)
    )


def aims(card: dict[str, Any]) -> str:
    """What the model should do, and whether it does."""
    m, perplexity = card["music"], card["evaluation"]["perplexity"]
    longest, worst = m["longest"], m["longest"]["loop"]
    copies = worst["copies"] if worst else 0
    overlaps = {f["key"]: f["overlap"] for f in m["features"] if f["key"] in AIMED}
    found = ", ".join(f"{key} {value:.2f}" for key, value in overlaps.items())
    rows = [
        [f"perplexity below {MOST_PERPLEXITY:g}", f"{perplexity:.3f}", perplexity < MOST_PERPLEXITY],
        [
            f"no silence over {MOST_SILENCE:g} s",
            f"at most {longest['silence']:.1f} s",
            longest["silence"] <= MOST_SILENCE,
        ],
        [
            f"no cycle more than {MOST_COPIES} times in a row",
            f"{copies} times" if copies else "none",
            copies <= MOST_COPIES,
        ],
        [f"overlaps of {LEAST_OVERLAP:g} or more", found, min(overlaps.values()) >= LEAST_OVERLAP],
    ]
    return table(["aim", "found", "met"], [[aim, value, "yes" if met else "no"] for aim, value, met in rows])


def shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def centre(pair: dict[str, float | None]) -> str:
    return "–" if pair["mean"] is None else f"{pair['median']:.3g} / {pair['mean']:.3g}"


def loop(found: dict[str, int] | None) -> str:
    return f"{found['copies']} × {found['length']}" if found else "–"


def copies(card: dict[str, Any]) -> str | None:
    if "music" not in card:
        return None
    t = card["music"]["training"]
    rows = []
    for r in t["readings"]:
        generated, reference = r["generated_summary"], r["reference_summary"]
        rows.append([READINGS[r["reading"]], f"{generated['median']:.0f}", generated["longest"]])
        rows[-1] += [f"{reference['median']:.0f}", reference["longest"]]
    longest = "\n".join(
        f"- {READINGS[r['reading']]}: {run['length']} in {run['seconds']:.1f} s on {run['pitches']} different pitches, "
        f"{run['name']} at {clock(run['at'])}, {run['piece']} at {clock(run['piece_at'])}"
        for r in t["readings"]
        if (run := r["longest_generated"])["piece"]
    )
    n, others = (t["readings"][0][f"{name}_summary"]["files"] for name in ("generated", "reference"))
    unheard = "" if card["data"]["works_in_two_splits"] else ", whose works the model has not heard"
    return (
        f"## Does it copy?\n\nThe longest run of each of the {n} pieces that is in any of the {t['pieces']:,} training "
        f"performances too ({t['events']:,} events), found exactly, beside the same figure of {others} excerpts of "
        f"validation performances{unheard}. The last command prints it.\n\n"
        + table(["", "generated: median", "longest", "validation: median", "longest"], rows)
        + "\n\nThe longest of all; those on few pitches are trills or repeated keys, those on none are keys "
        f"let go:\n\n{longest}"
    )


def limits(card: dict[str, Any]) -> str:
    known = [
        "It plays on from what it remembers: themes do not return after a minute, and there is no plan of a form.",
        "Keys and phrases are plausible over seconds; harmony wanders over minutes.",
        f"A key whose press it no longer remembers it would hold for ever{released(card)}.",
        "The pedal is in the length of the notes, there are no pedal events.",
        *(["The check above looks for literal runs, not for likeness."] if "music" in card else []),
    ]
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in (*card["limits"], *known))


def released(card: dict[str, Any]) -> str:
    return "; options above release it" if card["generation"].get("max_note_seconds") is not None else ""


def again(card: dict[str, Any]) -> str:
    places: dict[str, list[str]] = {}
    for part, command in card["commands"].items():
        if m := command.get("machine"):
            place = f"On {m['cores']} cores ({m['name']}, {m['system']}, MLX {m['mlx']}), {m['date']}"
            places.setdefault(place, []).append(f"{part} {duration(command['seconds'])}")
    return (
        "## Measured again\n\nAll commands above are run, and this card and `card.json` with more figures are "
        "written, by the first of these, for newly trained weights; by the second for the weights that are shipped, "
        "without the comparison of precisions.\n\n"
        f"```sh\n{card['commands']['card']['command']}\n"
        f"python benchmarks/model_card.py --data corpus --out dsmr_mlx/models/{card['name']}\n```\n\n"
        + "\n\n".join(f"{place}: {', '.join(parts)}." for place, parts in places.items())
    )
