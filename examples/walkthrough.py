# %% [markdown]
# # How DSMR remembers
#
# DSMR in numbers and pictures, in about three minutes on a laptop. Run it as a script, `python
# examples/walkthrough.py`, or cell by cell in VS Code, Spyder or (with jupytext) Jupyter. The pictures need the `plot`
# extra and are written to `example-output/walkthrough`.

# %%
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from melodies import MELODIES, perform, write_melodies

import dsmr_mlx
from dsmr_mlx import MaxNoteSeconds, build_config, prepare
from dsmr_mlx.common.plotting import LIGHT, picture
from dsmr_mlx.evaluation import context_curves
from dsmr_mlx.evaluation.memory_plot import memory_picture
from dsmr_mlx.model import horizons
from dsmr_mlx.music.piano_roll import roll_picture
from dsmr_mlx.music.summary import summarize
from dsmr_mlx.training import Callback, train

OUT = Path("example-output/walkthrough")
TAKES = 6  # training performances of each melody
STEPS = 320  # training steps of each of the two models
SECONDS = 20  # length of the music at the end

OUT.mkdir(parents=True, exist_ok=True)


def show(name, png):
    """Save a picture, and show it if this runs in a notebook."""
    (OUT / name).write_bytes(png)
    print(f"picture: {OUT / name}")
    if "ipykernel" in sys.modules:
        from IPython.display import Image, display

        display(Image(data=png))


# %% [markdown]
# ## A piece is one long sequence
#
# A performance becomes events: time passes, the velocity changes, a key goes down, a key goes up. A prelude of two
# minutes has 2,500 of them, a sonata movement 20,000. Attention over all of that is expensive. If the music is cut into
# excerpts, a model cannot learn from anything further back.

# %%
notes = perform(MELODIES["bach"])
tokenizer = dsmr_mlx.PerformanceTokenizer()
ids = tokenizer.encode_notes(notes)
print(f"{summarize(notes)}: {len(ids):,} tokens")
print(" ".join(tokenizer.tokens[i] for i in ids[:16]), "…")
show("piece.png", roll_picture(notes, "png", title=MELODIES["bach"].title))

# %% [markdown]
# ## Segments, and a memory for every layer
#
# DSMR reads the piece once, from left to right, in segments of S tokens. Between segments, layer *l* carries the keys
# and values of the last *M_l* tokens, its horizon, without gradient. The horizons depend on depth: in `two-scale` the
# lowest layers have long ones, all others short ones. The token at position *t*, in the segment that starts at *s*,
# sees in layer *l* exactly the positions max(0, *s* − *M_l*) … *t*.


