"""Training callbacks that record or stop a run."""

import os
import signal

from dsmr_mlx.training.run import Callback


class StopAt(Callback):
    """Send SIGINT after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step(self, run, record):
        if record.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


class Watch(Callback):
    """Record the events of a run."""

    def __init__(self):
        self.events = []

    def on_start(self, run, resumed_from):
        self.events.append(("start", resumed_from))

    def on_step(self, run, record):
        self.events.append(("step", record.step))

    def on_validation(self, run, evaluation, is_best):
        self.events.append(("validation", run.trainer.progress.step, is_best))

    def on_message(self, run, message):
        self.events.append(("message", message))

    def on_end(self, run, reason):
        self.events.append(("end", reason))
