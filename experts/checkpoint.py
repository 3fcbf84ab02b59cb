"""A folder of safetensors files: tensors by name, as views of the mapped files.

Opening reads headers only and checks them against the files (`experts.files`); no weight is read.
A tensor is a view of a private mapping of its file: creating it costs nothing, its pages come from
the page cache when a kernel first touches them, and processes on one host share them.
Only safetensors: a pickle would run the code inside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from experts.config import ModelConfig
from experts.errors import CheckpointError
from experts.files import HeaderEntry, read_header, read_json_object
from experts.linear import SCALE_BLOCK, Weight

__all__ = ["Checkpoint", "CheckpointError", "TensorInfo"]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SCALE_SUFFIX = "_scale_inv"
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)
SCALE_DTYPES = (torch.float32, torch.float8_e8m0fnu, torch.uint8)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: bytes `begin` to `end` of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


class Checkpoint:
    """Use `Checkpoint.open`. Asking for a tensor that is not there raises CheckpointError."""

    def __init__(self, folder: Path, config: ModelConfig, tensors: dict[str, TensorInfo]) -> None:
        self.folder = folder
        self.config = config
        self._tensors = tensors
        self._mappings: dict[Path, Tensor] = {}

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Check config, index and every header; map nothing yet. Raises CheckpointError."""
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(folder, "the folder of a model", "none")
        return cls(folder, ModelConfig.load(folder), _locate_tensors(folder))

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, those of the next-token modules included."""
        return sum(info.num_bytes for info in self._tensors.values())

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def info(self, name: str) -> TensorInfo:
        info = self._tensors.get(name)
        if info is None:
            raise CheckpointError(self.folder, "the tensor", "none of that name", name)
        return info

    def tensor(self, name: str) -> Tensor:
        """The tensor as its file has it: dtype of the file, CPU, a view of the mapping.

        Writing to it changes this process only, never the file.
        """
        info = self.info(name)
        data = self._mapping(info.file)[info.begin : info.end]
        if info.begin % info.dtype.itemsize:  # a view needs alignment; writers may omit it
            data = data.clone()
        return data.view(info.dtype).view(info.shape)

    def weight(self, name: str) -> Weight:
        """A matrix [out, in] and, for fp8, its scales [ceil(out/128), ceil(in/128)] float32."""
        self._check_weight(name)
        data = self.tensor(name)
        scaled = data.dtype is torch.float8_e4m3fn
        return Weight(data, self._scales(name + SCALE_SUFFIX) if scaled else None)

    def require(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that every tensor of `shapes` is here with that shape, in a dtype we compute with
        and, when it is fp8, with scales of the right shape. Raises for the first problem; reads
        no data."""
        for name, shape in shapes.items():
            info = self.info(name)
            if info.shape != tuple(shape):
                raise CheckpointError(
                    info.file,
                    f"shape {tuple(shape)}",
                    f"{info.shape}",
                    name,
                    hint="config.json and the weights belong to different models?",
                )
            self._check_weight(name)

    def check_scales(self) -> None:
        """Read every block scale of an fp8 checkpoint: finite and positive (16 kB per 67 MB)."""
        for name, info in self._tensors.items():
            if info.dtype is torch.float8_e4m3fn:
                self._check_weight(name)
                self._scales(name + SCALE_SUFFIX)

    def _check_weight(self, name: str) -> None:
        info = self.info(name)
        if info.dtype not in WEIGHT_DTYPES:
            supported = ", ".join(_dtype_name(dtype) for dtype in WEIGHT_DTYPES)
            raise CheckpointError(info.file, supported, _dtype_name(info.dtype), name)
        if info.dtype is torch.float8_e4m3fn:
            self._check_quantised(name, info)

    def _check_quantised(self, name: str, info: TensorInfo) -> None:
        if self.config.quantization is None:
            config = self.folder / "config.json"
            raise CheckpointError(config, "a quantization_config", "none, yet fp8 weights", name)
        if len(info.shape) != 2:
            raise CheckpointError(info.file, "a matrix, being fp8", f"shape {info.shape}", name)
        scales = self.info(name + SCALE_SUFFIX)
        expected = tuple(math.ceil(size / SCALE_BLOCK) for size in info.shape)
        if scales.shape != expected or scales.dtype not in SCALE_DTYPES:
            raise CheckpointError(
                scales.file,
                f"shape {expected} of {', '.join(_dtype_name(d) for d in SCALE_DTYPES)}",
                f"{scales.shape} of {_dtype_name(scales.dtype)}",
                name + SCALE_SUFFIX,
            )

    def _scales(self, name: str) -> Tensor:
        """Block scales as float32, checked. Powers of two may come as their biased exponent."""
        raw = self.tensor(name)
        scales = raw if raw.dtype is torch.float32 else decode_exponents(raw.view(torch.uint8))
        good = torch.isfinite(scales) & (scales > 0)
        if not good.all():
            row, column = (~good).nonzero()[0].tolist()
            raise CheckpointError(
                self.info(name).file,
                "finite positive scales",
                f"{scales[row, column].item()} at block ({row}, {column})",
                name,
                hint="damaged: download the file again",
            )
        return scales

    def _mapping(self, file: Path) -> Tensor:
        """The whole file as bytes [size] uint8, mapped at first use."""
        mapping = self._mappings.get(file)
        if mapping is None:
            size = file.stat().st_size
            mapping = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
            self._mappings[file] = mapping
        return mapping


