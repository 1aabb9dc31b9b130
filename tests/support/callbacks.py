"""Training callbacks that record or stop a run."""

import os
import signal

from dsmr_mlx.training.run import Callback


class StopAt(Callback):
    """Send SIGINT after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step(self, run, record):
        """Send the signal if this is the step."""
        if record.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


class Watch(Callback):
    """Record the events of a run."""

    def __init__(self):
        self.events = []

    def on_start(self, run, resumed_from):
        """Record the checkpoint that the run resumes from, or None."""
        self.events.append(("start", resumed_from))

    def on_step(self, run, record):
        """Record the number of the step."""
        self.events.append(("step", record.step))

    def on_validation(self, run, evaluation, is_best):
        """Record the step of the validation and whether it is the best."""
        self.events.append(("validation", run.trainer.progress.step, is_best))

    def on_message(self, run, message):
        """Record the message."""
        self.events.append(("message", message))

    def on_end(self, run, reason):
        """Record why the run ended."""
        self.events.append(("end", reason))
