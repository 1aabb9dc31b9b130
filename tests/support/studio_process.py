"""`dsmr-mlx studio` as a process, which can be killed and started again on the same port."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

STOPPED = 20.0  # seconds


class StudioProcess:
    """The studio of a folder; address: of its page, with the token."""

    def __init__(self, folder: Path, *arguments: str):
        self.folder, self.arguments = folder, arguments
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = ""
        self.process: subprocess.Popen | None = None

    def start(self) -> "StudioProcess":
        """Start it, and wait until it listens."""
        options = ["--no-browser", "--folder", str(self.folder), "--port", str(self.port)]
        command = [sys.executable, "-m", "dsmr_mlx", "studio", *options, *self.arguments]
        environment = os.environ | {"MLX_DISABLE_COMPILE": "1", "COLUMNS": "200"}
        self.process = subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        seen = ""
        for line in self.process.stdout:
            seen += line
            if found := re.search(r"http://\S+", line):
                self.address = found[0]
                return self
        raise RuntimeError(f"the studio has ended: {seen}")

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self.process.kill()
        self.process.wait(STOPPED)
        self.process.stdout.close()

    def close(self) -> None:
        """End it with a signal."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOPPED)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process.stdout.close()
