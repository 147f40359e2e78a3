"""A weight in oneDNN's packed layout, as a tensor with the shape and dtype of the plain one. For inference on a CPU.

oneDNN multiplies a few rows faster with a weight whose blocks lie in memory in the order in which they are read. Such a tensor
has no strides and no memory that torch's other operators could read, so it is wrapped:

    F.linear(x, weight)        the packed product, also inside hooks, adapters and other libraries
    other reads                are computed from a plain copy: weight.norm(), torch.equal(weight, other)
    writes, views, gradients   ValueError: the layout belongs to oneDNN

Experts [E, 2F, D] are one packed matrix for each expert, and `weight[e]` is that matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from qwen35moe.ops.cpu import products

# The number of rows for which weights are packed; for 1 the layout stays plain. Measured in float32 (Zen 4 as AVX2): packed for
# 8, 64 or 512, products of 2 to 32 rows take 0.7 to 0.95 of the time of plain weights, for 512 the least by 1 to 5 %; one row
# takes 1.2 times that of a plain weight through oneDNN. In bfloat16 (Zen 5) 512 is also the fastest for one row.
ROWS = 512
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WAY_OUT = "call model.unpack_weights() first"

_aten: Any = torch.ops.aten


class PackedWeight(Tensor):
    """Base of `PackedMatrix` and `PackedExperts`: parameters of a module. trainable: the requires_grad of the plain weight."""

    trainable: bool
    is_mkldnn = True  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    def copies(self) -> PackedWeight:
        """The same numbers in new memory."""
        raise NotImplementedError

    def shared(self) -> PackedWeight:
        """The same memory in a new tensor."""
        raise NotImplementedError

    def pieces(self) -> Iterator[Tensor]:
        """The plain numbers in order, one matrix at a time."""
        raise NotImplementedError

    def to_dense(self, dtype: torch.dtype | None = None, *, masked_grad: bool | None = None) -> Tensor:
        """A plain copy with the bits of the weight that was packed."""
        parts = list(self.pieces())
        plain = parts[0] if self.dim() == 2 else torch.stack(parts)
        return plain if dtype is None else plain.to(dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        result = NotImplemented if handler is None else handler(*args, **kwargs)
        return _on_plain_copies(func, args, kwargs) if result is NotImplemented else result

    def requires_grad_(self, requires_grad: bool = True) -> PackedWeight:
        if requires_grad:
            raise ValueError(f"packed weights have no gradient: {WAY_OUT}, then train")
        return self

    @property
    def requires_grad(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    @property
    def data(self) -> PackedWeight:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.shared()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise ValueError(f"the values of a packed weight cannot be replaced: {WAY_OUT}")

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        return memo.setdefault(id(self), self.copies())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _packed_again, (self.to_dense(), self.trainable)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{type(self).__name__}({list(self.shape)}, {self.dtype})"

    def __tensor_flatten__(self) -> Any:
        raise ValueError(f"torch.compile and torch.export cannot trace packed weights: {WAY_OUT}")

    @staticmethod
    def __tensor_unflatten__(*args: Any) -> Any:
        raise ValueError(f"torch.compile and torch.export cannot trace packed weights: {WAY_OUT}")

    def _no_memory(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(f"a packed weight has no plain memory to share or to point to: {WAY_OUT}")

    def is_shared(self) -> bool:
        return False

    data_ptr = untyped_storage = storage = share_memory_ = pin_memory = numpy = tolist = _no_memory


class PackedMatrix(PackedWeight):
    """[F, D]. packed: the tensor in oneDNN's layout."""

    packed: Tensor

    def __new__(cls, packed: Tensor, trainable: bool = False) -> PackedMatrix:
        weight = _wrapper(cls, packed.shape, packed.dtype, trainable)
        weight.packed = packed
        return weight

    def __init__(self, *args: Any) -> None:
        pass

    def copies(self) -> PackedMatrix:
        return PackedMatrix(self.packed.clone(), self.trainable)

    def shared(self) -> PackedMatrix:
        return PackedMatrix(self.packed, self.trainable)

    def pieces(self) -> Iterator[Tensor]:
        yield self.packed.to_dense()


