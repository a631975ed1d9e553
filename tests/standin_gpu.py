"""A stand-in for a GPU, for machines that have none: what fails there fails here.

The stand-in is a device of PyTorch's own, on its (experimental) Python backend. Each of
its tensors wraps a CPU tensor with the numbers. As on a GPU, they mix with no CPU
tensor, and neither NumPy nor Matplotlib reads them before `.cpu()`.

`install()` makes ``torch.device("cuda")`` and Lightning's trainer mean the stand-in,
for the rest of the process: call it before anything is computed, in a process of its
own. The kit runs unchanged.

Not modelled: streams, the allocator, precision (all is computed as asked on the CPU),
inference tensors (inference mode is `no_grad` here), more than one device, and the
string "cuda" given to PyTorch itself, as in ``tensor.to("cuda")``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.optim.optimizer import _foreach_supported_types
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._device import DeviceContext, _device_constructors

try:
    from torch.utils.backend_registration import (
        _DummyBackendModule,
        _setup_privateuseone_for_python_backend,
    )
except ImportError:  # before PyTorch 2.9
    AVAILABLE = False
    _DummyBackendModule = object
else:
    AVAILABLE = True

NAME = "standin"
aten = torch.ops.aten
RealDevice = torch.device
_libraries: list[torch.library.Library] = []  # a library ends with its last reference

COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
# What autocast does to the operations that matter here, as on CUDA.
LOW_PRECISION = (
    "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "conv2d",
    "conv_transpose2d.input",
    "scaled_dot_product_attention",
)  # fmt: skip
FULL_PRECISION = (
    "layer_norm", "group_norm", "softmax.int", "log_softmax.int", "cross_entropy_loss",
    "mse_loss", "binary_cross_entropy_with_logits", "cdist",
)  # fmt: skip


class StandinTensor(Tensor):
    """A tensor of the stand-in; `inner` is a CPU tensor with its numbers."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> StandinTensor:
        tensor = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=RealDevice(NAME, 0),
            requires_grad=requires_grad,
        )
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return compute(func, args, kwargs or {})

    # What a GPU refuses.

    def numpy(self, *, force: bool = False) -> np.ndarray:
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu()"
            " to copy the tensor to host memory first."
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.numpy()

    # What a GPU can do and PyTorch's wrapped tensors cannot.

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, StandinTensor):
            raise RuntimeError(
                "Attempted to call `variable.set_data(tensor)`, but `variable` and "
                "`tensor` have incompatible tensor type."
            )
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.inner = value.inner

    def __getitem__(self, key: Any) -> Tensor:
        return super().__getitem__(_with_index_tensors(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(_with_index_tensors(key), value)

    def tolist(self) -> Any:
        return self.inner.tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{repr(self.inner.detach())[:-1]}, device='{self.device}')"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else str(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> StandinTensor:
        if has_torch_function((self,)):  # a mode that copies in a way of its own
            deepcopy = Tensor.__deepcopy__
            return handle_torch_function(deepcopy, (self,), self, memo)
        if id(self) not in memo:
            copy = StandinTensor(self.inner.detach().clone(), self.requires_grad)
            copy.__dict__.update({k: v for k, v in vars(self).items() if k != "inner"})
            memo[id(self)] = copy
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # as PyTorch saves tensors of devices whose memory it cannot read
        inner = self.inner.detach()
        restore = torch._utils._rebuild_device_tensor_from_cpu_tensor
        return restore, (inner, self.dtype, str(self.device), self.requires_grad)


def compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One operation, on the numbers inside, after what a GPU would check."""
    ours: list[StandinTensor] = []
    others: list[Tensor] = []
    plain = [_inner(value, ours, others) for value in args]
    named = {name: _inner(value, ours, others) for name, value in kwargs.items()}
    if ours and others or "generator" in kwargs:
        _check(func, args, kwargs, ours, others)
    result = func(*plain, **named)
    if func is aten.copy_.default:
        return args[0]
    target = kwargs.get("device")
    if target is None and not ours or target and RealDevice(target).type != NAME:
        return result
    return _wrapped(result, _changed(func, ours))


def _changed(func: Any, ours: list[StandinTensor]) -> dict[int, StandinTensor]:
    """The tensors that an operation changes in place, by what is inside them."""
    if not func._schema.is_mutable:
        return {}
    same = {id(one.inner): one for one in ours if one.inner.shape == one.shape}
    if len(same) < len({id(one.inner) for one in ours}):
        if "out" not in func._overloadname:
            raise NotImplementedError(f"{func} changes a shape in place")
    return same


def _check(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    ours: list[StandinTensor],
    others: list[Tensor],
) -> None:
    """Raise where a GPU would: tensors of two devices, or a generator of another."""
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type == "cpu":
        raise RuntimeError(f"Expected a '{NAME}' device type for generator: {func}")
    if not (ours and others) or func in COPIES:
        return
    if func in INDEXING and isinstance(args[0], StandinTensor):
        # indices may be on the CPU, the values to put there may not
        others = [value for value in args[2:] if type(value) is Tensor]
    # a single number on the CPU is taken along
    if any(other.dim() > 0 for other in others):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two "
            f"devices, {NAME}:0 and cpu! (in {func})"
        )


def _inner(value: Any, ours: list[StandinTensor], others: list[Tensor]) -> Any:
    """A value without its wrapping; notes which tensors were there."""
    if isinstance(value, StandinTensor):
        ours.append(value)
        return value.inner
    if isinstance(value, Tensor):
        others.append(value)
    elif isinstance(value, list | tuple):
        return [_inner(one, ours, others) for one in value]
    elif isinstance(value, RealDevice):
        return RealDevice("cpu") if value.type == NAME else value
    return value


def _wrapped(result: Any, known: dict[int, StandinTensor]) -> Any:
    """A result as the stand-in hands it out; arguments changed in place are kept."""
    if isinstance(result, Tensor):
        found = known.get(id(result))
        return StandinTensor(result) if found is None else found
    if isinstance(result, list | tuple):
        return type(result)([_wrapped(one, known) for one in result])
    return result


def _with_index_tensors(key: Any) -> Any:
    """An index in which each list is a tensor."""
    if isinstance(key, list | range | np.ndarray):
        return torch.as_tensor(np.asarray(key))
    if isinstance(key, tuple):
        return tuple(_with_index_tensors(one) for one in key)
    return key


class _Backend(_DummyBackendModule):  # type: ignore[misc, valid-type]
    """What `torch.standin` answers."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def get_rng_state(self, *_: Any) -> Tensor:
        return torch.get_rng_state()  # one generator serves both devices

    def set_rng_state(self, state: Tensor, *_: Any) -> None:
        torch.set_rng_state(state)


class _DeviceMeta(type):
    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, RealDevice)


