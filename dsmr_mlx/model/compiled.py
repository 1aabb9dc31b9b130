"""Compilation that pays where it can and is never needed: a function runs as it is where its compiler fails."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx


class Compiled:
    """A function of arrays, compiled if wanted and if the compiler can do it; its shapes should not change.

    It gives evaluated arrays, but with `lazy` those that the caller is to evaluate. `inputs`, a list or dict of arrays
    such as a model's parameters, is read anew at each call: what else a compiled function finds outside its arguments
    stays as it was at the first one.
    """

    def __init__(self, function: Callable[..., Any], compiled: bool, inputs: Any = None, lazy: bool = False):
        self.function, self.lazy = function, lazy
        captured = {} if inputs is None else {"inputs": inputs}
        self.compiled = mx.compile(function, **captured) if compiled else None
        self.proven = False

    def __call__(self, *arguments: Any) -> Any:
        if self.compiled is not None and not self.proven:
            try:
                outputs = self.compiled(*arguments)
                mx.eval(outputs)
            except RuntimeError:
                self.compiled = None  # no compiler, or one that fails: the first call says so
            else:
                self.proven = True
                return outputs
        outputs = (self.compiled or self.function)(*arguments)
        if not self.lazy:
            mx.eval(outputs)
        return outputs
