"""Where tensors are: a model computes on its own device, whatever device they come on.

`fit` leaves a model on the device that it trained on, while images come from files and
pictures are drawn from main memory. So what the kit hands back takes tensors of any
device and answers on the device of its input; nothing is copied that is there already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature
from itertools import chain
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

_Method = TypeVar("_Method", bound=Callable[..., Any])


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's first weight; the CPU for one without any."""
    first = next(chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def moved(value: Any, device: torch.device | str) -> Any:
    """A tensor on a device, and so those in a mapping, list or tuple."""
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device)
    if isinstance(value, Mapping):
        return {key: moved(one, device) for key, one in value.items()}
    if isinstance(value, list | tuple):
        there = [moved(one, device) for one in value]
        return tuple(there) if isinstance(value, tuple) else there
    return value


def on_own_device(method: _Method) -> _Method:
    """Run a module's method where its weights are, and answer where its input is.

    Args:
        method: its first argument, a tensor or a list of tensors, is the input.
    """
    name = list(signature(method).parameters)[1]

    @wraps(method)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs.get(name)
        first = given[0] if isinstance(given, list | tuple) and given else given
        own = device_of(self)
        answer = method(self, *moved(args, own), **moved(kwargs, own))
        return moved(answer, first.device) if isinstance(first, Tensor) else answer

    return cast("_Method", run)
