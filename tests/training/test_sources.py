"""Sources of images: each format, the cache, and that the test set stays closed in a search."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.machinery
import io
import multiprocessing
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.real_data import real
from PIL import Image

from sparsetune.settings import DataSettings
from sparsetune.training import data, sources


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARSETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# Six grey 2x3 images: image i is filled with 40 i, labels 0 1 2 0 1 2.
IMAGES = np.stack([np.full((2, 3), 40 * i, np.uint8) for i in range(6)])
LABELS = np.array([0, 1, 2, 0, 1, 2])


def png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "png")
    return stream.getvalue()


def table(images: np.ndarray, labels: np.ndarray, image: str, label: str) -> pa.Table:
    cells = [{"bytes": png(array), "path": None} for array in images]
    return pa.table({image: cells, label: labels})


def write_parquet(
    folder: Path, part: str, num: int = 6, image: str = "image", label: str = "label"
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{part}-00000-of-00001.parquet"
    pq.write_table(table(IMAGES[:num], LABELS[:num], image, label), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six training images and two test images as parquet."""
    write_parquet(tmp_path / "mine", "train")
    write_parquet(tmp_path / "mine", "test", num=2)
    return tmp_path / "mine"


# Sources


def test_digits_need_no_files_and_split_1437_to_360() -> None:
    settings = DataSettings()
    digits, test = data.load(settings), data.load_test(settings)
    assert digits.train.images.shape == (1437, 1, 8, 8) and test.images.shape == (360, 1, 8, 8)
    assert digits.input_shape == (1, 8, 8) and digits.num_classes == 10
    assert digits.train.images.dtype == torch.uint8 and digits.train.images.max() == 255
    assert digits.train.labels.bincount().min() > 130  # every class about a tenth
    # The two parts together are the 1797 images of scikit-learn, each once.
    both = torch.cat([digits.train.images, test.images]).flatten(1)
    from sklearn.datasets import load_digits

    whole = torch.from_numpy(np.rint(load_digits().data * 255 / 16)).to(torch.uint8)
    assert sorted(both.tolist()) == sorted(whole.tolist())


@pytest.mark.parametrize("place", [".", "mydata", "data", "mydata/data"])
@pytest.mark.parametrize(("image", "label"), [("image", "label"), ("img", "fine_label")])
def test_parquet_in_the_usual_places(tmp_path: Path, place: str, image: str, label: str) -> None:
    file = write_parquet(tmp_path / "root" / place, "train", image=image, label=label)
    write_parquet(tmp_path / "root" / place, "test", num=2, image=image, label=label)
    for path in (tmp_path / "root", file):
        settings = DataSettings(name="mydata", path=str(path))
        mine = data.load(settings)
        assert torch.equal(mine.train.images, torch.from_numpy(IMAGES)[:, None])
        assert mine.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
        assert mine.num_classes == 3 and mine.name == "mydata"
        assert data.load_test(settings).labels.tolist() == [0, 1]


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files(tmp_path: Path, packed: bool) -> None:
    for stem, num in (("train", 6), ("t10k", 2)):
        images = struct.pack(">BBBBIII", 0, 0, 8, 3, num, 2, 3) + IMAGES[:num].tobytes()
        labels = struct.pack(">BBBBI", 0, 0, 8, 1, num) + LABELS[:num].astype(np.uint8).tobytes()
        for name, content in (("images-idx3", images), ("labels-idx1", labels)):
            path = tmp_path / f"{stem}-{name}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(content) if packed else content)
    settings = DataSettings(name="mnist", path=str(tmp_path), limit=4)
    mnist = data.load(settings)
    assert torch.equal(mnist.train.images, torch.from_numpy(IMAGES[:4])[:, None])
    assert mnist.train.labels.tolist() == [0, 1, 2, 0] and mnist.num_classes == 3
    assert data.load_test(settings).images.shape == (2, 1, 2, 3)


def test_a_cut_idx_file_is_named(tmp_path: Path) -> None:
    for stem in ("train", "t10k"):
        (tmp_path / f"{stem}-images-idx3-ubyte").write_bytes(b"\0\0\x08\3" + b"\0\0\0\2" * 3)
        (tmp_path / f"{stem}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\1\0\0\0\2ab")
    with pytest.raises(ValueError, match="train-images-idx3-ubyte' is no complete IDX file"):
        data.load(DataSettings(name="mnist", path=str(tmp_path)))


