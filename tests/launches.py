# SPDX-License-Identifier: Apache-2.0
"""Counts what a step would ask of a GPU: launched operators and waits of the host. Needs no GPU."""

from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Views and bookkeeping launch nothing.
_NO_LAUNCH = {
    "_unsafe_view",
    "alias",
    "as_strided",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "expand",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
    "permute",
    "reshape",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unfold",
    "unsqueeze",
    "view",
    "view_as",
}
# Operators whose result is read on the host, if only for its size.
_WAITS = {
    "_local_scalar_dense",
    "_unique",
    "_unique2",
    "equal",
    "is_nonzero",
    "masked_select",
    "nms",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
# Functions of Python that copy to the host, or numbers of the host to the device: the copy from
# pageable memory waits too. On a CPU no operator shows them.
_TO_HOST = {"cpu", "tolist"}
_TO_DEVICE = {"as_tensor", "new_tensor", "tensor"}


class Launches:
    """Context manager that counts what runs inside.

    Attributes:
        operators: launched operators by name; views and memory without values are left out.
        waits: operators and copies for which the host waits for the device, by name. Operators that
            launch and wait are in both.
    """

    def __init__(self) -> None:
        self.operators: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._modes = (_Dispatched(self), _Called(self))

    def __enter__(self) -> "Launches":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Dispatched(TorchDispatchMode):
    def __init__(self, counts: Launches) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in _NO_LAUNCH:
            self.counts.operators[name] += 1
        if _has_bias(name, args):
            self.counts.operators["bias of a convolution"] += 1
        if name in _WAITS or _reads_a_mask(name, args):
            self.counts.waits[name] += 1
        if name == "repeat_interleave" and not (kwargs or {}).get("output_size"):
            self.counts.waits[name] += 1
        return func(*args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    def __init__(self, counts: Launches) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in _TO_HOST:
            self.counts.waits[name] += 1
        elif name in _TO_DEVICE and not isinstance(args[name == "new_tensor"], torch.Tensor):
            self.counts.waits[name] += 1
        elif name in ("__getitem__", "__setitem__") and _has_list(args[1]):
            self.counts.waits["index by a list"] += 1
        return func(*args, **(kwargs or {}))


def _has_bias(name: str, args) -> bool:
    """Whether a convolution adds its bias, or sums its gradient, in a kernel of its own."""
    if name == "convolution":
        return args[2] is not None
    return name == "convolution_backward" and args[-1][2]


def _reads_a_mask(name: str, args) -> bool:
    """Whether an index is a mask, whose true values must be counted first."""
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return False
    masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
    # `tensor[mask] = number` is masked_fill.
    is_fill = name != "index" and args[2].dim() == 0
    return bool(masks) and not is_fill


def _has_list(index) -> bool:
    return isinstance(index, list) or isinstance(index, tuple) and any(map(_has_list, index[:]))
