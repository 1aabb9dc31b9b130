"""The tensors of a source as torch tensors, to fill the program that they were made for."""

import re
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.convert.rules import Tensors, plain_names

if TYPE_CHECKING:
    from torch import Tensor, nn

OTHERWISE = "or stored logits: --verify reference.npz"
# What programs store beside parameters: frequencies of RoPE, causal masks, the zeros of a norm without bias.
BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\b(attn|attention)\.(masked_)?bias|\.beta)$")


class Stored:
    """The tensors of a source, float32 torch tensors, by their names without wrappers, `prefix` and `body`."""

    def __init__(self, source: Tensors, prefix: str):
        self.source = source
        names = plain_names(source)
        self.names = {name[len(prefix) :]: there for name, there in names.items() if name.startswith(prefix)}

    def leave_out(self, body: str) -> None:
        """Forget the name of the module around most of the tensors, which some files have and others lack."""
        self.names = {name.removeprefix(body): there for name, there in self.names.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> "Tensor":
        """Raises `UserError` for a name that is not there."""
        import torch

        # NumPy has no bfloat16.
        return torch.from_numpy(np.array(self.source.read(self._stored(name)).astype(mx.float32)))

    def optional(self, name: str) -> "Tensor | None":
        """None for a name that is not there."""
        if name not in self:
            return None
        return self[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises `UserError` for a name that is not there."""
        return self.source.shapes[self._stored(name)]

    def count(self, pattern: str) -> int:
        """How many layers there are; `pattern` is the beginning of their tensors' names, with the layer's number."""
        found = (re.match(pattern, name) for name in self.names)
        numbers, n = {match[1] for match in found if match}, 0
        while str(n) in numbers:
            n += 1
        return n

    def check(self, module: "nn.Module", body: str = "") -> None:
        """Raise `UserError` unless `fill` can fill a module, which may be on the meta device.

        Raised for a parameter without a tensor, unless it is tied to another, for a tensor of another shape, and for
        one that belongs to a module without such a parameter. Tensors of modules that the original has not are left
        out: the conversion has refused them, or the user has allowed them.
        """
        places = {name.removeprefix(body): tensor for name, tensor in module.state_dict().items()}
        for name, there in self.names.items():
            if name in places and self.shape(name) != tuple(places[name].shape):
                found, expected = list(self.shape(name)), list(places[name].shape)
                raise self.error(f"{there} is {found}, in {type(module).__name__} it is {expected}")
        named = module.named_parameters(remove_duplicate=False)
        filled = {id(parameter) for name, parameter in named if name.removeprefix(body) in self}
        empty = [name for name, parameter in module.named_parameters() if id(parameter) not in filled]
        if empty:
            raise self.error(f"lacks {', '.join(empty[:8])}{' …' if len(empty) > 8 else ''}")
        modules = {name.removeprefix(body) for name, _ in module.named_modules() if name}
        for name, there in self.names.items():
            if name not in places and name.rpartition(".")[0] in modules and not BUFFERS.search(name):
                raise self.error(f"has {there}, {type(module).__name__} has not")

    def fill(self, module: "nn.Module", body: str = "") -> None:
        """Copy the tensors, one at a time, into the parameters and buffers of these names. Raises as `check` does."""
        self.check(module, body)
        places = {name.removeprefix(body): tensor for name, tensor in module.state_dict().items()}
        for name in self.names:
            if name in places:
                places[name].copy_(self[name])

    def error(self, problem: str, expected: str = "weights of its original") -> UserError:
        """To raise: the problem, and what there is instead."""
        return UserError(f"{self.source.path}: --verify: {problem}; expected {expected}, {OTHERWISE}")

    def _stored(self, name: str) -> str:
        if name not in self:
            raise self.error(f"lacks {name}")
        return self.names[name]
