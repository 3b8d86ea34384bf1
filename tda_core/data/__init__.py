"""Data sets by name, with fixed splits: `load_dataset("digits", n_train=300)`.

Three parts: `train`, `validation` queries (hyper-parameters are chosen on these alone) and `test`
queries (reported). A part is a fixed order of fixed examples, and a smaller size takes its first
examples, so small runs are nested in bigger ones and no example ever changes part.

| name       | task                       | train | validation | test | split by |
|------------|----------------------------|-------|------------|------|----------|
| digits     | 10 classes, 8 x 8 pixels   |  1000 |        297 |  500 | image    |
| mnist      | 10 classes, 28 x 28 pixels |  5000 |        500 |  500 | image    |
| parkinsons | regression, 19 features    |  4167 |        863 |  845 | subject  |

`is_available` and `where_to_put` also know `icp_released`, the scores that the ICP paper released, which are no
examples to train on and have a loader of their own, `tda_core.data.released.load_released`; and `tinyshakespeare`, a
text, which `tda_core.corpora.load_corpus` cuts into documents; and the data sets of `MIXTURES`, prompts with responses
by family, which `tda_core.instruction_mixture.named_mixture` splits.

This module imports neither torch nor scikit-learn, so that `is_available` costs nothing, but for mixtures.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tda_core.data.files import DataFile, DataUnavailable, find

if TYPE_CHECKING:
    from torch import Tensor

    from tda_core.examples import Examples

__all__ = [
    "DATASETS",
    "DATASETS_OF_TEXT",
    "MIXTURES",
    "RELEASED",
    "DataUnavailable",
    "Dataset",
    "is_available",
    "load_dataset",
    "where_to_put",
]

PARTS = ("train", "validation", "test")
# Families of data sets of instructions, by their names in `tda_core.data.instructions`; FLAN is four of its tasks here
MIXTURES = {"alpaca": ("alpaca",), "tulu": ("tulu",), "safe_rlhf": ("safe_rlhf",)}
MIXTURES |= {"flan": ("flan:rte", "flan:sst2", "flan:trec", "flan:wic")}
_OSSCI = "https://ossci-datasets.s3.amazonaws.com/mnist/"
# A pinned copy of UCI's data set 189. UCI's own file has commas and more digits of Jitter(Abs): another checksum.
_UCI_COPY = (
    "https://raw.githubusercontent.com/shikashyam/ParkinsonsTelemonitoring/deb237cac5ac21f2254f96077e53ec90f401a4c5/"
)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three parts of one data set; classes are 0..n_classes-1, and n_classes is None for a regression."""

    name: str
    train: "Examples"
    validation: "Examples"
    test: "Examples"
    n_classes: int | None
    image_shape: tuple[int, int] | None = None  # inputs are flattened images of this shape
    feature_names: tuple[str, ...] | None = None
    groups: "dict[str, Tensor] | None" = None  # part -> (n,) int64, who each row was measured on


@dataclass(frozen=True)
class Source:
    """Where a data set comes from: the files it needs, and the function that reads them."""

    load: "Callable[..., Dataset]"
    files: tuple[DataFile, ...] = ()


def _digits() -> Dataset:
    from tda_core.data.vision import load_digits

    return load_digits()


def _mnist(images: DataFile, labels: DataFile) -> Dataset:
    from tda_core.data.vision import load_mnist

    return load_mnist(images, labels)


def _parkinsons(table: DataFile) -> Dataset:
    from tda_core.data.tabular import load_parkinsons

    return load_parkinsons(table)


_IMAGES = "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
_LABELS = "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
_TABLE = "52229b3075c2109a2c144f5584d88cc5ea99022a9a9eaa6d978b2e8e7c6bc501"

DATASETS: dict[str, Source] = {
    "digits": Source(_digits),
    "mnist": Source(
        _mnist,
        (
            DataFile("mnist", "t10k-images-idx3-ubyte.gz", _IMAGES, _OSSCI),
            DataFile("mnist", "t10k-labels-idx1-ubyte.gz", _LABELS, _OSSCI),
        ),
    ),
    "parkinsons": Source(_parkinsons, (DataFile("parkinsons", "parkinsons_updrs.data", _TABLE, _UCI_COPY),)),
}

