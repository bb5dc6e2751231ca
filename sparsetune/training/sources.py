"""Where images come from: embedded, parquet, IDX, folders of images, the hub, a user's function.

The rule to know: what is read for one part (train or test) never opens a file of the other. Images
are decoded once, into `.npy` files under $SPARSETUNE_CACHE (default ~/.cache/sparsetune), because
decoding MNIST takes seconds and reading it back a tenth of one.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.util
import io
import math
import os
import random
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sparsetune.names import import_object, suggestion, users_code
from sparsetune.settings import DataSettings

Part = Literal["train", "test"]
Array = NDArray[Any]
Decoded = tuple[Array, Array]  # images [n, c, h, w], of a limit the first ones; the labels of ALL

HUB = {
    "mnist": "ylecun/mnist",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
}
MOST_CLASSES = 100_000  # a label above is a mistake, and the network's last layer would show it
CACHE_VERSION = 1  # to be raised when decoding gives other arrays for the same files
DIGITS_TRAIN = 1437  # of 1797
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp"}


def read(settings: DataSettings, part: Part, limit: int) -> tuple[Tensor, Tensor]:
    """One part's images [n, c, h, w] (uint8 or float32) and labels int64.

    `limit` > 0 asks for the first images alone; the labels are always those of the whole part.
    A user's function takes nothing and returns (train images, train labels, test images, test
    labels), arrays or tensors of uint8 or floats: [n, c, h, w]; [n, h, w] gets one channel and
    [n, features] becomes [n, 1, 1, features]. Channels-last arrays are refused.
    """
    check_source(settings)
    if ":" in settings.name:
        images, labels = _from_function(settings.name, part)
        return images[: limit or None], labels
    if settings.path:
        source = _find(settings, part)
        decoded = _cached(source.identity(), limit, source.decode)
    elif settings.name == "digits":
        decoded = _digits(part, limit)
    else:
        identity = ("hub", HUB[settings.name], part)
        decoded = _cached(identity, limit, lambda num: _decode_table(*_hub(settings, part), num))
    images, labels = (torch.from_numpy(array) for array in decoded)
    return images, labels.long()


def check_source(settings: DataSettings) -> None:
    """ValueError when there is nothing to read; files are listed and not opened."""
    name, path = settings.name, settings.path
    if path and (":" in name or name == "digits"):
        raise ValueError(
            f"data.path: {path!r} would not be read, because data.name={name} brings its own "
            "data; give data.name=NAME for what the folder holds"
        )
    if ":" in name:
        import_object(name, "data.name")
    elif path:
        _find(settings, "train")
        _find(settings, "test")
    elif name in HUB:
        cached = _find_cached(("hub", HUB[name], "train"), settings.limit)
        if cached is None and importlib.util.find_spec("datasets") is None:
            raise _no_hub(name, "the package 'datasets' is not installed")
    elif name != "digits":
        known = ["digits", *HUB]
        raise ValueError(
            f"data.name: {name!r} is unknown{suggestion(name, known)}; known: {', '.join(known)}; "
            "or give data.path=FOLDER, or data.name=package.module:function"
        )


# Embedded, and a user's function ------------------------------------------------------------------


def _digits(part: Part, limit: int) -> Decoded:
    # Imported here because it takes a second and serves this data set alone.
    from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    # The file's order follows its writers, so that its tail would be other hands than its head.
    order = np.random.RandomState(0).permutation(len(images))
    chosen = order[:DIGITS_TRAIN] if part == "train" else order[DIGITS_TRAIN:]
    return images[chosen[: limit or None]], digits.target[chosen]


def _from_function(name: str, part: Part) -> tuple[Tensor, Tensor]:
    function = import_object(name, "data.name")
    with users_code(f"data.name: {name}"):
        arrays = function()
    if not isinstance(arrays, (tuple, list)) or len(arrays) != 4:
        what = f"{len(arrays)} values" if isinstance(arrays, (tuple, list)) else type(arrays)
        raise ValueError(
            f"data.name: {name} returned {what}; "
            "return (train images, train labels, test images, test labels)"
        )
    with users_code(f"data.name: making tensors of what {name} returned"):
        images, labels = (
            torch.as_tensor(array).detach().clone()
            for array in (arrays[:2] if part == "train" else arrays[2:])
        )
    return _checked_images(name, images), _checked_labels(name, labels, len(images))


def _checked_images(name: str, images: Tensor) -> Tensor:
    """[n, c, h, w], uint8 or float32."""
    if images.dtype != torch.uint8 and not images.dtype.is_floating_point:
        raise ValueError(f"data.name: {name} returned {images.dtype} images; uint8 or a float")
    if images.ndim not in (2, 3, 4):
        raise ValueError(
            f"data.name: {name} returned images of shape {list(images.shape)}; "
            "[n, c, h, w], [n, h, w] or [n, features]"
        )
    if images.ndim == 4 and images.shape[3] in (1, 3) and images.shape[1] not in (1, 3):
        raise ValueError(
            f"data.name: {name} returned images of shape {list(images.shape)}, channels last; "
            "permute them to [n, c, h, w]"
        )
    if not images.numel():
        raise ValueError(f"data.name: {name} returned no image (shape {list(images.shape)})")
    images = images.reshape(len(images), *(1,) * (4 - images.ndim), *images.shape[1:])
    return images if images.dtype == torch.uint8 else images.float()


def _checked_labels(name: str, labels: Tensor, num: int) -> Tensor:
    """[num] int64."""
    whole = labels.shape == (num,) and not labels.dtype.is_floating_point
    longs = labels.long() if whole else labels
    if not whole or not 0 <= int(longs.min()) <= int(longs.max()) < MOST_CLASSES:
        raise ValueError(
            f"data.name: {name} returned {labels.dtype} labels of shape {list(labels.shape)} for "
            f"{num} images; one whole number from 0 to {MOST_CLASSES - 1} each"
        )
    return longs


# Files --------------------------------------------------------------------------------------------


class _Source(NamedTuple):
    """The files of one part; `classes` names the class folders, in label order."""

    kind: Literal["parquet", "idx", "images"]
    files: list[Path]
    classes: list[str]

    def identity(self) -> tuple[object, ...]:
        """Changes when a file does, without reading any."""
        stats = ((file, file.stat()) for file in self.files)
        files = ((str(file.resolve()), stat.st_size, stat.st_mtime_ns) for file, stat in stats)
        return self.kind, *self.classes, *files

    def decode(self, num: int) -> Decoded:
        if self.kind == "parquet":
            tables = []
            for file in self.files:
                try:
                    tables.append(pq.ParquetFile(file).read())
                except (OSError, pa.ArrowException) as error:
                    raise ValueError(
                        f"data.path: {str(file)!r} is no parquet file: {error}; fetch it again"
                    ) from error
            return _decode_table(pa.concat_tables(tables), str(self.files[0]), num)
        if self.kind == "idx":
            images, labels = (_read_idx(file) for file in self.files)
            return images[: num or None, None], labels
        # Any first few images should hold every class, and the listing is sorted by class.
        files = self.files.copy()
        random.Random(0).shuffle(files)
        labels = np.array([self.classes.index(file.parent.name) for file in files])
        encoded = (file.read_bytes() for file in files[: num or None])
        return _decode_images(encoded, str(files[0].parent.parent)), labels


def _find(settings: DataSettings, part: Part) -> _Source:
    """One part's files under `data.path`, in the first of the usual places that has any."""
    path, exists = Path(settings.path), False
    with contextlib.suppress(OSError, RuntimeError):  # a name too long, a user nobody knows
        path = path.expanduser()
        exists = path.exists()
    if not exists:
        raise ValueError(
            f"data.path: {settings.path!r} does not exist; give a folder with train-*.parquet and "
            "test-*.parquet, IDX files, or images as train/CLASS/*.png and test/CLASS/*.png"
        )
    root = path if path.is_dir() else path.parent
    for folder in (root, root / settings.name, root / "data", root / settings.name / "data"):
        if parquet := sorted(folder.glob(f"{part}*.parquet")):
            return _Source("parquet", parquet, [])
        stem = "train" if part == "train" else "t10k"
        # "." and "-" before "idx" both occur, and the files come packed or unpacked.
        images = sorted(folder.glob(f"{stem}-images?idx3-ubyte*"))
        labels = sorted(folder.glob(f"{stem}-labels?idx1-ubyte*"))
        if images and labels:
            return _Source("idx", [images[0], labels[0]], [])
        if any((folder / part).glob("*/")):
            # Labels come from the training folders: a class may be missing in the test folder.
            classes = sorted(entry.name for entry in (folder / "train").iterdir() if entry.is_dir())
            entries = sorted((folder / part).glob("*/*"))
            files = [file for file in entries if file.suffix.lower() in IMAGE_SUFFIXES]
            strangers = {file.parent.name for file in files} - set(classes)
            if strangers:
                raise ValueError(
                    f"data.path: {folder / part} has classes that {folder / 'train'} has not: "
                    f"{', '.join(sorted(strangers))}"
                )
            if files:
                return _Source("images", files, classes)
    raise ValueError(
        f"data.path: {settings.path!r} has no {part} images; it, or its folder {settings.name!r} "
        f"or 'data', should hold {part}-*.parquet, IDX files, or {part}/CLASS/*.png"
    )