class Device(metaclass=_DeviceMeta):
    """`torch.device` for which "cuda" is the stand-in."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        device = RealDevice(*args, **kwargs)
        return RealDevice(NAME, 0) if device.type == "cuda" else device


def wanted() -> bool:
    """Whether tests use the stand-in: GEOPEFT_TEST_DEVICE=cpu turns it off."""
    return AVAILABLE and os.environ.get("GEOPEFT_TEST_DEVICE", "") != "cpu"


def install() -> None:
    """Make this process believe that it has a GPU. It cannot be undone."""
    if not AVAILABLE:
        raise RuntimeError(
            f"the stand-in needs PyTorch 2.9 or newer; this is {torch.__version__}."
        )
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    _register()
    torch.device = Device  # type: ignore[misc, assignment]
    torch.inference_mode = torch.no_grad  # type: ignore[assignment, misc]
    # `with torch.device(...)` knows the true torch.tensor from now on
    _device_constructors()
    torch.tensor = _tensor_on_device(torch.tensor)
    torch.as_tensor = _tensor_on_device(torch.as_tensor)
    # a module keeps its parameters when it moves, and optimisers step in one go
    torch.__future__.set_swap_module_params_on_conversion(True)
    _foreach_supported_types.append(StandinTensor)
    Tensor.pin_memory = lambda self, device=None: self  # type: ignore[method-assign]
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_name = lambda device=None: "stand-in GPU"
    safetensors.torch.load_file = _load_file_to_device(safetensors.torch.load_file)
    _patch_lightning()


def _register() -> None:
    """Say what happens to operations that no CPU tensor takes part in."""

    def empty(size: Any, *, dtype: Any = None, **_: Any) -> StandinTensor:
        return StandinTensor(torch.empty(size, dtype=dtype, device="cpu"))

    def empty_strided(
        size: Any, stride: Any, *, dtype: Any = None, **_: Any
    ) -> StandinTensor:
        return StandinTensor(
            torch.empty_strided(size, stride, dtype=dtype, device="cpu")
        )

    def anything(op: Any, *args: Any, **kwargs: Any) -> Any:
        return compute(op, args, kwargs)

    every = torch.library.Library("_", "IMPL")
    every.fallback(anything, "PrivateUse1")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    some = torch.library.Library("aten", "IMPL")
    some.impl("empty.memory_format", empty, "PrivateUse1")
    some.impl("empty_strided", empty_strided, "PrivateUse1")
    for name in LOW_PRECISION + FULL_PRECISION:
        some.impl(name, _autocast(name, name in LOW_PRECISION), "AutocastPrivateUse1")
    _libraries.extend([every, some])


def _autocast(name: str, low: bool) -> Callable[..., Any]:
    """An operation that autocast computes in its precision, or in 32 bit."""
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(aten, packet), overload or "default")
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(*args: Any, **kwargs: Any) -> Any:
        kind = torch.get_autocast_dtype(NAME) if low else torch.float32

        def fit(value: Any) -> Any:
            fits = isinstance(value, StandinTensor) and value.is_floating_point()
            return value.to(kind) if fits else value

        with torch._C._ExcludeDispatchKeyGuard(autocast):
            named = {key: fit(value) for key, value in kwargs.items()}
            return operation(*map(fit, args), **named)

    return cast


def _context_device() -> torch.device | None:
    """The device of the innermost ``with torch.device(...)``."""
    modes = torch.overrides._get_current_function_mode_stack()
    return next((m.device for m in modes[::-1] if isinstance(m, DeviceContext)), None)


def _tensor_on_device(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.tensor` by way of the CPU, since PyTorch's own way there is in C++."""

    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if isinstance(data, StandinTensor):
            return data.to(device) if device is not None else data
        data = _numbers(data)
        device = _context_device() if device is None else device
        if device is None or RealDevice(device).type != NAME:
            given = {} if device is None else {"device": device}
            return make(data, *args, **given, **kwargs)
        return make(data, *args, device="cpu", **kwargs).to(device)

    return made


