"""`dsmr-mlx convert`: convert PyTorch checkpoints, in both directions."""

import argparse
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from dsmr_mlx.cli.common import add_command
from dsmr_mlx.cli.console import err, out, progress, show_file, table
from dsmr_mlx.cli.models import show_licence
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.formatting import format_bytes
from dsmr_mlx.model.horizons import HorizonSchedule

if TYPE_CHECKING:
    from dsmr_mlx.convert.exactness import Exactness
    from dsmr_mlx.convert.importing import Conversion
    from dsmr_mlx.convert.verification import Verification

EXAMPLES = (
    "dsmr-mlx convert model.pt model --verify",
    "dsmr-mlx convert Llama-3.2-1B llama --segment 256 \\\n    --horizons two-scale:long=4x2048,short=256",
    "dsmr-mlx convert runs/first small-8bit --quantize 8",
    "dsmr-mlx convert runs/first grouped --kv-heads 2 --horizons full:32768",
    "dsmr-mlx convert runs/first wider --d-ff 2048",
    "dsmr-mlx convert runs/first deeper --copy-layers 2,4",
    "dsmr-mlx convert runs/adapted fused --fuse",
    "dsmr-mlx convert --to-pytorch runs/first model.pt",
)
IMPORT_OPTIONS = (
    *("family", "map_file", "settings", "allow_unused", "horizons", "segment_length"),
    *("dtype", "quantization", "group_size", "kv_heads", "d_ff", "copy_layers"),
    *("tokenizer", "weights", "logits_file", "fuse"),
)


def add(commands) -> None:
    """Add the parser of the command."""
    p = add_command(commands, "convert", run, *EXAMPLES)
    p.setting_names = setting_names
    p.add_argument(
        "source", metavar="SRC", help="a .pt, .pth, .bin, .ckpt or .safetensors file, a folder or a bundled model"
    )
    p.add_argument("out", metavar="DST", help="the folder to write; with --to-pytorch a file, .pt or .safetensors")
    p.add_argument("--to-pytorch", action="store_true", help="write a checkpoint of the PyTorch reference")
    add_source(p)
    add_result(p)
    p.add_argument(
        "--verify", dest="logits_file", nargs="?", const=True, type=stored_logits, metavar="FILE.npz",
        help="compare the outputs with the original model on the same tokens, or with stored logits",
    )  # fmt: skip
    p.add_argument("--force", action="store_true", help="replace DST")


def add_source(p: argparse.ArgumentParser) -> None:
    """Add the options of how the source is read."""
    p.add_argument("--family", metavar="NAME", help="the architecture, if the tensor names are ambiguous")
    p.add_argument(
        "--map", dest="map_file", metavar="FILE.toml", help="rules for other tensor names, see examples/custom_map.toml"
    )
    p.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings",
        help="a setting of the model that the source lacks, such as n_heads=12",
    )  # fmt: skip
    p.add_argument(
        "--allow-unused", action="append", default=[], metavar="PATTERN", help="tensors to leave out, such as 'ema.*'"
    )
    p.add_argument(
        "--weights", metavar="NAME", help="the entry of a .pt file with several sets of weights, such as ema"
    )
    p.add_argument(
        "--fuse",
        action="store_true",
        default=None,
        help="SRC is a run with adapters (lora_rank): add them to the weights of its base",
    )
    p.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="vocabulary of the ids, if the source has none: performance, miditok:NAME, aria, or the folder of a "
        "corpus, checkpoint or run",
    )


