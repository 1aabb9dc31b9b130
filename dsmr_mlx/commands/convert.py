"""`dsmr-mlx convert`: checkpoints of PyTorch programs, in and out."""

import argparse
from typing import Any

from dsmr_mlx.commands.common import HelpFormatter
from dsmr_mlx.errors import UserError

EXAMPLES = """examples:
  dsmr-mlx convert model.pt model --verify
  dsmr-mlx convert Llama-3.2-1B llama --segment 256 \\
    --horizons two-scale:long=4x2048,short=256
  dsmr-mlx convert runs/first small-8bit --quantize 8
  dsmr-mlx convert --to-pytorch runs/first model.pt"""


def add(commands) -> None:
    p = commands.add_parser(
        "convert",
        help="bring a PyTorch checkpoint here, take one back, cast or quantize",
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
    from dsmr_mlx import checkpoint, console
    from dsmr_mlx.bundled import located
    from dsmr_mlx.convert.importing import check_out, plan_conversion, write_conversion

    if a.group_size is not None and a.quantize is None:
        raise UserError(f"--group-size {a.group_size}: expected --quantize beside it")
    source = located(a.source)
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
    console.show_licence(source)
    console.show_conversion(conversion)
    verification = a.verify and verified(conversion, a.verify)
    with console.progress("converting", "tensors") as progress:
        folder = write_conversion(
            conversion, a.out, verification=verification and verification.to_dict(), force=a.force, progress=progress
        )
    console.out.print(f"{a.out}: {console.size(checkpoint.weight_bytes(folder))}")
    if conversion.tokenizer.no_notes is not None:
        console.out.print(conversion.tokenizer.no_notes)


def verified(conversion, reference: str | bool):
    """The comparison, shown. Raises `UserError` if it fails; nothing has been written by then."""
    from dsmr_mlx import console
    from dsmr_mlx.convert.verification import verify

    verification = verify(conversion, None if reference is True else reference)
    console.show_verification(verification, conversion.compared)
    if not verification.passed:
        raise UserError(f"{conversion.source.path}: the converted model does not compute the same; nothing was written")
    return verification


def run_export(a: argparse.Namespace) -> None:
    from dsmr_mlx import console
    from dsmr_mlx.bundled import located
    from dsmr_mlx.convert.exporting import export

    given = ("family", "map", "settings", "allow_unused", "horizons", "segment", "dtype", "quantize", "verify")
    for name in (*given, "group_size", "tokenizer"):
        if getattr(a, name) not in (None, []):
            option = "set" if name == "settings" else name.replace("_", "-")
            raise UserError(f"--{option}: not with --to-pytorch, which writes a checkpoint as it is")
    source = located(a.source)
    path = export(source, a.out, force=a.force)
    console.show_licence(source)
    console.out.print(f"{path}: {console.size(path.stat().st_size)}")


def stored_logits(name: str) -> str:
    """What may follow --verify: SRC, if it stands there, is not taken for a file of logits."""
    if not name.endswith(".npz"):
        raise argparse.ArgumentTypeError(f"{name!r}: expected a .npz file, or --verify behind SRC and DST")
    return name


def model_settings(settings: list[str]) -> dict[str, Any]:
    """`key=value` texts → fields of `ModelConfig`. Raises `UserError` for those that have options of their own."""
    from dsmr_mlx.config import ModelConfig
    from dsmr_mlx.settings import parse_setting

    own = {"horizons": "--horizons", "segment_length": "--segment", "quantization": "--quantize"}
    parsed = dict(parse_setting(setting, ModelConfig) for setting in settings)
    for key in parsed.keys() & own.keys():
        raise UserError(f"--set {key}: expected {own[key]} for that")
    return parsed
