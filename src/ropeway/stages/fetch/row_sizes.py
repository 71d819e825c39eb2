"""Measure what the rows of an arrow batch take as Python objects, before they are made.

A dictionary, a run or a view stands for a value any number of times, and a list of nulls has no bytes at all: a file of
some kilobytes can have rows of any size.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_VALUE_BYTES = 16  # at least, of any value: an object and the pointer to it
OBJECT_BYTES = 64  # of an empty list, mapping or text

Sizes = NDArray[np.int64] | int  # one per row, or one for all


def measure_rows(batch: Any) -> NDArray[np.int64]:  # noqa: ANN401 - pyarrow has no types
    """Return `(N,)` bytes: a lower bound of what each row of a record batch takes as Python objects."""
    total = np.full(batch.num_rows, OBJECT_BYTES, np.int64)
    for column in batch.columns:
        total += _measure(column)
    return total


def _measure(array: Any) -> Sizes:  # noqa: ANN401 - pyarrow has no types
    """Return the bytes of each value of an array; one number where all have the same."""
    import pyarrow as pa
    from pyarrow import types

    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return _measure(array.storage)
    if types.is_dictionary(kind):
        return _take(_measure(array.dictionary), array.indices.cast(pa.int64()).fill_null(-1))
    if types.is_run_end_encoded(kind):
        places = np.searchsorted(array.run_ends.to_numpy(), np.arange(len(array)) + array.offset, side="right")
        return _take(_measure(array.values), places)
    if types.is_struct(kind) or types.is_union(kind):  # of a union, one number for all: the largest values together
        parts = [_measure(array.field(at)) for at in range(kind.num_fields)]
        if types.is_union(kind):
            parts = [int(np.max(part, initial=0)) for part in parts]
        return _add(parts)
    return _measure_list(array) if types.is_nested(kind) else _measure_plain(array)


def _measure_list(array: Any) -> Sizes:  # noqa: ANN401 - pyarrow has no types
    from pyarrow import types

    kind = array.type
    inner = _measure(_entries(array) if types.is_map(kind) else array.values)
    if types.is_fixed_size_list(kind):
        if isinstance(inner, int):
            return OBJECT_BYTES + inner * int(kind.list_size)
        begins = (np.arange(len(array)) + array.offset) * kind.list_size
        return _between(inner, begins, begins + kind.list_size)
    offsets = array.offsets.to_numpy()
    if types.is_list_view(kind) or types.is_large_list_view(kind):
        return _between(inner, offsets, offsets + array.sizes.to_numpy())
    return _between(inner, offsets[:-1], offsets[1:])


def _measure_plain(array: Any) -> Sizes:  # noqa: ANN401 - pyarrow has no types
    import pyarrow.compute as pc
    from pyarrow import types

    kind = array.type
    texts = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    if any(is_text(kind) for is_text in texts):
        return _add([pc.binary_length(array).fill_null(0).to_numpy(zero_copy_only=False)])
    if types.is_string_view(kind) or types.is_binary_view(kind):
        # 16 bytes each, the first 4 are the length. Source: the Arrow columnar format, "Variable-size Binary View".
        views = np.frombuffer(array.buffers()[1], np.int32).reshape(-1, 4)
        return _add([views[array.offset : array.offset + len(array), 0].clip(0)])
    return _VALUE_BYTES + (int(kind.byte_width) if types.is_fixed_size_binary(kind) else 0)


def _add(parts: Sequence[Sizes]) -> Sizes:
    """Return the bytes of objects with these parts."""
    total: Sizes = OBJECT_BYTES
    for part in parts:
        total = total + (part if isinstance(part, int) else part.astype(np.int64))
    return total


def _entries(array: Any) -> Any:  # noqa: ANN401 - pyarrow has no types
    """Return the keys and values of a map as an array of structs."""
    import pyarrow as pa

    return pa.StructArray.from_arrays([array.keys, array.items], ["key", "value"])


def _take(sizes: Sizes, places: Any) -> Sizes:  # noqa: ANN401 - of pyarrow or numpy
    """Return the bytes of the values at these places; -1 stands for a null."""
    if isinstance(sizes, int):
        return sizes
    return np.append(sizes, OBJECT_BYTES)[np.asarray(places, np.int64)]


def _between(inner: Sizes, begins: NDArray[Any], ends: NDArray[Any]) -> Sizes:
    """Return the bytes of lists whose items are those from `begins` to `ends` of an array with sizes `inner`."""
    begins, ends = begins.astype(np.int64), ends.astype(np.int64)
    if isinstance(inner, int):
        return _add([(ends - begins) * inner])
    total = np.concatenate([np.zeros(1, np.int64), np.cumsum(inner, dtype=np.int64)])
    return _add([total[ends] - total[begins]])
