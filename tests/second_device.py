"""A second device for machines that have only a CPU: tensors that report the device `second:0`.

Their values live in CPU memory, so every result can be compared with the CPU's. Two properties of
an accelerator are kept: an operation whose tensors are on different devices is refused, and what
makes the host wait for CUDA is counted: reading a value, a size that depends on values, and copies
in either direction that are not `non_blocking` (what such a copy fetches is there at once, here:
that somebody reads it too early is not noticed). It builds on torch's registration of backends that
are written in Python (torch.utils.backend_registration, torch 2.11).

tests/conftest.py imports this module before mmllm, because `torch.inference_mode` is replaced by a
class that can turn into `torch.no_grad`: views of wrapped tensors cannot be made in inference mode.

    def test_reply(second: torch.device) -> None:
        with host_waits() as waits:
            model.to(second)(...)
        assert waits.total() <= 1
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._contextlib import _DecoratorContextManager
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

NAME = "second"

_COUNTING: list[Counter[str]] = []


@contextmanager
def host_waits() -> Iterator[Counter[str]]:
    """Counts, by name, what made the host wait for the device since the block began."""
    counted: Counter[str] = Counter()
    _COUNTING.append(counted)
    try:
        yield counted
    finally:
        _COUNTING[:] = [entry for entry in _COUNTING if entry is not counted]


def _waited(name: str) -> None:
    for counted in _COUNTING:
        counted[name] += 1


# --- inference mode -----------------------------------------------------------------------------

_inference_mode = torch.inference_mode
_as_no_grad = False


class _InferenceMode(_DecoratorContextManager):
    """`torch.inference_mode`, or `torch.no_grad` inside `inference_as_no_grad`. The choice is made
    on entry, so that functions decorated at import time follow it."""

    def __new__(cls, mode: Any = True) -> Any:
        return super().__new__(cls) if isinstance(mode, bool) else cls()(mode)

    def __init__(self, mode: bool = True):
        self.mode = mode

    def __enter__(self) -> None:
        if _as_no_grad:
            self.context: Any = torch.set_grad_enabled(torch.is_grad_enabled() and not self.mode)
        else:
            self.context = _inference_mode(self.mode)
            self.context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)

    def clone(self) -> _InferenceMode:
        return type(self)(self.mode)


torch.inference_mode = _InferenceMode  # pyright: ignore


@contextmanager
def inference_as_no_grad() -> Iterator[None]:
    """Inside it, in all threads, inference mode only turns gradients off."""
    global _as_no_grad
    _as_no_grad = True
    try:
        yield
    finally:
        _as_no_grad = False


# --- the backend --------------------------------------------------------------------------------


class _Backend(backend_registration._DummyBackendModule):
    """What torch looks up as `torch.second`."""

    def manual_seed(self, seed: int) -> None: ...

    def manual_seed_all(self, seed: int) -> None: ...

    def synchronize(self, *device: Any) -> None:
        _waited("synchronize")

    def empty_cache(self) -> None: ...

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, *device: Any) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, *state: Any) -> None: ...


backend_registration._setup_privateuseone_for_python_backend(NAME, _Backend())
DEVICE = torch.device(NAME, 0)


class SecondTensor(Tensor):
    """A tensor on the second device; `values` holds its numbers on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, requires_grad: bool = False) -> SecondTensor:
        wrapped = Tensor._make_wrapper_subclass(  # pyright: ignore
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
            layout=values.layout,
            requires_grad=requires_grad,
        )
        wrapped.values = values
        return wrapped

    def __init__(self, values: Tensor, requires_grad: bool = False): ...

    def __repr__(self, **options: Any) -> str:
        return f"SecondTensor({self.values!r})"

    def tolist(self) -> Any:
        _waited("tolist")
        return self.values.detach().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            made = SecondTensor(self.values.detach().clone())
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = (
                torch.nn.Parameter(made, self.requires_grad)
                if is_parameter
                else made.requires_grad_(self.requires_grad)
            )
        return memo[id(self)]

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.values.untyped_storage()

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict, meta: None, size: Any, stride: Any) -> SecondTensor:
        return SecondTensor(inner["values"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


_READS = {
    *("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"),
    *("aten::masked_select", "aten::bincount", "aten::_unique2", "aten::unique_consecutive"),
}
"""What answers on the host, be it only with the size of its result."""
_COPIES = {"aten::_to_copy", "aten::copy_", "aten::to"}
_CPU_INDICES = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
"""What CUDA too accepts indices on the CPU for."""


_INSTEAD: dict[str, Any] = {
    "aten::_conj": torch.conj_physical,
    "aten::_neg_view": torch.neg,
    "aten::histc": lambda values, *args: torch.histc(values.float(), *args).to(values.dtype),
}
"""What torch would note in a bit of the values, which nobody reads below `__torch_dispatch__`, and
what accelerators compute of integers and the CPU does not."""


def _is_second(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on the values, after the checks that an accelerator makes."""
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, SecondTensor)]
    name, target = func._schema.name, kwargs.get("device")
    if ours and name not in _COPIES | _CPU_INDICES:
        _refuse_mixed(name, tensors)
    if ours:
        _refuse_generators(name, tree_flatten((args, kwargs))[0])
        if _waits(name, args, kwargs):
            _waited(name)

    def unwrapped(leaf: Any) -> Any:
        if isinstance(leaf, SecondTensor):
            return leaf.values
        if isinstance(leaf, torch.device) and leaf.type == NAME:
            return torch.device("cpu")
        return leaf

    plain = tree_map(unwrapped, kwargs)
    if plain.get("pin_memory"):
        plain["pin_memory"] = False
    result = _INSTEAD.get(name, func)(*tree_map(unwrapped, args), **plain)
    if target is not None:
        stays = _is_second(target)
    elif name == "aten::copy_":
        stays = isinstance(args[0], SecondTensor)
    else:
        stays = bool(ours)
    if not stays:
        return result

    def wrapped(leaf: Any) -> Any:
        is_plain = isinstance(leaf, Tensor) and not isinstance(leaf, SecondTensor)
        return SecondTensor(leaf) if is_plain else leaf

    result = tree_map(wrapped, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if ours else result


def _waits(name: str, args: Any, kwargs: Any) -> bool:
    """Whether CUDA would let the host wait. Copies do, both ways, unless they are non-blocking or
    of nothing, and so does what has to know how many entries of a mask are true."""
    if name in _COPIES and args[0].numel() == 0:
        return False
    if name == "aten::_to_copy":
        target = kwargs.get("device")
        leaves = target is not None and not _is_second(target)
        return leaves and not kwargs.get("non_blocking")
    if name == "aten::copy_":
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        return blocking and not all(isinstance(tensor, SecondTensor) for tensor in args[:2])
    if name in _CPU_INDICES:
        fills = name != "aten::index" and args[2].numel() == 1  # becomes masked_fill
        indices = [index for index in args[1] if index is not None]
        masks = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        moved = not all(isinstance(index, SecondTensor) for index in indices)
        return moved or (masks and not fills)
    return name in _READS


def _refuse_generators(name: str, leaves: list[Any]) -> None:
    """An accelerator draws from a generator of its own; noise of the CPU's is drawn there."""
    for leaf in leaves:
        if isinstance(leaf, torch.Generator) and leaf.device.type != NAME:
            raise RuntimeError(
                f"Expected a '{NAME}' device type for generator but found '{leaf.device.type}' "
                f"in {name}"
            )


def _refuse_mixed(name: str, tensors: list[Tensor]) -> None:
    """As CUDA does; a CPU tensor of no dimensions is a number."""
    wrong = [t for t in tensors if not isinstance(t, SecondTensor) and t.ndim > 0]
    wrong = [tensor for tensor in wrong if tensor.device.type != "meta"]
    if wrong:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in wrong)
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found {DEVICE} and cpu in "
            f"{name}: {shapes}"
        )


_LIBRARY = torch.library.Library("aten", "IMPL")


def _empty(
    size: Any,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
    memory_format: Any = None,
) -> Tensor:
    return SecondTensor(torch.empty(size, dtype=dtype or torch.get_default_dtype(), device="cpu"))


def _empty_strided(
    size: Any,
    stride: Any,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
) -> Tensor:
    dtype = dtype or torch.get_default_dtype()
    return SecondTensor(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """What `torch.tensor(..., device=...)` ends in, past `__torch_dispatch__`."""
    crosses = isinstance(source, SecondTensor) != isinstance(target, SecondTensor)
    if crosses and not non_blocking and source.numel():
        _waited("aten::_copy_from")
    into = target.values if isinstance(target, SecondTensor) else target
    into.copy_(source.values if isinstance(source, SecondTensor) else source)
    return target


_IN_LOW_PRECISION = ("linear", "matmul", "mm", "bmm", "addmm", "scaled_dot_product_attention")
"""What autocast computes in its own type here; a real accelerator knows more such operations."""
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)


def _cast(operation: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(NAME)

        def lower(leaf: Any) -> Any:
            floats = isinstance(leaf, Tensor) and leaf.is_floating_point()
            return leaf.to(dtype) if floats else leaf

        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return operation(*tree_map(lower, args), **tree_map(lower, kwargs))

    return run


_FALLBACK = torch.library.Library("_", "IMPL")
_FALLBACK.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
for _name in _IN_LOW_PRECISION:
    _operation = getattr(torch.ops.aten, _name).default
    _LIBRARY.impl(_name, _cast(_operation), "AutocastPrivateUse1")
_LIBRARY.impl("empty.memory_format", _empty, "PrivateUse1")
_LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")
_LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")


def _factory(name: str) -> Any:
    """One that torch makes by resizing an empty tensor, which a wrapper cannot follow."""
    make = getattr(torch.ops.aten, name)

    def made(*args: Any, device: Any = None, pin_memory: Any = None, **options: Any) -> Tensor:
        return SecondTensor(make(*args, device="cpu", **options))

    return made


_FACTORIES = {
    "arange": ("", ".start", ".start_step"),
    "eye": ("", ".m"),
    "tril_indices": ("",),
    "triu_indices": ("",),
}
for _name, _overloads in _FACTORIES.items():
    for _overload in _overloads:
        _LIBRARY.impl(f"{_name}{_overload}", _factory(_name), "PrivateUse1")