def _read_idx(file: Path) -> Array:
    """The bytes of an IDX file: 0, 0, type (8: uint8), number of axes, each axis as big-endian."""
    content = file.read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    if content[:3] == b"\0\0\x08":
        num_axes = content[3]
        shape = np.frombuffer(content, ">u4", num_axes, offset=4).tolist()
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * num_axes)
        if values.size == math.prod(shape):
            return values.reshape(shape).copy()
    raise ValueError(f"data.path: {str(file)!r} is no complete IDX file of bytes; fetch it again")


def _decode_table(table: pa.Table, place: str, num: int) -> Decoded:
    names = table.column_names
    image = next((name for name in ("image", "img") if name in names), None)
    label = next((name for name in ("label", "fine_label", "labels") if name in names), None)
    if image is None or label is None:
        raise ValueError(
            f"data.path: {place!r} has the columns {', '.join(names)}; "
            "it needs image (or img) and label (or fine_label)"
        )
    column = table[label]
    whole = pa.types.is_integer(column.type) and not column.null_count
    labels: Array = column.to_numpy() if whole else np.empty(0)
    if not len(labels) or not 0 <= int(labels.min()) <= int(labels.max()) < MOST_CLASSES:
        raise ValueError(
            f"data.path: {place!r}: the column {label} ({column.type}, {len(column)} rows) should "
            f"hold whole numbers from 0 to {MOST_CLASSES - 1}, one for each image"
        )
    cells = (cell.as_py() for cell in table.slice(0, num or None)[image])
    encoded: Iterable[Any] = (c.get("bytes") if isinstance(c, dict) else c for c in cells)
    return _decode_images(encoded, place), labels.astype(np.int64)


