"""`dsmr-mlx models`: what comes with the program."""

import argparse
import json

from dsmr_mlx.commands.common import add_command


def add(commands) -> None:
    p = add_command(commands, "models", run, "list the models that come with the program", "dsmr-mlx models")
    p.add_argument("--json", action="store_true", help="everything as JSON on standard output")


def run(a: argparse.Namespace) -> None:
    from dsmr_mlx import bundled, console

    models = [bundled.describe(name) for name in bundled.names()]
    if a.json:
        print(json.dumps([model.to_dict() for model in models], indent=2))
        return
    console.show_models(models)
