"""A run's folder, read without MLX."""

import json

from support.tiny import tiny_config

from dsmr_mlx.training.run_record import RunRecord


def test_the_best_validation_is_on_the_last_validation_set(tmp_path):
    """As in the run itself, which resets the best when the set changes, also back to one of before."""
    (tmp_path / "config.json").write_text(tiny_config().to_json())

    def best(*losses_and_tokens) -> int | None:
        lines = [
            {"kind": "validation", "step": i, "nats_per_token": loss, "tokens": tokens}
            for i, (loss, tokens) in enumerate(losses_and_tokens)
        ]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        found = RunRecord.read(tmp_path).best
        return found and found["step"]

    assert best() is None
    assert best((1.0, 1000), (1.5, 2000), (1.4, 2000), (1.4, 2000)) == 2
    assert best((1.0, 1000), (1.5, 2000), (1.2, 1000), (1.3, 1000)) == 2