def _decode_images(encoded: Iterable[bytes], place: str) -> Array:
    """uint8 [n, c, h, w], grey images with one channel, all others with three.

    One thread on purpose: on images this small two threads took twice as long as one.
    """
    arrays = []
    for number, content in enumerate(encoded):
        try:
            with Image.open(io.BytesIO(content)) as image:
                array = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
        except (OSError, TypeError, ValueError, SyntaxError) as error:
            raise ValueError(
                f"data.path: {place!r}: image {number} cannot be decoded ({error}); fetch it again"
            ) from error
        arrays.append(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))
        if arrays[-1].shape != arrays[0].shape:
            raise ValueError(
                f"data.path: {place!r} holds images of shapes {arrays[0].shape} and "
                f"{arrays[-1].shape}; bring all of them to one size and mode first"
            )
    return np.stack(arrays)


# The hub ------------------------------------------------------------------------------------------


def _hub(settings: DataSettings, part: Part) -> tuple[pa.Table, str]:
    try:
        import datasets  # type: ignore[import-not-found, unused-ignore]

        table = datasets.load_dataset(HUB[settings.name], split=part)
    except Exception as error:  # what this library raises without a network differs by version
        raise _no_hub(settings.name, f"{type(error).__name__}: {error}") from error
    return table.with_format("arrow")[:], HUB[settings.name]  # "arrow": images stay encoded


def _no_hub(name: str, why: str) -> ValueError:
    return ValueError(
        f"data.name: {name!r} ({HUB[name]} on the Hugging Face hub) cannot be got: {why}; "
        "give data.path=FOLDER with its files, or pip install sparsetune[data]"
    )


# The cache ----------------------------------------------------------------------------------------


def _cache_files(identity: tuple[object, ...], limit: int) -> tuple[Path, Path]:
    folder = os.environ.get("SPARSETUNE_CACHE") or Path.home() / ".cache" / "sparsetune"
    key = repr((CACHE_VERSION, limit, identity)).encode()
    stem = hashlib.blake2b(key, digest_size=16).hexdigest()
    return Path(folder) / f"{stem}.images.npy", Path(folder) / f"{stem}.labels.npy"


def _find_cached(identity: tuple[object, ...], limit: int) -> tuple[Path, Path] | None:
    """The files of the whole part serve any limit."""
    for files in (_cache_files(identity, 0), _cache_files(identity, limit)):
        if all(file.exists() for file in files):
            return files
    return None


def _cached(identity: tuple[object, ...], limit: int, decode: Callable[[int], Decoded]) -> Decoded:
    files = _find_cached(identity, limit)
    if files is not None:
        # A damaged file is decoded anew and replaced.
        with contextlib.suppress(OSError, EOFError, ValueError):
            images, labels = (np.load(file, mmap_mode="r") for file in files)
            return np.array(images[: limit or None]), np.array(labels)
    decoded = decode(limit)
    for file, array in zip(_cache_files(identity, limit), decoded, strict=True):
        _write(file, array)
    return decoded


def _write(file: Path, array: Array) -> None:
    """Renamed into place: of two processes that decode at once either may win, both are whole."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.stem}.{uuid.uuid4().hex}.tmp")
        with temporary.open("wb") as stream:
            np.save(stream, array)
        temporary.replace(file)
    except OSError as error:
        raise ValueError(
            f"the cache {str(file.parent)!r} cannot be written: {error}; "
            "set SPARSETUNE_CACHE to a folder that can"
        ) from error