def write_image_folders(root: Path) -> None:
    for part, classes in (("train", "abc"), ("test", "bc")):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for number in range(4):
                color = np.full((2, 3, 3), 60 * "abc".index(name) + number, np.uint8)
                (root / part / name / f"{number}.png").write_bytes(png(color))


def test_folders_of_images_take_labels_from_the_training_folders(tmp_path: Path) -> None:
    write_image_folders(tmp_path)
    settings = DataSettings(name="mydata", path=str(tmp_path))
    mine, test = data.load(settings), data.load_test(settings)
    assert mine.train.images.shape == (12, 3, 2, 3) and mine.num_classes == 3
    assert torch.equal(mine.train.images[:, 0, 0, 0] // 60, mine.train.labels.to(torch.uint8))
    # The test part has no class "a", and "b" is 1 all the same.
    assert sorted(test.labels.tolist()) == [1] * 4 + [2] * 4
    assert torch.equal(test.images[:, 0, 0, 0] // 60, test.labels.to(torch.uint8))
    few = data.load(dataclasses.replace(settings, limit=6))
    assert torch.equal(few.train.images, mine.train.images[:6])
    assert len(set(few.train.labels.tolist())) > 1  # the listing is not in the order of the classes


def test_folders_of_images_refuse_what_does_not_fit(tmp_path: Path) -> None:
    write_image_folders(tmp_path)
    settings = DataSettings(name="mydata", path=str(tmp_path))
    (tmp_path / "train" / "a" / "wide.png").write_bytes(png(np.zeros((2, 9, 3), np.uint8)))
    with pytest.raises(ValueError, match=r"images of shapes .* bring all of them to one size"):
        data.load(settings)
    (tmp_path / "test" / "d").mkdir()
    (tmp_path / "test" / "d" / "0.png").write_bytes(png(np.zeros((2, 3, 3), np.uint8)))
    with pytest.raises(ValueError, match=r"test has classes that .*train has not: d"):
        data.check(settings)


def fake_hub(monkeypatch: pytest.MonkeyPatch, parts: dict[str, pa.Table]) -> list[tuple[str, str]]:
    """A stand-in for the `datasets` package; the list tells what was asked for."""
    asked = []

    class Found:
        def __init__(self, table: pa.Table) -> None:
            self.table = table

        def with_format(self, kind: str) -> Found:
            assert kind == "arrow"
            return self

        def __getitem__(self, rows: slice) -> pa.Table:
            assert rows == slice(None)
            return self.table

    def load_dataset(name: str, split: str) -> Found:
        asked.append((name, split))
        if not parts:
            raise ConnectionError("no network")
        return Found(parts[split])

    module = types.ModuleType("datasets")
    module.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_the_hub_is_asked_once_for_each_part(monkeypatch: pytest.MonkeyPatch) -> None:
    train = table(IMAGES, LABELS, "img", "fine_label")
    asked = fake_hub(monkeypatch, {"train": train, "test": train.slice(0, 2)})
    settings = DataSettings(name="cifar100")
    data.check(settings)
    assert asked == []
    for _ in range(2):
        assert data.load(settings).train.labels.tolist() == LABELS.tolist()
    assert asked == [("uoft-cs/cifar100", "train")]
    assert len(data.load_test(settings).images) == 2
    assert asked[1:] == [("uoft-cs/cifar100", "test")]


def test_the_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, {})
    with pytest.raises(ValueError, match=r"no network; give data.path=FOLDER .*sparsetune\[data\]"):
        data.load(DataSettings(name="mnist"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'datasets' is not installed; give data.path=FOLDER"):
        data.check(DataSettings(name="mnist"))


def test_a_folder_without_a_part_or_a_column(tmp_path: Path) -> None:
    settings = DataSettings(name="mydata", path=str(tmp_path))
    with pytest.raises(ValueError, match="has no train images; it, or its folder 'mydata'"):
        data.check(settings)
    write_parquet(tmp_path, "train", label="digit")
    with pytest.raises(ValueError, match="has no test images"):
        data.check(settings)
    write_parquet(tmp_path, "test")
    with pytest.raises(ValueError, match=r"has the columns image, digit; it needs .* label"):
        data.load(settings)


# The cache, and the closed test set


def test_load_opens_no_test_file(folder: Path) -> None:
    settings = DataSettings(name="mine", path=str(folder))
    (folder / "test-00000-of-00001.parquet").write_text("whoever opens this fails")
    data.check(settings)
    assert len(data.load(settings).train.images) == 6
    with pytest.raises(ValueError, match=r"^data.path: '.*parquet' is no parquet file"):
        data.load_test(settings)


def test_a_damaged_cache_is_decoded_again(folder: Path, cache: Path) -> None:
    settings = DataSettings(name="mine", path=str(folder))
    first = data.load(settings)
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:100] if "images" in file.name else b"")
    assert data.load(settings).fingerprint == first.fingerprint
    assert all(file.stat().st_size > 100 for file in cache.iterdir())


@pytest.mark.parametrize("labels", [[0, None, 1], [0.5, 1.0, 2.0], ["a", "b", "c"], [0, -1, 1]])
def test_labels_that_are_no_classes_are_refused(tmp_path: Path, labels: list[object]) -> None:
    table = pa.table({"image": [{"bytes": b""}] * 3, "label": labels})
    for part in ("train", "test"):
        pq.write_table(table, tmp_path / f"{part}.parquet")
    with pytest.raises(ValueError, match=r"the column label .* should hold whole numbers from 0"):
        data.load(DataSettings(name="mine", path=str(tmp_path)))


@pytest.mark.parametrize("cell", [None, {"bytes": None}, {"bytes": b"no image"}, {"path": "x"}, 3])
def test_a_cell_that_is_no_image_is_named(tmp_path: Path, cell: object) -> None:
    for part in ("train", "test"):
        pq.write_table(pa.table({"image": [cell], "label": [0]}), tmp_path / f"{part}.parquet")
    with pytest.raises(ValueError, match=r"^data.path: '.*': image 0 cannot be decoded"):
        data.load(DataSettings(name="mine", path=str(tmp_path)))


def test_decoded_once(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = DataSettings(name="mine", path=str(folder))
    first = data.load(settings)
    assert len(list(cache.iterdir())) == 2  # images and labels of the training part, no leftovers
    with monkeypatch.context() as closed:
        closed.setattr(sources, "_decode_images", lambda *_: pytest.fail("decoded again"))
        again = data.load(settings)
        few = data.load(dataclasses.replace(settings, limit=2))  # the whole serves a part
    assert again.fingerprint == first.fingerprint and len(few.train.images) == 2
    again.train.images.zero_()  # a copy: what a trial does to its tensors stays out of the cache
    assert data.load(settings).fingerprint == first.fingerprint
    # A changed file is another key.
    write_parquet(folder, "train", num=4)
    changed = data.load(settings)
    assert len(changed.train.images) == 4 and changed.fingerprint != first.fingerprint


def test_a_limit_decodes_only_its_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    opened = Image.open

    def counted(stream: io.BytesIO) -> Image.Image:
        decoded.append(stream)
        return opened(stream)

    monkeypatch.setattr(Image, "open", counted)
    few = data.load(DataSettings(name="mine", path=str(folder), limit=2))
    assert len(decoded) == 2 and few.train.labels.tolist() == [0, 1]
    assert few.num_classes == 3  # of all labels, also those of images left out


def read_in_a_process(settings: DataSettings) -> list[int]:
    return sources.read(settings, "train", 0)[0].flatten().tolist()


def test_processes_may_decode_at_once(folder: Path, cache: Path) -> None:
    settings = DataSettings(name="mine", path=str(folder))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(read_in_a_process, [settings] * 4, chunksize=1)
    assert found == [IMAGES.flatten().tolist()] * 4
    assert len(list(cache.iterdir())) == 2


def test_a_cache_that_cannot_be_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPARSETUNE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ValueError, match=r"cannot be written: .*; set SPARSETUNE_CACHE"):
        data.load(DataSettings(name="mine", path=str(folder)))


# The real files


def test_real_mnist_and_cifar10_begin_as_published() -> None:
    mnist = data.load(dataclasses.replace(real("mnist"), limit=100)).train
    assert mnist.images.shape == (100, 1, 28, 28)
    assert mnist.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    cifar10 = data.load(dataclasses.replace(real("cifar10"), limit=100))
    assert cifar10.input_shape == (3, 32, 32) and cifar10.num_classes == 10


@pytest.mark.slow
def test_real_mnist_whole() -> None:
    settings = real("mnist")
    mnist, test = data.load(settings), data.load_test(settings)
    assert mnist.train.images.shape == (60000, 1, 28, 28) and len(test.images) == 10000
    # The numbers in use everywhere.
    torch.testing.assert_close(mnist.mean, torch.tensor([0.1307]), atol=5e-5, rtol=0)
    torch.testing.assert_close(mnist.deviation, torch.tensor([0.3081]), atol=5e-5, rtol=0)
    assert test.labels[:5].tolist() == [7, 2, 1, 0, 4]
