"""Which tensors a folder of safetensors files has, where, and whether they are those of its model.

Headers are checked against the files (`experts.files`), scales by value, and the files are mapped.
No torch, which takes three seconds of a core to import: who starts a cluster checks its model only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from experts.config import ModelConfig
from experts.errors import CheckpointError
from experts.files import HeaderEntry, read_header, read_json_object

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SCALE_SUFFIX = "_scale_inv"
SCALE_BLOCK: Final = 128
"""An fp8 checkpoint has one scale for each 128 x 128 block; blocks at the edges are partial."""
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
"""What the files and what torch call the same type."""
FP8 = "float8_e4m3fn"
WEIGHT_DTYPES = ("float32", "bfloat16", FP8)
SCALE_DTYPES = ("float32", "float8_e8m0fnu", "uint8")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: bytes `begin` to `end` of `file`; `dtype` is torch's name."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


class TensorFiles:
    """Use `open`. Asking for a tensor that is not there raises CheckpointError."""

    def __init__(self, folder: Path, config: ModelConfig, tensors: dict[str, TensorInfo]) -> None:
        self.folder = folder
        self.config = config
        self._tensors = tensors
        self._mappings: dict[Path, Bytes] = {}

    @classmethod
    def open(cls, folder: Path) -> Self:
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

    def raw(self, name: str) -> Bytes:
        """The bytes of a tensor, a view of the mapped file.

        Writing to them changes this process only, never the file.
        """
        info = self.info(name)
        return self._mapping(info.file)[info.begin : info.end]

    def scales(self, name: str) -> Floats:
        """The checked block scales of an fp8 tensor [ceil(out/128), ceil(in/128)]. Powers of two
        may come as their biased exponent."""
        info, raw = self.info(name + SCALE_SUFFIX), self.raw(name + SCALE_SUFFIX)
        values = raw.view(np.float32) if info.dtype == "float32" else decode_exponents(raw)
        scales: Floats = np.require(values, requirements="A").reshape(info.shape)
        good = np.isfinite(scales) & (scales > 0)
        if not good.all():
            row, column = np.argwhere(~good)[0].tolist()
            raise CheckpointError(
                info.file,
                "finite positive scales",
                f"{scales[row, column]} at block ({row}, {column})",
                name + SCALE_SUFFIX,
                hint="damaged: download the file again",
            )
        return scales

    def _mapping(self, file: Path) -> Bytes:
        """The whole file as bytes [size], mapped at first use."""
        mapping = self._mappings.get(file)
        if mapping is None:
            mapping = np.asarray(np.memmap(file, np.uint8, "c"))
            self._mappings[file] = mapping
        return mapping

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
            self.check_weight(name)

    def check_scales(self) -> None:
        """Read every block scale of an fp8 checkpoint: finite and positive (16 kB per 67 MB)."""
        for name, info in self._tensors.items():
            if info.dtype == FP8:
                self.check_weight(name)
                self.scales(name)

    def check_weight(self, name: str) -> None:
        """Raises CheckpointError unless we compute with its dtype and, in fp8, its scales fit."""
        info = self.info(name)
        if info.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(info.file, ", ".join(WEIGHT_DTYPES), info.dtype, name)
        if info.dtype == FP8:
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
                f"shape {expected} of {', '.join(SCALE_DTYPES)}",
                f"{scales.shape} of {scales.dtype}",
                name + SCALE_SUFFIX,
            )


def decode_exponents(exponents: npt.NDArray[Any]) -> Floats:
    """`2 ** (b - 127)` exactly, for biased exponents b as uint8; 255 is NaN. Same shape.

    The bits are placed, not computed: exp2 need not be exact.
    """
    bits = exponents.astype(np.uint32) << 23
    bits[exponents == 0] = 1 << 22  # 2 ** -127 is subnormal
    bits[exponents == 255] = 0x7FC00000
    return bits.view(np.float32)


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