def decode_exponents(exponents: Tensor) -> Tensor:
    """`2 ** (b - 127)` exactly, for biased exponents b as uint8; 255 is NaN. Float32, same shape.

    The bits are placed, not computed: exp2 need not be exact.
    """
    bits = exponents.to(torch.int32) << 23
    bits = torch.where(exponents == 0, 1 << 22, bits)  # 2 ** -127 is subnormal
    bits = torch.where(exponents == 255, 0x7FC00000, bits)
    return bits.to(torch.int32).view(torch.float32)


def _locate_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Name -> place, from the index, or from the single file of a small model."""
    index_path = folder / INDEX_NAME
    if index_path.exists():
        weight_map = _weight_map(index_path)
        files = dict.fromkeys(weight_map.values())
        headers = {name: _open_shard(folder, name) for name in files}
        return {name: _info(folder, headers, file, name) for name, file in weight_map.items()}
    if (folder / SINGLE_NAME).exists():
        entries = _open_shard(folder, SINGLE_NAME)
        headers = {SINGLE_NAME: entries}
        return {name: _info(folder, headers, SINGLE_NAME, name) for name in entries}
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    raise CheckpointError(
        folder,
        f"{INDEX_NAME} or {SINGLE_NAME}",
        f"pickled weights ({pickles[0]})" if pickles else "no weights",
        hint="a pickle can run code: convert it to safetensors" if pickles else None,
    )


def _weight_map(index_path: Path) -> dict[str, str]:
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(index_path, "a weight_map of names to files", repr(weight_map))
    for name, file in weight_map.items():
        plain = isinstance(file, str) and file.isprintable() and PurePosixPath(file).name == file
        if not plain:
            raise CheckpointError(index_path, "a file name of this folder", repr(file), name)
    return weight_map


def _open_shard(folder: Path, name: str) -> dict[str, HeaderEntry]:
    path, root = folder / name, folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":  # the Hugging Face cache links snapshots to blobs
        allowed.append(root.parent.parent / "blobs")
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise CheckpointError(path, "a file inside the folder", error) from None
    if not any(target.is_relative_to(root) for root in allowed):
        raise CheckpointError(path, "a file inside the folder", f"a link to {target}")
    return read_header(path)


def _info(
    folder: Path, headers: Mapping[str, Mapping[str, HeaderEntry]], file: str, name: str
) -> TensorInfo:
    entry = headers[file].get(name)
    if entry is None:
        raise CheckpointError(
            folder / file,
            "the tensor, as the index says",
            "none of that name",
            name,
            hint="index and files belong to different downloads?",
        )
    return TensorInfo(folder / file, DTYPES[entry.dtype], entry.shape, entry.begin, entry.end)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