class PackedExperts(PackedWeight):
    """[E, rows, columns]: one PackedMatrix for each expert."""

    matrices: tuple[PackedMatrix, ...]

    def __new__(cls, matrices: Sequence[PackedMatrix], trainable: bool = False) -> PackedExperts:
        first = matrices[0]
        weight = _wrapper(cls, (len(matrices), *first.shape), first.dtype, trainable)
        weight.matrices = tuple(matrices)
        return weight

    def __init__(self, *args: Any) -> None:
        pass

    def __getitem__(self, index: Any) -> Any:
        return self.matrices[index] if type(index) is int else super().__getitem__(index)

    def __iter__(self) -> Iterator[PackedMatrix]:
        return iter(self.matrices)

    def copies(self) -> PackedExperts:
        return PackedExperts([matrix.copies() for matrix in self.matrices], self.trainable)

    def shared(self) -> PackedExperts:
        return PackedExperts(self.matrices, self.trainable)

    def pieces(self) -> Iterator[Tensor]:
        for matrix in self.matrices:
            yield from matrix.pieces()


class _Transposed(Tensor):
    """The transpose of a PackedMatrix inside F.linear, [D, F], or repeated for a batch, [..., D, F]."""

    matrix: PackedMatrix
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]
    __torch_dispatch__ = PackedWeight.__torch_dispatch__

    @classmethod
    def of(cls, matrix: PackedMatrix, batch: Sequence[int] = ()) -> _Transposed:
        shape = (*batch, *matrix.shape[::-1])
        weight = Tensor._make_wrapper_subclass(cls, shape, dtype=matrix.dtype, device=matrix.device)
        weight.matrix = matrix
        return weight

    def shared(self) -> _Transposed:
        return _Transposed.of(self.matrix, self.shape[:-2])

    def to_dense(self) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.matrix.to_dense().t().expand(self.shape)


def _wrapper(cls: Any, shape: Sequence[int], dtype: torch.dtype, trainable: bool) -> Any:
    weight = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=torch.device("cpu"))
    weight.trainable = trainable
    weight._is_param = True  # isinstance(weight, nn.Parameter)
    return weight


# ---------------------------------------------------------------------------------------------------- packing


def pack(weight: Tensor, trainable: bool = False) -> PackedMatrix | PackedExperts:
    """A packed copy of a weight [F, D], or of each expert's matrix of a weight [E, rows, columns]."""
    with torch.inference_mode(False), torch.no_grad():
        if weight.dim() == 3:
            return PackedExperts([PackedMatrix(_reorder(matrix)) for matrix in weight.detach().unbind()], trainable)
        return PackedMatrix(_reorder(weight.detach()), trainable)


def plain(weight: Any) -> Any:
    """A plain copy of a packed weight; anything else as it is."""
    return weight.to_dense() if isinstance(weight, PackedWeight) else weight


def _reorder(matrix: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), ROWS)


def _packed_again(weight: Tensor, trainable: bool) -> Tensor:
    """Of a pickle: packed where this machine can."""
    return nn.Parameter(weight, trainable) if refusal(weight.dtype) else pack(weight, trainable)


@cache
def refusal(dtype: torch.dtype) -> str | None:
    """The reason why weights of this dtype cannot be packed on this machine, or None."""
    name = str(dtype).removeprefix("torch.")
    if not products.has_onednn():
        return "this build of torch has no oneDNN"
    if dtype not in DTYPES:
        return f"oneDNN packs float32, bfloat16 and float16, the weights are {name}"
    try:
        packed = _reorder(torch.zeros(16, 16, dtype=dtype))
        products.onednn_product(torch.zeros(1, 16, dtype=dtype), packed)
    except RuntimeError:
        return f"oneDNN cannot pack {name} on this processor, only float32: load with dtype=torch.float32 to pack"
    return None


# ---------------------------------------------------------------------------------------------------- torch's operators


def _linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Any:
    if type(weight) is not PackedMatrix or isinstance(x, PackedWeight | _Transposed) or not _same(x, weight):
        return NotImplemented
    y = products.packed_product(x.reshape(-1, x.shape[-1]), weight)
    if x.dim() != 2:  # autograd takes no view as the result of aten.mm or bmm
        y = torch.ops.aten._unsafe_view(y, (*x.shape[:-1], weight.shape[0]))
    return y if bias is None else y + bias


