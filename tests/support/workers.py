"""Stands in for processes of the benchmarks."""


class InProcess:
    """Stands in for a `Worker` without a process, which takes seconds to begin."""

    def __init__(self, build, *arguments):
        self.turn = build(*arguments)

    def __call__(self):
        return self.turn()

    def memory(self):
        return {"held": 1 << 20, "peak": 2 << 20, "resident": 3 << 20}

    def close(self):
        pass
