"""Loaders: fixed nested splits, checksums, downloads, and files that are missing or damaged.

MNIST and Parkinsons are tested on generated files of the same form everywhere, and on the real ones where
they are found.
"""

import gzip
import hashlib
import http.server
import struct
import subprocess
import sys
import threading
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from tda_core import data, paths
from tda_core.data import DATASETS, DataUnavailable, Source, is_available, load_dataset, tabular, vision, where_to_put
from tda_core.data.files import DataFile, fetch, find

PARTS = ("train", "validation", "test")


def needs(name):
    return pytest.mark.skipif(not is_available(name), reason=f"{name} is not on this machine")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty data folder, and no other one."""
    monkeypatch.setenv("TDA_DATA_DIR", str(tmp_path / "named"))
    monkeypatch.setattr(paths, "ROOT", tmp_path / "root")
    return tmp_path / "named"


def idx(array):
    header = struct.pack(f">4B{array.ndim}i", 0, 0, 8, array.ndim, *array.shape)
    return gzip.compress(header + array.tobytes(), compresslevel=1)


def stored(folder, name, contents):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(contents)
    return DataFile(folder.name, name, hashlib.sha256(contents).hexdigest(), "http://127.0.0.1:9/")


@pytest.fixture
def fake_mnist(folder):
    """10,000 images whose first two pixels spell their number, and whose label is the number modulo 10."""
    number = np.arange(10_000)
    images = np.zeros((10_000, 28, 28), dtype=np.uint8)
    images[:, 0, 0], images[:, 0, 1], images[:, 27, 27] = number // 256, number % 256, 255
    return (
        stored(folder / "mnist", "images.gz", idx(images)),
        stored(folder / "mnist", "labels.gz", idx((number % 10).astype(np.uint8))),
    )


@pytest.fixture
def fake_parkinsons(folder):
    """42 people with 5 rows each, features unlike in scale, a target that is 10 times the subject."""
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"subject#": np.repeat(np.arange(1, 43), 5)})
    table["age"], table["sex"], table["test_time"] = rng.normal(60, 9, size=(3, len(table)))
    table["motor_UPDRS"] = 10.0 * table["subject#"]
    table["total_UPDRS"] = table["motor_UPDRS"] + 1
    table["NHR"] = rng.normal(0, 1e-5, size=len(table))
    return stored(folder / "parkinsons", "table.data", table.to_csv(sep="\t", index=False).encode())


# Splits


def check_dataset(dataset, sizes):
    assert tuple(len(getattr(dataset, part)) for part in PARTS) == sizes
    for part in PARTS:
        examples = getattr(dataset, part)
        assert examples.inputs.dtype == torch.float32 and examples.inputs.ndim == 2
        if dataset.n_classes is None:
            assert examples.targets.dtype == torch.float32
        else:
            assert examples.targets.dtype == torch.int64 and examples.targets.max() < dataset.n_classes
            assert 0 <= examples.inputs.min() and examples.inputs.max() == 1
            assert set(examples.targets.tolist()) == set(range(10))
            assert examples.inputs.shape[1] == np.prod(dataset.image_shape)


def test_digits_are_the_embedded_ones_split_without_overlap():
    from sklearn.datasets import load_digits

    dataset = load_dataset("digits")
    check_dataset(dataset, (1000, 297, 500))
    assert (dataset.image_shape, dataset.n_classes, dataset.groups) == ((8, 8), 10, None)
    pixels, labels = load_digits(return_X_y=True)
    found = np.concatenate(
        [np.column_stack([getattr(dataset, p).inputs * 16, getattr(dataset, p).targets]) for p in PARTS]
    )
    expected = np.column_stack([pixels, labels])
    np.testing.assert_array_equal(found[np.lexsort(found.T)], expected[np.lexsort(expected.T)])


@pytest.mark.parametrize(
    ("name", "train", "validation", "test"),
    [
        ("digits", "72c09a03c710a950", "3402ac4362e9c60b", "53cb5037da0b4d00"),
        pytest.param("mnist", "477fdecd217cae63", "1e6388ad80d07eb3", "6327d6e389e9843c", marks=needs("mnist")),
    ],
)
def test_splits_never_change(name, train, validation, test):
    """Published numbers stand on these examples in this order."""
    dataset = load_dataset(name)
    assert tuple(getattr(dataset, part).hash[:16] for part in PARTS) == (train, validation, test)


def test_smaller_sizes_are_nested_in_bigger_ones():
    whole, small = load_dataset("digits"), load_dataset("digits", n_train=30, n_validation=20, n_test=10)
    for part, size in zip(PARTS, (30, 20, 10), strict=True):
        assert getattr(small, part).hash == getattr(whole, part)[:size].hash
    assert load_dataset("digits", n_train=7).test.hash == whole.test.hash


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_train": 1001}, r"n_train must lie in 1\.\.1000, what digits has for train, got 1001"),
        ({"n_validation": 298}, r"n_validation must lie in 1\.\.297.* got 298"),
        ({"n_test": 0}, r"n_test must lie in 1\.\.500.* got 0"),
        ({"n_test": -3}, r"got -3"),
    ],
)
def test_sizes_out_of_range_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        load_dataset("digits", **sizes)


def test_unknown_names_are_answered_with_the_known_ones():
    for function in (load_dataset, is_available, where_to_put):
        with pytest.raises(ValueError, match="unknown data set 'mnits'; known: digits, mnist, parkinsons"):
            function("mnits")


def test_altered_digits_are_noticed(monkeypatch):
    import sklearn.datasets

    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    pixels[5, 5] += 1
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda return_X_y: (pixels, labels))
    with pytest.raises(ValueError, match=f"digits changed: sha256 .* expected {vision.DIGITS_SHA256}"):
        load_dataset("digits")


def test_mnist_pixels_keep_their_labels_and_parts_do_not_overlap(fake_mnist):
    dataset = vision.load_mnist(*fake_mnist)
    check_dataset(dataset, (5000, 500, 500))
    assert dataset.image_shape == (28, 28)
    seen = []
    for part in PARTS:
        examples = getattr(dataset, part)
        number = (examples.inputs[:, 0] * 255 * 256 + examples.inputs[:, 1] * 255).round().long()
        assert torch.equal(number % 10, examples.targets)
        seen.append(number)
    seen = torch.cat(seen)
    assert len(seen.unique()) == 6000
    assert (seen[:5000] < 5000).float().mean() == pytest.approx(0.5, abs=0.03), "not shuffled over both halves"


@needs("mnist")
def test_real_mnist():
    dataset = load_dataset("mnist")
    check_dataset(dataset, (5000, 500, 500))
    assert dataset.train.inputs.mean() == pytest.approx(0.1325, abs=0.003)
    assert torch.bincount(dataset.train.targets).min() > 400


def check_parkinsons(dataset):
    owners = [set(dataset.groups[part].tolist()) for part in PARTS]
    assert [len(own) for own in owners] == [30, 6, 6]
    assert len(set.union(*owners)) == 42, "a subject is in two parts"
    train = dataset.train
    assert train.inputs.mean(0).abs().max() < 1e-5 and train.targets.mean().abs() < 1e-5
    torch.testing.assert_close(train.inputs.std(0, correction=0), torch.ones(train.inputs.shape[1]), atol=1e-4, rtol=0)
    assert train.targets.std(correction=0) == pytest.approx(1, abs=1e-4)
    assert dataset.n_classes is None and dataset.image_shape is None
    assert not {"subject#", "motor_UPDRS", "total_UPDRS"} & set(dataset.feature_names)
    assert len(dataset.feature_names) == train.inputs.shape[1]
    first = dataset.groups["train"]
    assert (first[1:] != first[:-1]).float().mean() > 0.5, "rows of one subject are not shuffled apart"


def test_parkinsons_splits_by_subject_and_standardises_by_training(fake_parkinsons):
    dataset = tabular.load_parkinsons(fake_parkinsons)
    check_dataset(dataset, (150, 30, 30))
    check_parkinsons(dataset)
    assert dataset.feature_names == ("age", "sex", "test_time", "NHR")
    # The target was 10 times the subject, so targets of all parts lie on the training set's line.
    mean, deviation = (f(10 * dataset.groups["train"].double().numpy()) for f in (np.mean, np.std))
    for part in PARTS:
        expected = (10 * dataset.groups[part].double() - mean) / deviation
        torch.testing.assert_close(getattr(dataset, part).targets.double(), expected, atol=1e-6, rtol=0)


def test_sizes_cut_groups_and_leave_the_standardisation_alone(fake_parkinsons, monkeypatch):
    monkeypatch.setitem(DATASETS, "parkinsons", Source(tabular.load_parkinsons, (fake_parkinsons,)))
    whole, small = load_dataset("parkinsons"), load_dataset("parkinsons", n_train=9, n_test=4)
    assert {part: len(rows) for part, rows in small.groups.items()} == {"train": 9, "validation": 30, "test": 4}
    assert small.train.hash == whole.train[:9].hash
    assert torch.equal(small.groups["test"], whole.groups["test"][:4])


@needs("parkinsons")
def test_real_parkinsons():
    dataset = load_dataset("parkinsons")
    check_dataset(dataset, (4167, 863, 845))
    check_parkinsons(dataset)
    assert len(dataset.feature_names) == 19 and dataset.feature_names[:3] == ("age", "sex", "test_time")
    assert sorted(set(dataset.groups["test"].tolist())) == [1, 4, 10, 20, 22, 41]


# Files


def test_reading_needs_no_torch():
    code = (
        "import sys; from tda_core.data import is_available, where_to_put; is_available('mnist'); "
        "where_to_put('parkinsons'); assert is_available('digits'); "
        "print([m for m in ('torch', 'sklearn', 'numpy', 'pandas', 'pooch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=paths.ROOT)
    assert done.stdout.strip() == "[]"


def test_availability_follows_the_files(folder):
    assert is_available("digits") and where_to_put("digits") == ""
    assert not is_available("mnist")
    (folder / "mnist").mkdir(parents=True)
    (folder / "mnist" / "t10k-images-idx3-ubyte.gz").touch()
    assert not is_available("mnist"), "the labels are still missing"
    other = paths.ROOT / "data" / "mnist"
    other.mkdir(parents=True)
    (other / "t10k-labels-idx1-ubyte.gz").touch()
    assert is_available("mnist")


def test_where_to_put_names_place_checksum_and_source(folder):
    lines = where_to_put("mnist").splitlines()
    assert len(lines) == 2
    for line, file in zip(lines, DATASETS["mnist"].files, strict=True):
        for part in (f"$TDA_DATA_DIR/mnist/{file.name}", str(paths.ROOT / "data"), file.sha256, file.url):
            assert part in line


def test_the_named_folder_comes_first(folder):
    file = stored(folder / "set", "a.bin", b"right")
    other = stored(paths.ROOT / "data" / "set", "a.bin", b"other")
    assert fetch(file) == folder / "set" / "a.bin"
    (folder / "set" / "a.bin").unlink()
    assert fetch(other) == paths.ROOT / "data" / "set" / "a.bin"


def test_wrong_contents_are_refused_with_both_checksums(folder):
    file = stored(folder / "set", "a.bin", b"right")
    (folder / "set" / "a.bin").write_bytes(b"wrong")
    found = hashlib.sha256(b"wrong").hexdigest()
    with pytest.raises(ValueError, match=f"a.bin is not the expected file.* {found}, expected {file.sha256}"):
        fetch(file)
    assert (folder / "set" / "a.bin").read_bytes() == b"wrong", "a user's file is never deleted"


@pytest.fixture
def server(tmp_path):
    """A web server of the files in `tmp_path/web`."""
    (tmp_path / "web").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "web")) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield tmp_path / "web", f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()


def test_a_missing_file_is_downloaded_once(folder, server):
    web, url = server
    (web / "a.bin").write_bytes(b"right")
    file = DataFile("set", "a.bin", hashlib.sha256(b"right").hexdigest(), url)
    assert find(file) is None
    path = fetch(file)
    assert path == paths.ROOT / "data" / "set" / "a.bin" and path.read_bytes() == b"right"
    assert not folder.exists(), "the user's own data folder is read only"
    (web / "a.bin").unlink()
    assert fetch(file) == path


def test_a_download_of_other_contents_is_not_kept(folder, server):
    web, url = server
    (web / "a.bin").write_bytes(b"wrong")
    file = DataFile("set", "a.bin", hashlib.sha256(b"right").hexdigest(), url)
    with pytest.raises(DataUnavailable, match=f"a.bin could not be downloaded .*{file.sha256}"):
        fetch(file)
    assert find(file) is None


def test_offline_says_where_to_put_which_file(folder, monkeypatch):
    offline = tuple(
        DataFile(file.folder, file.name, file.sha256, "http://127.0.0.1:9/") for file in DATASETS["mnist"].files
    )
    monkeypatch.setitem(DATASETS, "mnist", Source(DATASETS["mnist"].load, offline))
    with pytest.raises(DataUnavailable) as caught:
        load_dataset("mnist")
    for part in ("$TDA_DATA_DIR/mnist/t10k-images-idx3-ubyte.gz", offline[0].sha256, offline[0].url):
        assert part in str(caught.value)


def test_a_file_that_is_not_found_on_the_server_is_unavailable(folder, server):
    with pytest.raises(DataUnavailable, match="404"):
        fetch(DataFile("set", "a.bin", "0" * 64, server[1]))


def test_idx_round_trip(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "a.gz").write_bytes(idx(array))
    np.testing.assert_array_equal(vision.read_idx(tmp_path / "a.gz"), array)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"plain", "not a complete gzip file"),
        (idx(np.zeros((4, 4), np.uint8))[:-9], "not a complete gzip file"),
        (gzip.compress(b""), "not an IDX file of unsigned bytes: it begins with nothing"),
        (gzip.compress(b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00"), "begins with 00000d01"),
        (gzip.compress(b"\x00\x00\x08\x02\x00\x00\x00\x01"), "begins with 00000802"),
        (
            gzip.compress(struct.pack(">4Bi", 0, 0, 8, 1, 5) + b"1234"),
            r"holds 4 values, but its header promises \(5,\)",
        ),
    ],
)
def test_damaged_idx_files_are_named(tmp_path, contents, message):
    (tmp_path / "a.gz").write_bytes(contents)
    with pytest.raises(ValueError, match=f"a.gz .*{message}"):
        vision.read_idx(tmp_path / "a.gz")


def test_images_and_labels_must_belong_together(folder, fake_mnist):
    labels = stored(folder / "mnist", "labels.gz", idx(np.zeros(9, np.uint8)))
    with pytest.raises(ValueError, match=r"images \(10000, 28, 28\) and labels \(9,\) do not belong together"):
        vision.load_mnist(fake_mnist[0], labels)


@pytest.mark.parametrize("name", ["digits", *(pytest.param(n, marks=needs(n)) for n in ("mnist", "parkinsons"))])
def test_the_table_in_the_docstring_is_right(name):
    dataset = load_dataset(name)
    row = next(line for line in data.__doc__.splitlines() if line.startswith(f"| {name} "))
    assert [int(cell) for cell in row.split("|")[3:6]] == [len(getattr(dataset, part)) for part in PARTS]