def _mm(x: Tensor, weight: Any) -> Any:
    if type(weight) is _Transposed:
        return _linear(x, weight.matrix)
    if type(weight) is PackedMatrix:
        raise ValueError(f"there is no gradient through packed weights: {WAY_OUT}")
    return NotImplemented


def _bmm(x: Tensor, weight: Any) -> Any:
    """F.linear of an x [B, T, D] that is no view of rows repeats the weight for the batch."""
    return _linear(x, weight.matrix) if type(weight) is _Transposed else NotImplemented


def _repeated(weight: Any, sizes: Sequence[int], **rest: Any) -> Any:
    if type(weight) is not _Transposed or tuple(sizes[-2:]) != tuple(weight.shape[-2:]):
        return NotImplemented
    return _Transposed.of(weight.matrix, sizes[:-2])


def _addmm(bias: Tensor, x: Tensor, weight: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    plain_sum = type(weight) is _Transposed and beta == alpha == 1
    return _linear(x, weight.matrix, bias) if plain_sum else NotImplemented


def _mv(weight: Any, x: Tensor) -> Any:
    return _linear(x, weight) if type(weight) is PackedMatrix else NotImplemented


def _transpose(weight: Any) -> Any:
    if type(weight) is _Transposed and weight.dim() == 2:
        return weight.matrix.shared()  # a new tensor: autograd notes that it is a view
    return _Transposed.of(weight) if type(weight) is PackedMatrix else NotImplemented


def _clone(weight: Any, memory_format: Any = None) -> Any:
    return weight.copies() if isinstance(weight, PackedWeight) else NotImplemented


def _converted(weight: Any, *, dtype: Any = None, device: Any = None, **rest: Any) -> Any:
    """Module.to() would put the result into this tensor, or lose whether the weight is trained."""
    target = " and ".join(str(value) for value in (dtype, device) if value is not None)
    if dtype in (None, weight.dtype) and device in (None, weight.device):
        return _clone(weight)
    raise ValueError(f"a packed weight of {weight.dtype} cannot be converted to {target}: {WAY_OUT}")


def _same(x: Tensor, weight: Tensor) -> bool:
    """Whether a product needs no conversion and no check: torch's own message names what is wrong otherwise."""
    return x.dtype is weight.dtype and x.device.type == "cpu" and x.dim() > 0 and x.shape[-1] == weight.shape[1]


_HANDLERS: dict[Any, Callable[..., Any]] = {
    _aten.linear.default: _linear, _aten.mm.default: _mm, _aten.matmul.default: _mm, _aten.addmm.default: _addmm,
    _aten.mv.default: _mv, _aten.t.default: _transpose, _aten.clone.default: _clone, _aten._to_copy.default: _converted,
    _aten.bmm.default: _bmm, _aten.expand.default: _repeated, _aten.view.default: _repeated,
    _aten._unsafe_view.default: _repeated, _aten.detach.default: lambda weight: weight.shared(),
    _aten.alias.default: lambda weight: weight.shared(),
}  # fmt: skip


def _on_plain_copies(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """func on plain copies; ValueError where it would write into a packed weight or return a view of one."""
    names = [argument.name for argument in func._schema.arguments]
    values = {**dict(zip(names, args, strict=False)), **kwargs}
    for argument in func._schema.arguments:
        if argument.alias_info is not None and any(map(_is_packed, tree_leaves(values.get(argument.name)))):
            what = "changed in place" if argument.alias_info.is_write else "viewed as a plain tensor"
            raise ValueError(
                f"a packed weight cannot be {what} ({func._schema.name}): {WAY_OUT}, or read the copy weight.to_dense()"
            )
    return func(*tree_map(_plain_leaf, args), **tree_map(_plain_leaf, kwargs))


def _is_packed(x: Any) -> bool:
    return isinstance(x, PackedWeight | _Transposed)


def _plain_leaf(x: Any) -> Any:
    return cast(Any, x).to_dense() if _is_packed(x) else x
