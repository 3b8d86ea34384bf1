"""Small images: the digits embedded in scikit-learn, and the MNIST test files used as a data set of their own."""

import gzip
import hashlib
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from tda_core.data import PARTS, Dataset
from tda_core.data.files import DataFile, fetch
from tda_core.examples import Examples

DIGITS_SHA256 = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"
DIGITS_SIZES = (1000, 297, 500)
MNIST_SIZES = (5000, 500, 500)


def load_digits() -> Dataset:
    """1,797 digits of 8 x 8 pixels in 0..16, scaled to [0, 1] and flattened to (n, 64).

    Alpaydin and Kaynak 1998, UCI, as scikit-learn embeds it. Raises ValueError where the embedded
    arrays are not those that the splits and reference results were made with.
    """
    from sklearn.datasets import load_digits as load_embedded

    pixels, labels = load_embedded(return_X_y=True)
    contents = pixels.astype(np.uint8).tobytes() + labels.astype(np.uint8).tobytes()
    found = hashlib.sha256(contents).hexdigest()
    if found != DIGITS_SHA256:
        raise ValueError(f"scikit-learn's digits changed: sha256 of the arrays is {found}, expected {DIGITS_SHA256}")
    return _split("digits", (pixels / 16, labels), DIGITS_SIZES, (8, 8))


def load_mnist(images_file: DataFile, labels_file: DataFile) -> Dataset:
    """6,000 of the 10,000 MNIST test images, scaled to [0, 1] and flattened to (n, 784).

    LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist/, CC BY-SA 3.0. The test files alone
    serve as a small data set (1.6 MB); its first half is cleaner than its second, so the order is
    shuffled before it is split.
    """
    images, labels = read_idx(fetch(images_file)), read_idx(fetch(labels_file))
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise ValueError(f"MNIST images {images.shape} and labels {labels.shape} do not belong together")
    return _split("mnist", (images.reshape(len(images), -1) / 255, labels), MNIST_SIZES, images.shape[1:])


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes.

    The format (two zero bytes, a type, the number of dimensions, each size as big-endian int32, the
    values): http://yann.lecun.com/exdb/mnist/. Raises ValueError naming the path for a damaged gzip
    stream, another magic number, and a length that differs from the sizes.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file: {error}") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or len(raw) < 4 + 4 * raw[3]:
        raise ValueError(f"{path} is not an IDX file of unsigned bytes: it begins with {raw[:4].hex() or 'nothing'}")
    sizes = struct.unpack(f">{raw[3]}i", raw[4 : 4 + 4 * raw[3]])
    values = np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * raw[3])
    if values.size != np.prod(sizes):
        raise ValueError(f"{path} holds {values.size} values, but its header promises {sizes}")
    return values.reshape(sizes)


def _split(name: str, arrays: tuple[np.ndarray, np.ndarray], sizes: tuple[int, ...], shape: tuple) -> Dataset:
    """Shuffle (pixels, labels) by a fixed seed and cut the parts off one after another."""
    pixels, labels = arrays
    # RandomState, because it is the one numpy generator whose numbers are promised never to change.
    order = np.random.RandomState(0).permutation(len(labels))
    parts, start = {}, 0
    for part, size in zip(PARTS, sizes, strict=True):
        index = order[start : start + size]
        inputs = torch.from_numpy(pixels[index].astype(np.float32))
        parts[part] = Examples(inputs, torch.from_numpy(labels[index].astype(np.int64)))
        start += size
    return Dataset(name, **parts, n_classes=10, image_shape=tuple(shape))
