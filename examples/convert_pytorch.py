"""Convert a PyTorch checkpoint: show the mapping of its tensors, verify the result, and make music with it.

    python examples/convert_pytorch.py                # writes a PyTorch checkpoint first
    python examples/convert_pytorch.py my-model.pt    # or .safetensors, or a Hugging Face folder

Needs the `convert` extra. Verifying a model of transformers or x-transformers needs that package, too.
"""

import argparse
import sys
from pathlib import Path

import dsmr_mlx
from dsmr_mlx import MaxNoteSeconds
from dsmr_mlx.convert import export, plan_conversion, verify, write_conversion
from dsmr_mlx.model.checkpoint import resolve
from dsmr_mlx.music.summary import summarize


def main() -> None:
    """Plan, verify and write a conversion, then generate with the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path, help="a PyTorch checkpoint")
    parser.add_argument("--model", help="the model to export if no SOURCE is given")
    parser.add_argument("--seconds", type=float, default=15.0, help="length of the music")
    parser.add_argument("--out", type=Path, default=Path("example-output/converted"), help="output folder")
    a = parser.parse_args()

    a.out.mkdir(parents=True, exist_ok=True)
    if a.source is None:
        a.source = export(resolve(a.model), a.out / "model.pt", force=True)
        print(f"{a.source}: {a.source.stat().st_size:,} bytes, for torch.load")

    conversion = plan_conversion(a.source)  # writes nothing; reads one tensor at a time
    print(f"family: {conversion.family.name}, {conversion.config.n_layers} layers, {conversion.dtype}")
    for step in conversion.steps[:4]:
        print(f"  {' + '.join(step.sources)} → {step.target} ({step.transform})")
    print(f"  … {len(conversion.steps)} parameters in all")

    verification = verify(conversion)  # runs both models on the same random tokens, in float32
    for row in verification.rows:
        print(f"  {row.what:12} differs by {row.max_absolute:.1e}, relative {row.max_relative:.1e}")
    print(f"compared with {verification.against}: {'the same' if verification.passed else 'NOT THE SAME'}")

    folder = write_conversion(conversion, a.out / "model", verification=verification.to_dict(), force=True)
    model, tokenizer = dsmr_mlx.load(folder)
    if not tokenizer.decodes:  # the vocabulary of another program: ids in, ids out
        print(list(dsmr_mlx.generate(model, tokenizer, prompt=[0], tokens=64)))
        return
    stream = dsmr_mlx.generate(
        model, tokenizer, seconds=a.seconds, processors=[MaxNoteSeconds(4)], seed=2, as_notes=True
    )
    notes = dsmr_mlx.Notes.of(stream)
    dsmr_mlx.write_notes(notes, a.out / "music.mid")
    print(f"{a.out / 'music.mid'}: {summarize(notes)}")


if __name__ == "__main__":
    try:
        main()
    except dsmr_mlx.UserError as error:
        sys.exit(f"convert_pytorch: error: {error}")
