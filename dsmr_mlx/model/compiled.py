"""`mx.compile`, with an eager fallback on a CPU, where it needs a C++ compiler."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from dsmr_mlx.model.device import on_gpu


class Compiled:
    """A function of arrays that runs compiled if `compiled` is true, else eagerly; on a CPU only if the compiler works.

    On a GPU, an error in the first call is raised: it is a bug, or memory is short. The shapes of the arguments should
    not change.

    inputs: a list or dict of arrays outside the arguments, such as a model's parameters, that may change between calls;
        a compiled function keeps everything else outside its arguments as it was at the first call
    lazy: return arrays that are not evaluated yet
    """

    def __init__(self, function: Callable[..., Any], compiled: bool, inputs: Any = None, lazy: bool = False):
        self.function, self.lazy = function, lazy
        captured = {} if inputs is None else {"inputs": inputs}
        self.compiled = mx.compile(function, **captured) if compiled else None
        self.works = False

    def __call__(self, *arguments: Any) -> Any:
        if self.compiled is not None and not self.works:
            try:
                outputs = self.compiled(*arguments)
                mx.eval(outputs)
            except RuntimeError:
                if on_gpu():
                    raise
                self.compiled = None  # no compiler, or a broken one; only the first call shows it
            else:
                self.works = True
                return outputs
        outputs = (self.compiled or self.function)(*arguments)
        if not self.lazy:
            mx.eval(outputs)
        return outputs
