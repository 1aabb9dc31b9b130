"""`dsmr-mlx convert`: checkpoints of PyTorch programs, in and out."""

import argparse
from typing import Any

from dsmr_mlx.cli.common import COMMANDS
from dsmr_mlx.cli.console import err, out, progress, table
from dsmr_mlx.cli.models import show_licence
from dsmr_mlx.cli.parser import HelpFormatter
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.formatting import size
from dsmr_mlx.model.horizons import parse

EXAMPLES = """examples:
  dsmr-mlx convert model.pt model --verify
  dsmr-mlx convert Llama-3.2-1B llama --segment 256 \\
    --horizons two-scale:long=4x2048,short=256
  dsmr-mlx convert runs/first small-8bit --quantize 8
  dsmr-mlx convert --to-pytorch runs/first model.pt"""


def add(commands) -> None:
    p = commands.add_parser(
        "convert",
        help=COMMANDS["convert"],
        description="Turn a PyTorch checkpoint into one of this program, or with --to-pytorch the other way round.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
    )
    p.set_defaults(run=run)
    p.add_argument(
        "source", metavar="SRC", help="a .pt, .pth, .bin, .ckpt, .safetensors, a folder, a checkpoint, a bundled model"
    )
    p.add_argument("out", metavar="DST", help="the folder to write; with --to-pytorch a file, .pt or .safetensors")
    p.add_argument("--to-pytorch", action="store_true", help="write a checkpoint of the PyTorch reference")
    p.add_argument("--family", metavar="NAME", help="whose names the tensors have, where they do not tell")
    p.add_argument("--map", metavar="FILE.toml", help="rules for names of your own, see examples/custom_map.toml")
    p.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings",
        help="a setting of the model that the source does not say, such as n_heads=12",
    )  # fmt: skip
    p.add_argument(
        "--allow-unused", action="append", default=[], metavar="PATTERN", help="tensors that may stay behind: 'ema.*'"
    )
    p.add_argument("--horizons", metavar="SPEC", help="what each layer is to remember, see `dsmr-mlx horizons`")
    p.add_argument(
        "--segment",
        type=int,
        metavar="S",
        help="tokens in a segment (default: the source's, or a quarter of its context, 512 at most)",
    )
    p.add_argument("--dtype", metavar="TYPE", help="float32, bfloat16 or float16 (default: as stored)")
    p.add_argument("--quantize", type=int, metavar="BITS", choices=(4, 6, 8), help="4, 6 or 8 bits for matrices")
    p.add_argument("--group-size", type=int, metavar="G", help="weights that share a scale: 32, 64 (default) or 128")
    p.add_argument("--tokenizer", metavar="DIR|performance", help="what the ids mean, if the source does not say")
    p.add_argument(
        "--verify", nargs="?", const=True, type=stored_logits, metavar="FILE.npz",
        help="run original and converted model on the same tokens and compare, or compare with stored logits",
    )  # fmt: skip
    p.add_argument("--force", action="store_true", help="replace DST")


def run(a: argparse.Namespace) -> None:
    if a.to_pytorch:
        run_export(a)
    else:
        run_import(a)


def run_import(a: argparse.Namespace) -> None:
    from dsmr_mlx.convert.importing import check_out, plan_conversion, write_conversion
    from dsmr_mlx.model import checkpoint
    from dsmr_mlx.model.bundled import locate

    if a.group_size is not None and a.quantize is None:
        raise UserError(f"--group-size {a.group_size}: expected --quantize beside it")
    source = locate(a.source)
    check_out(source, a.out, a.force)
    quantization = None
    if a.quantize is not None:
        quantization = {"bits": a.quantize, "group_size": 64 if a.group_size is None else a.group_size}
    conversion = plan_conversion(
        source,
        family=a.family,
        map_file=a.map,
        settings=model_settings(a.settings),
        allow_unused=a.allow_unused,
        horizons=a.horizons,
        segment_length=a.segment,
        dtype=a.dtype,
        quantization=quantization,
        tokenizer=a.tokenizer,
    )
    show_licence(source)
    show_conversion(conversion)
    verification = a.verify and verified(conversion, a.verify)
    with progress("converting", "tensors") as update:
        folder = write_conversion(
            conversion, a.out, verification=verification and verification.to_dict(), force=a.force, progress=update
        )
    out.print(f"{a.out}: {size(checkpoint.weight_bytes(folder))}")
    if conversion.tokenizer.no_notes is not None:
        out.print(conversion.tokenizer.no_notes)


