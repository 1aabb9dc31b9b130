"""The weights of a source as torch tensors, to load into the original PyTorch model."""

import re
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.convert.rules import plain_names
from dsmr_mlx.convert.weights_source import WeightsSource

if TYPE_CHECKING:
    from torch import Tensor, nn

OR_LOGITS = "or `logits_file` reference.npz with stored logits"
# Stored beside parameters: RoPE frequencies, causal masks, the zero beta of a norm without bias.
BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\b(attn|attention)\.(masked_)?bias|\.beta)$")


class StateDict:
    """The tensors of a source as float32 torch tensors, by name without wrappers and `prefix`."""

    def __init__(self, source: WeightsSource, prefix: str):
        self.source = source
        names = plain_names(source)
        self.names = {name[len(prefix) :]: stored for name, stored in names.items() if name.startswith(prefix)}

    def remove_prefix(self, body: str) -> None:
        """Remove the name of the module around most tensors, which some files lack."""
        self.names = {name.removeprefix(body): stored for name, stored in self.names.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> "Tensor":
        """Return a tensor. Raises `UserError` if it is missing."""
        import torch

        # NumPy has no bfloat16.
        return torch.from_numpy(np.array(self.source.read(self._stored_name(name)).astype(mx.float32)))

    def optional(self, name: str) -> "Tensor | None":
        """Return a tensor, or None if it is missing."""
        if name not in self:
            return None
        return self[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor. Raises `UserError` if it is missing."""
        return self.source.shapes[self._stored_name(name)]

    def count(self, pattern: str) -> int:
        """Return the number of layers. pattern: start of their tensors' names, with a group for the layer number."""
        found = (re.match(pattern, name) for name in self.names)
        numbers, n = {match[1] for match in found if match}, 0
        while str(n) in numbers:
            n += 1
        return n

    def check(self, module: "nn.Module", body: str = "") -> None:
        """Raise `UserError` unless `load_into` can fill a module, which may be on the meta device.

        It cannot if a parameter has no tensor (unless it is tied to another), a tensor has another shape, or a known
        submodule has no parameter for a tensor. Tensors of unknown submodules are skipped: the conversion has refused
        them, or the user has allowed them.
        """
        targets = {name.removeprefix(body): tensor for name, tensor in module.state_dict().items()}
        for name, stored in self.names.items():
            if name in targets and self.shape(name) != tuple(targets[name].shape):
                found, expected = self.shape(name), tuple(targets[name].shape)
                raise self.error(f"{stored} is {found}, in {type(module).__name__} it is {expected}")
        named = module.named_parameters(remove_duplicate=False)
        filled = {id(parameter) for name, parameter in named if name.removeprefix(body) in self}
        empty = [name for name, parameter in module.named_parameters() if id(parameter) not in filled]
        if empty:
            raise self.error(f"lacks {', '.join(empty[:8])}{' …' if len(empty) > 8 else ''}")
        modules = {name.removeprefix(body) for name, _ in module.named_modules() if name}
        for name, stored in self.names.items():
            if name not in targets and name.rpartition(".")[0] in modules and not BUFFERS.search(name):
                raise self.error(f"has {stored}, which {type(module).__name__} lacks")

    def load_into(self, module: "nn.Module", body: str = "") -> None:
        """Copy the tensors, one at a time, into the parameters and buffers of a module. Raises as `check` does."""
        self.check(module, body)
        targets = {name.removeprefix(body): tensor for name, tensor in module.state_dict().items()}
        for name in self.names:
            if name in targets:
                targets[name].copy_(self[name])

    def error(self, problem: str, expected: str = "weights of its original") -> UserError:
        """Return an error to raise: the original cannot be rebuilt from this source."""
        return UserError(f"{self.source.path}: cannot verify: {problem}; expected {expected}, {OR_LOGITS}")

    def _stored_name(self, name: str) -> str:
        if name not in self:
            raise self.error(f"lacks {name}")
        return self.names[name]
