"""Matrices of scores that other packages give, as score files: their axes are known by name, their sign is said.

    file = from_package(matrix, About("traker", target="margin"), sign="proponents_positive")

What a package calls a score depends on how it was asked: of a loss, or of a margin; the effect of a training example,
or of its removal. So the sign has no default. `metrics.check_sign` tells by a ground truth where it is in doubt.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from tda_core.score_file import About, Items, ScoreFile

# Which axis of a package's matrix is the queries': dattri's `attribute`, TRAK's `finalize_scores` and bergson's scores
# have training examples first; kronfluence's pairwise scores, a matrix or one by the name "all_modules", queries.
QUERY_AXIS = {"traker": 1, "dattri": 1, "bergson": 1, "kronfluence": 0}
SIGNS = {"proponents_positive": 1.0, "proponents_negative": -1.0}


def from_package(
    matrix: Tensor | np.ndarray | Mapping[str, Tensor],
    about: About,
    *,
    sign: str,
    train: Items | None = None,
    queries: Items | None = None,
) -> ScoreFile:
    """The score file of a matrix as the package that `about.method` begins with gives it ("traker", "dattri/tracin").

    matrix: for kronfluence what `load_pairwise_scores` gives, too; scores of several modules are summed. sign:
    "proponents_positive" or "proponents_negative", which is turned. train, queries: what they are, numbered by default.
    Raises ValueError for an unknown package or sign, and as `ScoreFile` does.
    """
    package = about.method.partition("/")[0]
    if package not in QUERY_AXIS:
        raise ValueError(f"unknown package {package!r}, expected one of {', '.join(QUERY_AXIS)}; for others ScoreFile")
    if sign not in SIGNS:
        raise ValueError(f"sign must be one of {', '.join(SIGNS)}, got {sign!r}")
    if isinstance(matrix, Mapping):
        if not matrix:
            raise ValueError("a mapping of scores by module must not be empty")
        matrix = sum(torch.as_tensor(part).double() for part in matrix.values())
    scores = torch.as_tensor(np.ascontiguousarray(matrix) if isinstance(matrix, np.ndarray) else matrix)
    if scores.ndim != 2:
        raise ValueError(f"a matrix of scores has two axes, got shape {tuple(scores.shape)}")
    scores = SIGNS[sign] * (scores if QUERY_AXIS[package] == 0 else scores.T)
    q, n = scores.shape
    return ScoreFile(scores, about, train or Items.numbered(n), queries or Items.numbered(q))