# %%
def visible(length, segment, horizon):
    """Which positions (columns) each token (row) sees: `(T, T)` bool."""
    t, j = np.arange(length)[:, None], np.arange(length)[None]
    return (j <= t) & (j >= segment * (t // segment) - horizon)


T, S, M = 144, 12, (24, 24, 4, 4)
masks = [visible(T, S, horizon) for horizon in M]
reachable = masks[0]
for mask in masks[1:]:
    reachable = mask @ reachable  # information also comes through the layers below


def draw_masks(figure):
    """Draw the mask of each layer, and what is reachable through all of them."""
    names = [*(f"layer {layer}: M = {horizon}" for layer, horizon in enumerate(M)), "all layers together"]
    for panel, name, seen in zip(figure.subplots(1, 5), names, [*masks, reachable], strict=True):
        panel.imshow(seen, cmap="Blues", vmax=1.4, interpolation="nearest")
        panel.set_title(name)
        panel.set_xticks(range(0, T, 4 * S))
        panel.set_yticks(range(0, T, 4 * S))
        panel.grid(False)
        for edge in range(S, T, S):
            panel.axhline(edge - 0.5, color=LIGHT["base"], linewidth=0.4)
    figure.supylabel("token", fontsize=8)
    figure.supxlabel(f"what it sees; segments of {S}", fontsize=8)
    figure.subplots_adjust(left=0.05, right=0.99, top=0.9, bottom=0.16)


show("what-layers-see.png", picture(draw_masks, (12.5, 2.9), "png"))

# %% [markdown]
# ## The cost of memory
#
# The sum of the horizons is the budget: the number of tokens whose keys and values are kept, whatever the length of the
# piece. Here for 12 layers of 8 heads of 64, in bfloat16. `reach` is how far back information can come from through all
# layers.

# %%
for spec in ("none", "two-scale:long=4x2048,short=256", "uniform:budget=10240", "full:2048", "full:20000"):
    schedule = horizons.parse(spec, n_layers=12)
    size, reach = schedule.state_bytes(n_kv_heads=8, head_dim=64) / 2**20, max(schedule.reach(512))
    print(f"{spec:32} {schedule.budget:>8,} tokens {size:>7.1f} MiB, reach {reach:>8,}")

# %% [markdown]
# ## Streaming in segments is exact
#
# Below is the same network without segments or memory: one pass over the whole piece under the masks above. However the
# piece is cut into calls, streaming gives these logits, up to rounding. Training, evaluation and generation therefore
# use the same model. The memory is allocated once.

# %%
config = dsmr_mlx.ModelConfig(
    vocab_size=tokenizer.vocab_size,
    d_model=64, n_layers=4, n_heads=2, head_dim=32, d_ff=128,
    segment_length=32, horizons=[96, 96, 16, 16],
)  # fmt: skip
mx.random.seed(0)
model = dsmr_mlx.DSMR(config)  # random weights are enough


def dense(model, tokens):
    """Logits `(1, T, V)` of one pass over the whole piece `(1, T)`."""
    c, (_, length) = model.config, tokens.shape
    x = model.embed(tokens)
    for block, horizon in zip(model.layers, c.horizons, strict=True):
        qkv = block.attention.qkv(block.attention_norm(x)).reshape(1, length, -1, c.head_dim).swapaxes(1, 2)
        q, k, v = mx.split(qkv, 3, axis=1)  # (1, H, T, D) each
        q, k = (mx.fast.rope(a, c.head_dim, traditional=False, base=c.rope_theta, scale=1, offset=0) for a in (q, k))
        scores = q @ k.swapaxes(-1, -2) * c.head_dim**-0.5
        weights = mx.softmax(mx.where(mx.array(visible(length, c.segment_length, horizon)), scores, -mx.inf), axis=-1)
        x = x + block.attention.out((weights @ v).swapaxes(1, 2).reshape(1, length, -1))
        x = x + block.feed_forward(block.feed_forward_norm(x))
    return model.logits(model.norm(x))


piece = mx.array(ids[None, :600].astype(np.int32))
expected = dense(model, piece)
for name, size in (("in one call", 600), ("segment by segment", 32), ("7 tokens at a time", 7), ("token by token", 1)):
    state, parts = model.new_state(), []
    for start in range(0, 600, size):
        logits, state = model(piece[:, start : start + size], state)
        parts.append(logits)
    difference, largest = (mx.abs(a).max().item() for a in (mx.concatenate(parts, axis=1) - expected, expected))
    print(f"{name:20} differs by {difference:.1e} of up to {largest:.1f}; memory {state.nbytes:,} bytes")

# %% [markdown]
# ## Does memory help in training?
#
# Two models that differ only in their memory learn from performances of seven melodies, in several keys and tempi. That
# is little music, and the validation pieces are other performances of the same melodies, so this illustrates the point
# but proves little. Both models soon memorize the training pieces. On new performances, memory helps.

# %%
shutil.rmtree(OUT / "runs", ignore_errors=True)
corpus = dsmr_mlx.Corpus.load(prepare(write_melodies(OUT / "midi", TAKES), OUT / "corpus", force=True).out)
print(f"{len(corpus.pieces('train'))} training pieces, {len(corpus.pieces('validation'))} for validation")


class Losses(Callback):
    """Records the losses of all steps and validations, in nats per token."""

    def on_start(self, run, resumed_from):
        """Start with empty lists."""
        self.training, self.validation = [], []

    def on_step(self, run, record):
        """Record the loss of a step."""
        self.training.append(record.loss)

    def on_validation(self, run, evaluation, is_best):
        """Record the loss of a validation, with the number of steps so far."""
        self.validation.append((len(self.training), evaluation.nats_per_token))


def learn(schedule):
    """Train under a schedule. Return the losses and the model."""
    config = build_config(
        "tiny", horizons=schedule, segment_length=32, batch_size=16, warmup_steps=20, max_steps=STEPS,
        eval_every=max(STEPS // 8, 1), sample_seconds=0.0,
    )  # fmt: skip
    losses = Losses()
    run = train(config, corpus.path, OUT / "runs" / schedule.partition(":")[0], callback=losses)
    print(f"{schedule}: validation {min(nats for _, nats in losses.validation):.3f} nats per token")
    return losses, dsmr_mlx.load(run.out)[0]


alone, _ = learn("none")
remembering, model = learn("two-scale:long=2x512,short=32")


def draw_losses(figure):
    """Draw the training and validation losses of both models."""
    panel = figure.subplots()
    runs = (("none", alone, LIGHT["validation"]), ("two-scale", remembering, LIGHT["train"]))
    for name, losses, colour in runs:
        panel.plot(losses.training, color=colour, linewidth=0.6, alpha=0.45)
        panel.plot(*zip(*losses.validation, strict=True), color=colour, marker="o", markersize=3.5, label=name)
    panel.set(title="loss in nats per token; thin: training, dots: validation", xlabel="step")
    panel.legend(title="memory")


show("training.png", picture(draw_losses, (6, 3.6), "png"))

# %% [markdown]
# ## The value of each stretch of memory
#
# The model stays the same while its memory is cut shorter and shorter: in all layers, then in the two lower and the two
# upper ones alone. On the right is the same by position: at the start of a piece there is nothing to remember.

# %%
curves = context_curves(model, corpus)
for point in curves.curves[0].points:
    print(f"{point.visible:>5} tokens carried: {point.nats_per_token:.3f} nats per token")
show("context.png", memory_picture("png", curves))

# %% [markdown]
# ## What does it sound like?
#
# The model continues the first bars of the minuet. It was trained on seven pieces only. `dsmr-mlx generate` plays a
# model that was trained on more.

# %%
prompt = tokenizer.first_seconds(tokenizer.encode_notes(perform(MELODIES["petzold"])), 10)
careful = {"sampling": dsmr_mlx.Sampling(top_p=0.9), "processors": [MaxNoteSeconds(3)]}
made = list(dsmr_mlx.generate(model, tokenizer, prompt=prompt, seconds=SECONDS, seed=1, **careful))
music = tokenizer.decode(np.append(tokenizer.prompt(prompt), made))
dsmr_mlx.write_notes(music, OUT / "music.mid")
show("music.png", roll_picture(music, "png", title="The minuet; after 10 s, the model"))