def add_result(p: argparse.ArgumentParser) -> None:
    """Add the options of the model that is written."""
    p.add_argument("--horizons", metavar="SPEC", help="horizon schedule of the layers, see `dsmr-mlx horizons`")
    p.add_argument(
        "--segment",
        dest="segment_length",
        type=int,
        metavar="S",
        help="tokens per segment (default: as in the source, or a quarter of its context, at most 512)",
    )
    p.add_argument("--dtype", metavar="TYPE", help="float32, bfloat16 or float16 (default: as stored)")
    p.add_argument(
        "--quantize",
        dest="quantization",
        type=int,
        metavar="BITS",
        choices=(4, 6, 8),
        help="quantize matrices to 4, 6 or 8 bits",
    )
    p.add_argument(
        "--group-size", type=int, metavar="G", help="weights per scale of --quantize: 32, 64 (default) or 128"
    )
    p.add_argument(
        "--kv-heads", type=int, metavar="N", help="average key/value heads to N, a warm start for `train --init`"
    )
    p.add_argument(
        "--d-ff",
        type=int,
        metavar="N",
        help="widen the feed-forward layers to N units, which have no effect before `train --init`",
    )
    p.add_argument(
        "--copy-layers",
        type=layer_numbers,
        default=[],
        metavar="L,…",
        help="follow these layers, counted from 0, by copies, which have no effect before `train --init`",
    )


def setting_names() -> Collection[str]:
    """Return the names of the settings of a model."""
    from dsmr_mlx.model.config import ModelConfig

    return ModelConfig.__dataclass_fields__


def run(a: argparse.Namespace) -> None:
    """Import a checkpoint, or export it with --to-pytorch."""
    if a.to_pytorch:
        run_export(a)
    else:
        run_import(a)


def run_import(a: argparse.Namespace) -> None:
    """Convert a PyTorch checkpoint to one of this program."""
    from dsmr_mlx.convert.importing import check_out, plan_conversion, write_conversion
    from dsmr_mlx.model import checkpoint
    from dsmr_mlx.model.bundled import locate

    if a.group_size is not None and a.quantization is None:
        raise UserError(f"--group-size {a.group_size}: expected --quantize with it")
    source = locate(a.source)
    quantization = None
    if a.quantization is not None:
        quantization = {"bits": a.quantization, "group_size": 64 if a.group_size is None else a.group_size}
    conversion = plan_conversion(
        source,
        family=a.family,
        map_file=a.map_file,
        settings=model_settings(a.settings),
        allow_unused=a.allow_unused,
        horizons=a.horizons,
        segment_length=a.segment_length,
        dtype=a.dtype,
        quantization=quantization,
        kv_heads=a.kv_heads,
        d_ff=a.d_ff,
        copy_layers=a.copy_layers,
        tokenizer=a.tokenizer,
        weights=a.weights,
        fuse=bool(a.fuse),
    )
    check_out(source, a.out, a.force)
    show_licence(source)
    for note in conversion.notes:
        err.print(f"note: {a.with_options(note)}")
    show_conversion(conversion)
    verification = a.logits_file and verify_conversion(conversion, a.logits_file)
    with progress("converting", "tensors") as update:
        folder = write_conversion(
            conversion, a.out, verification=verification and verification.to_dict(), force=a.force, progress=update
        )
    out.print(f"{a.out}: {format_bytes(checkpoint.weight_bytes(folder))}")
    if not conversion.tokenizer.decodes:
        out.print(conversion.tokenizer.why_not)


def verify_conversion(conversion: "Conversion", logits: str | bool) -> "Verification":
    """Compare a converted model with its original, or with stored logits. Show the result.

    Raises `UserError` if they differ; nothing has been written by then.
    """
    from dsmr_mlx.convert.verification import verify

    verification = verify(conversion, None if logits is True else logits)
    show_verification(verification, conversion.compared)
    if not verification.passed:
        raise UserError(
            f"{conversion.source.path}: the converted model computes different outputs; nothing was written"
        )
    return verification


def run_export(a: argparse.Namespace) -> None:
    """Write a checkpoint of the PyTorch reference."""
    from dsmr_mlx.convert.exporting import export
    from dsmr_mlx.model.bundled import locate

    for name in IMPORT_OPTIONS:
        if getattr(a, name) not in (None, []):
            raise UserError(f"`{name}`: not with --to-pytorch, which exports a checkpoint unchanged")
    source = locate(a.source)
    path = export(source, a.out, force=a.force)
    show_licence(source)
    show_file(path)


