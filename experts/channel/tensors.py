"""The sections of a frame that are tensors: their memory when they are sent, views of what came.

The one file of a connection without rings that needs torch. Its import takes three seconds of a
core, so the codec imports it with the first frame that has such a section.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from experts.channel.frame import Frame, FrameError
from experts.channel.rules import ROW_IDS, Array, check_pairs

ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)  # wire code: 1 + position
DTYPE_CODES = {dtype: code for code, dtype in enumerate(ROW_DTYPES, start=1)}  # 0: no rows
_ROW_ARRAYS = [np.dtype(name) for name in ("V", "f4", "i2", "u1")]  # numpy has no bfloat16
_INTEGERS = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}
_ON_THE_HOST = (
    "on the CPU, without gradient: stage them (experts/staging.py) or use a connection that "
    "accepts_device"
)
_INT32, _FLOAT32 = np.dtype("i4"), np.dtype("f4")


def checked_rows(frame: Frame) -> Tensor:
    """The rows, if they can be sent. Raises FrameError."""
    rows = frame.rows
    if rows is None or rows.dim() != 2 or rows.dtype not in DTYPE_CODES:
        raise _refused("rows", rows, "[R, width] float32, bfloat16 or float8_e4m3fn")
    return rows


def _refused(name: str, tensor: Tensor | None, limit: str) -> FrameError:
    if tensor is None:
        return FrameError(name, "missing", limit)
    gradient = " that requires grad" if tensor.requires_grad else ""
    found = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}{gradient}"
    return FrameError(name, found, limit)


def host_memory(rows: Tensor) -> Array:
    """The rows' memory as an array of items of the same size; copied only if not contiguous."""
    if not rows.is_contiguous():
        rows = rows.contiguous()
    try:
        integers = _INTEGERS.get(rows.dtype)
        array: Array = (rows if integers is None else rows.view(integers)).numpy()
    except (RuntimeError, TypeError) as error:
        raise _refused("rows", rows, _ON_THE_HOST) from error
    return array


def pair_arrays(frame: Frame, sections: int) -> list[Array]:
    """row_ids, expert_ids, weights or expert_ids alone, each [P]; the tensors' own memory."""
    ids = _pair_array("expert_ids", frame.expert_ids, _INT32)
    if not sections & ROW_IDS:
        return [ids]
    row_ids = _pair_array("row_ids", frame.row_ids, _INT32)
    weights = _pair_array("weights", frame.weights, _FLOAT32)
    if not len(row_ids) == len(ids) == len(weights):
        lengths = (len(row_ids), len(ids), len(weights))
        raise FrameError("num_pairs", lengths, "row_ids, expert_ids, weights of one length")
    return [row_ids, ids, weights]


def _pair_array(name: str, tensor: Tensor | None, dtype: np.dtype[Any]) -> Array:
    try:
        array: Array = tensor.numpy()  # type: ignore[union-attr]
    except (AttributeError, RuntimeError, TypeError) as error:
        raise _refused(name, tensor, f"{dtype} [P] on the CPU, without gradient") from error
    if array.dtype is not dtype or array.ndim != 1:
        raise _refused(name, tensor, f"{dtype} [P]")
    return array


def rows_at(
    payload: npt.NDArray[np.uint8], offset: int, num_rows: int, width: int, dtype: int
) -> Tensor:
    """Rows that came, [num_rows, width] of the wire's dtype code: a view of the payload."""
    array: Array = np.ndarray((num_rows, width), _ROW_ARRAYS[dtype], payload, offset)
    rows = torch.from_numpy(array)
    return rows if dtype == 1 else rows.view(ROW_DTYPES[dtype - 1])


def set_pairs(
    frame: Frame, sections: int, num_rows: int, num_pairs: int, payload: npt.NDArray[np.uint8]
) -> None:
    """Checked row_ids, expert_ids and weights that were received, as views of the payload."""
    arrays: list[Array] = [np.ndarray(num_pairs, _INT32, payload)]
    if sections & ROW_IDS:
        arrays.append(np.ndarray(num_pairs, _INT32, payload, 4 * num_pairs))
        arrays.append(np.ndarray(num_pairs, _FLOAT32, payload, 8 * num_pairs))
    if num_pairs:
        check_pairs(arrays, sections, num_rows)
    if sections & ROW_IDS:
        frame.row_ids, frame.expert_ids, frame.weights = map(torch.from_numpy, arrays)
    else:
        frame.expert_ids = torch.from_numpy(arrays[0])


_INTEGER_VIEW = {
    torch.float32: (torch.int32, 0x7FFFFFFF, 0x7F800000),
    torch.bfloat16: (torch.int16, 0x7FFF, 0x7F80),
    torch.float8_e4m3fn: (torch.uint8, 0x7F, 0x7F),
}


def rows_finite(rows: Tensor) -> bool:
    """Whether no element is NaN or infinite. rows: float32, bfloat16 or float8_e4m3fn, contiguous.

    Compares exponent bits as integers: torch.isfinite takes 166 us for 16 x 2048 bfloat16. Of rows
    on a device one number comes to the host, after what the current stream has to do.
    """
    if rows.numel() == 0:
        return True
    dtype, mask, first_bad = _INTEGER_VIEW[rows.dtype]
    bits = rows.view(dtype)
    values: Any = bits.numpy() if rows.is_cpu else bits
    return int((values & mask).max()) < first_bad