def verified(conversion, reference: str | bool):
    """The comparison, shown. Raises `UserError` if it fails; nothing has been written by then."""
    from dsmr_mlx.convert.verification import verify

    verification = verify(conversion, None if reference is True else reference)
    show_verification(verification, conversion.compared)
    if not verification.passed:
        raise UserError(f"{conversion.source.path}: the converted model does not compute the same; nothing was written")
    return verification


def run_export(a: argparse.Namespace) -> None:
    from dsmr_mlx.convert.exporting import export
    from dsmr_mlx.model.bundled import locate

    given = ("family", "map", "settings", "allow_unused", "horizons", "segment", "dtype", "quantize", "verify")
    for name in (*given, "group_size", "tokenizer"):
        if getattr(a, name) not in (None, []):
            option = "set" if name == "settings" else name.replace("_", "-")
            raise UserError(f"--{option}: not with --to-pytorch, which writes a checkpoint as it is")
    source = locate(a.source)
    path = export(source, a.out, force=a.force)
    show_licence(source)
    out.print(f"{path}: {size(path.stat().st_size)}")


def stored_logits(name: str) -> str:
    """What may follow --verify: SRC, if it stands there, is not taken for a file of logits."""
    if not name.endswith(".npz"):
        raise argparse.ArgumentTypeError(f"{name!r}: expected a .npz file, or --verify behind SRC and DST")
    return name


def model_settings(settings: list[str]) -> dict[str, Any]:
    """`key=value` texts → fields of `ModelConfig`. Raises `UserError` for those that have options of their own."""
    from dsmr_mlx.common.config import parse_setting
    from dsmr_mlx.model.config import ModelConfig

    own = {"horizons": "--horizons", "segment_length": "--segment", "quantization": "--quantize"}
    parsed = dict(parse_setting(setting, ModelConfig) for setting in settings)
    for key in parsed.keys() & own.keys():
        raise UserError(f"--set {key}: expected {own[key]} for that")
    return parsed


def show_conversion(conversion: Any) -> None:
    """What a source is taken for, before it is converted."""
    c = conversion.config
    for note in conversion.notes:
        err.print(f"note: {note}")
    out.print(f"{conversion.source.path}: {conversion.family.name} ({conversion.family.about})")
    heads = f"{c.n_heads} heads of {c.head_dim}" + (f", {c.n_kv_heads} for keys" if c.n_kv_heads != c.n_heads else "")
    out.print(f"model: {c.n_layers} layers, d_model {c.d_model}, {heads}, vocabulary of {c.vocab_size:,}")
    horizons = parse(f"custom:{','.join(map(str, c.horizons))}", c.n_layers).describe(c.n_kv_heads, c.head_dim, 4)
    out.print(f"memory: {horizons}, segment {c.segment_length}")
    out.print(exactness(conversion.exactness, c.max_positions))


def exactness(e: Any, positions: int | None) -> str:
    """In words how far a converted model computes what the original does; `positions` are those that it has learned."""
    end = f"; a stream ends at {positions:,} tokens, where its table of positions does" if positions else ""
    if e.tokens is None:
        return f"exact: the horizons are the original's{end}"
    if not e.warm_start:
        return f"exact up to {e.tokens:,} tokens{end or '; beyond them it remembers what its horizons say'}"
    knows = f"the original knows {e.context:,}" if e.context else "the original's context is not known"
    if e.recurrent and e.context is None:
        knows = "the original reads any number with its own horizons"
    return f"a warm start: exact up to {e.tokens:,} tokens only, {knows}; train --init fine-tunes it{end}"


def show_verification(verification: Any, compared: str) -> None:
    """Differences of a converted model from its original; `compared` says which of its weights they are of."""
    rows = table("", "max absolute", "max relative")
    for what, absolute, relative in verification.rows:
        rows.add_row(what, f"{absolute:.2e}", f"{relative:.2e}")
    out.print(rows)
    verdict = "equal" if verification.passed else "NOT equal"
    tokens = " x ".join(map(str, verification.tokens))
    out.print(
        f"{verdict} to {verification.against} on {tokens} tokens, tolerance {verification.tolerance:.0e} relative; "
        f"the same likeliest token after {verification.agreement:.2%}; compared: {compared}"
    )
