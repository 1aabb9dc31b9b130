"""Checkpoints of other frameworks. Lives in `convert/` of the repository, installed as `dsmr_mlx.convert`.

    conversion = plan_conversion("model.pt")  # what would become of it
    verification = verify(conversion)         # the same logits as the original's?
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
