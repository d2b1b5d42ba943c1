"""Modules that pickle also when they are parametrized (torch itself refuses to)."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize


class Picklable(nn.Module):
    """A module whose parametrized form can be pickled.

    ``torch.nn.utils.parametrize`` moves an instance to a class made at run time, which no pickle can name. The plain
    class and the state are pickled instead, and the run-time class is made again on loading.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not parametrize.is_parametrized(self):
            return super().__reduce_ex__(protocol)
        plain = type(self).__mro__[1]
        return _empty, (plain,), dict(self.__dict__), None, None, _fill


def _empty(plain: type[nn.Module]) -> nn.Module:
    return plain.__new__(plain)


def _fill(module: nn.Module, state: dict[str, Any]) -> None:
    module.__dict__.update(state)
    parametrizations = module.parametrizations
    assert isinstance(parametrizations, nn.ModuleDict)
    parametrize._inject_new_class(module)
    for name in parametrizations:
        parametrize._inject_property(module, name)