# The scores of the ICP paper, Jiao et al. 2024, https://arxiv.org/abs/2407.12259. The repository has no licence file:
# its data are read where they lie, and never copied into this project.
_ICP = "https://raw.githubusercontent.com/cxcscmu/InContextDataAttribution/87a5da6fa1e092e1d1500ed94f1cbc57e03bfe59/"
_ICP_IP = (
    "4d5583ea8726b51d40bd8417f1f8bc7d3875afaca978cdfc35a321489dd00b06",
    "a9517ba1bdc9380890a52764445bc0c7acee0f410aca8f14a3246df196b87d9c",
    "c505e4940378a4a6e547ed597c728fde8d35340c1f025e030a67fc87e7a1af06",
    "199740bf4fa3f7a3d60e0a30a5a729f9045c053b6484cff42486faac334a8e75",
    "6336125ddd7a181472eb9ea2326534478a88b2117cac14f1868ef740a2e36126",
    "8d51132d81c73199b0edebca72be7ae7ba21902bbd71c2731dc950d5a17b8d34",
    "61d7ddd9e29f59ba510b2a10f82786789dc02c63463f772cb3e51745a7cf38d0",
    "e8e7d677db1c4059cc4a5a5aa379b2bbd990f4721ac07ae8d00843244762adb6",
    "fbc50829dbe55cf73bf141e430c25642b7eabf6fac8c8521816e43aa6e0710f9",
)
_ICP_SCORES = "d7140239a009ff4e9469ba41ea5c59bca46be5ab377cc80418a60a93e13a7319"
_ICP_PROMPTS = "72c769baff5da66d40c5f82bae51999d10202b59ebbdf333e9388fd6bd76026e"
_ICP_LOW = "5b20e3a452b29244b6acbc99c5c2adc68acc9dff94def9561f41ccf68a9c1c80"
_ICP_HIGH = "800b858c025c134d48b01f758073b84aed295e7a3a12227097a38a062835fc37"
RELEASED: dict[str, tuple[DataFile, ...]] = {
    "icp_released": (
        DataFile("icp_released", "icp_scores.json", _ICP_SCORES, _ICP + "data/scores/"),
        DataFile("icp_released", "kmeans100.txt", _ICP_PROMPTS, _ICP + "data/prompts/"),
        DataFile("icp_released", "finetune-icp-le-0.5.json", _ICP_LOW, _ICP + "data/finetune/", "icp%3C%3D0.5.json"),
        DataFile("icp_released", "finetune-icp-gt-0.9.json", _ICP_HIGH, _ICP + "data/finetune/", "icp%3E0.9.json"),
        *(
            DataFile("icp_released", f"infl_ip-{i}-of-9.pt", sha256, _ICP + "data/scores/")
            for i, sha256 in enumerate(_ICP_IP, 1)
        ),
    )
}

# Plain texts, which `tda_core.corpora.load_corpus` cuts into documents.
DATASETS_OF_TEXT: dict[str, DataFile] = {
    "tinyshakespeare": DataFile(
        "text",
        "tinyshakespeare.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/",
        "input.txt",
    )
}


def load_dataset(
    name: str, *, n_train: int | None = None, n_validation: int | None = None, n_test: int | None = None
) -> Dataset:
    """The data set `name` with the first `n_<part>` examples of each part (None: all of the part).

    Files are looked for in `TDA_DATA_DIR`, then in `data/`, then downloaded there. Raises ValueError
    for an unknown name, a size below 1 or above what there is, and a file with a wrong checksum;
    DataUnavailable, which says where to put which file, where a file is missing and cannot be had.
    """
    source = _source(name)
    dataset = source.load(*source.files)
    cut = {}
    for part, size in zip(PARTS, (n_train, n_validation, n_test), strict=True):
        available = len(getattr(dataset, part))
        if size is None:
            size = available
        if not 1 <= size <= available:
            raise ValueError(f"n_{part} must lie in 1..{available}, what {name} has for {part}, got {size}")
        cut[part] = size
    groups = dataset.groups and {part: rows[: cut[part]] for part, rows in dataset.groups.items()}
    return replace(dataset, groups=groups, **{part: getattr(dataset, part)[:size] for part, size in cut.items()})


def is_available(name: str) -> bool:
    """Whether `name` can be loaded without a download (files are looked for, not read)."""
    if name in MIXTURES:
        from tda_core.data.instructions import find_pairs  # here, because it imports torch

        return all(find_pairs(part) for part in MIXTURES[name])
    return all(find(file) for file in _files(name))


def where_to_put(name: str) -> str:
    """One line a file: where it belongs, its checksum and its source ('' for embedded data)."""
    if name in MIXTURES:
        from tda_core.data.instructions import hub_file

        return "\n".join(hub_file(part).where_to_put() for part in MIXTURES[name])
    return "\n".join(file.where_to_put() for file in _files(name))


def _files(name: str) -> tuple[DataFile, ...]:
    if name in DATASETS_OF_TEXT:
        return (DATASETS_OF_TEXT[name],)
    return RELEASED[name] if name in RELEASED else _source(name).files


def _source(name: str) -> Source:
    if name in RELEASED:
        raise ValueError(f"{name} holds scores, not examples: load it with tda_core.data.released.load_released()")
    if name in DATASETS_OF_TEXT:
        raise ValueError(f"{name} is a text: load it with tda_core.corpora.load_corpus({name!r})")
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join([*DATASETS, *RELEASED, *DATASETS_OF_TEXT])}")
    return DATASETS[name]
