"""Conversion between PyTorch checkpoints and MLX. The files are in `convert/`, installed as `dsmr_mlx.convert`.

    conversion = plan_conversion("model.pt")  # detect the architecture, plan every parameter
    verification = verify(conversion)         # compare the logits with those of the original
    write_conversion(conversion, "model", verification=verification.to_dict())
    export("model", "back.pt")

These names are imported on first use; `reference` is the PyTorch model.
"""

from dsmr_mlx.common.lazy import lazily

_HOME = {
    "export": "exporting",
    "plan_conversion": "importing",
    "verify": "verification",
    "write_conversion": "importing",
}

__all__ = sorted(_HOME)
__getattr__ = lazily(__name__, _HOME)
