"""A device without float64, like Apple's: a tensor on "lazy" is one on the CPU that refuses to be float64."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "lazy"  # one of torch's device types that no build of ours has


class _There(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        settings = {"strides": held.stride(), "dtype": held.dtype, "device": NAME, "requires_grad": held.requires_grad}
        there = torch.Tensor._make_wrapper_subclass(cls, held.size(), **settings)
        there.held = held
        return there

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _call(function, args, kwargs or {})


class Float32Device(TorchDispatchMode):
    """Inside `with Float32Device():`, tensors and modules may be on "lazy"; nothing there, nor on its way, is float64.

    An operation on tensors of both places is an error, as with any two devices; numbers are no tensors.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _call(function, args, kwargs or {})


def _call(function, args, kwargs):
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    places = {isinstance(x, _There) for x in tensors if x.ndim}
    moves = function is torch.ops.aten._to_copy.default or function is torch.ops.aten.copy_.default
    assert len(places) < 2 or moves, f"{function} on two devices"
    there = any(isinstance(x, _There) for x in tensors)
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == NAME
        kwargs = kwargs | {"device": "cpu"}
    if function is torch.ops.aten._local_scalar_dense.default:
        there = False  # .item() and .tolist()
    args, kwargs = tree_map_only(_There, lambda x: x.held, (args, kwargs))
    result = function(*args, **kwargs)
    return tree_map_only(torch.Tensor, _enter, result) if there else result


def _enter(x: torch.Tensor) -> _There:
    assert x.dtype != torch.float64, "float64 on a device that has none"
    return _There(x)