def _load_file_to_device(load: Callable[..., Any]) -> Callable[..., Any]:
    """`safetensors.torch.load_file` by way of the CPU."""

    def loaded(filename: Any, device: Any = "cpu") -> dict[str, Tensor]:
        place = torch.device(device)  # "cuda" is the stand-in
        return {name: tensor.to(place) for name, tensor in load(filename).items()}

    return loaded


def _numbers(data: Any) -> Any:
    """Nested lists of tensors as nested lists of numbers."""
    if isinstance(data, list | tuple):
        return [_numbers(one) for one in data]
    return data.tolist() if isinstance(data, StandinTensor) else data


def _patch_lightning() -> None:
    """Let every trainer train on the stand-in."""
    import lightning
    from lightning.pytorch.accelerators import CPUAccelerator
    from lightning.pytorch.plugins import MixedPrecision
    from lightning.pytorch.strategies import SingleDeviceStrategy

    class Accelerator(CPUAccelerator):
        def setup_device(self, device: Any) -> None:
            """Nothing: the stand-in is always there."""

    class Trainer(lightning.Trainer):
        def __init__(self, **options: Any) -> None:
            options.pop("accelerator", None)
            place = RealDevice(NAME, 0)
            strategy = SingleDeviceStrategy(place, accelerator=Accelerator())
            options |= {"devices": 1, "strategy": strategy}
            if str(options.get("precision")).endswith("-mixed"):
                plugin = MixedPrecision(options.pop("precision"), NAME)
                options["plugins"] = [plugin]
            super().__init__(**options)

    lightning.Trainer = lightning.pytorch.Trainer = Trainer  # type: ignore[misc]