def stored_logits(name: str) -> str:
    """Parse the value of --verify. Raises `ArgumentTypeError` if it is not a file of logits, but SRC."""
    if not name.endswith(".npz"):
        raise argparse.ArgumentTypeError(f"{name!r}: expected a .npz file, or --verify after SRC and DST")
    return name


def layer_numbers(text: str) -> list[int]:
    """Parse the value of --copy-layers. Raises `ArgumentTypeError` if it is not a list of numbers."""
    if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers of layers such as 2,4")
    return [int(number) for number in text.split(",")]


def model_settings(settings: list[str]) -> dict[str, Any]:
    """Parse `key=value` texts as fields of `ModelConfig`. Raises `UserError` for fields that have their own options."""
    from dsmr_mlx.common.config import parse_setting
    from dsmr_mlx.model.config import ModelConfig

    parsed = dict(parse_setting(setting, ModelConfig) for setting in settings)
    for key in ("horizons", "segment_length", "quantization"):
        if key in parsed:
            raise UserError(f"--set {key}: expected `{key}` instead")
    return parsed


def show_conversion(conversion: "Conversion") -> None:
    """Show the detected architecture, the model and its memory, before the conversion."""
    c = conversion.config
    out.print(f"{conversion.source.path}: {conversion.family.name} ({conversion.family.about})")
    heads = f"{c.n_heads} heads of {c.head_dim}" + (f", {c.n_kv_heads} for keys" if c.n_kv_heads != c.n_heads else "")
    out.print(f"model: {c.n_layers} layers, d_model {c.d_model}, {heads}, vocabulary of {c.vocab_size:,}")
    if (new := c.d_ff - conversion.unchanged.d_ff) > 0:
        out.print(f"feed-forward layers: {c.d_ff:,} units, {new:,} of them new: no effect before train --init")
    if copies := ", ".join(map(str, conversion.copies)):
        out.print(f"copies after {copies}, counted from 0: no effect before train --init")
    horizons = HorizonSchedule.custom(c.horizons).describe(c.n_kv_heads, c.head_dim, 4, c.canon_size)
    out.print(f"memory: {horizons}, segment {c.segment_length}")
    out.print(describe_exactness(conversion.exactness, c.max_positions))


def describe_exactness(e: "Exactness", positions: int | None) -> str:
    """Describe up to how many tokens a converted model equals the original. positions: number of learned positions."""
    if e.averaged:
        return "a warm start: key/value heads are averaged; train --init fine-tunes it"
    end = f"; a stream ends after {positions:,} tokens, the number of learned positions" if positions else ""
    if e.tokens is None:
        return f"exact: the horizons are those of the original{end}"
    if not e.warm_start:
        return f"exact up to {e.tokens:,} tokens{end or '; beyond that its memory is limited by the horizons'}"
    context = f"the original has a context of {e.context:,}" if e.context else "the context of the original is unknown"
    if e.recurrent and e.context is None:
        context = "the original has no limit, with its own horizons"
    return f"a warm start: exact up to {e.tokens:,} tokens only, {context}; train --init fine-tunes it{end}"


def show_verification(verification: "Verification", compared: str) -> None:
    """Show how a converted model differs from its original. compared: which of its weights were compared."""
    rows = table("", "max absolute", "max relative")
    for what, absolute, relative in verification.rows:
        rows.add_row(what, f"{absolute:.2e}", f"{relative:.2e}")
    out.print(rows)
    verdict = "equal" if verification.passed else "NOT equal"
    tokens = " x ".join(map(str, verification.tokens))
    out.print(
        f"{verdict} to {verification.against} on {tokens} tokens, tolerance {verification.tolerance:.0e} relative; "
        f"the same most likely token after {verification.agreement:.2%}; compared: {compared}"
    )
