"""Tables: Parkinsons telemonitoring, a regression with several rows a person."""

import numpy as np
import pandas as pd
import torch

from tda_core.data import PARTS, Dataset
from tda_core.data.files import DataFile, fetch
from tda_core.examples import Examples

TARGET = "motor_UPDRS"
DROPPED = ("subject#", "motor_UPDRS", "total_UPDRS")  # who it is, the target, and the target's near copy
SUBJECTS = (30, 6, 6)


def load_parkinsons(file: DataFile) -> Dataset:
    """5,875 voice recordings of 42 people; predict the motor UPDRS score, a measure of symptoms.

    Tsanas and Little 2009, UCI, https://doi.org/10.24432/C5ZS3F, CC BY 4.0. Features: age, sex,
    test_time (days since recruitment) and the 16 voice measures, 19 in all. total_UPDRS is left out,
    as it nearly repeats the target.

    Split by subject (30, 6 and 6 people), for rows of one person resemble each other: a random split
    would reward finding the same voice. Rows are shuffled within their part. Features and target are
    standardised by the mean and deviation of the whole training part, whatever size is asked for, so
    that runs of different sizes see the same numbers. Returns float32 inputs (n, 19) and targets (n,).
    """
    table = pd.read_csv(fetch(file), sep="\t")
    features = [column for column in table.columns if column not in DROPPED]
    subjects = table["subject#"].to_numpy()
    inputs, targets = table[features].to_numpy(np.float64), table[TARGET].to_numpy(np.float64)

    # RandomState, because it is the one numpy generator whose numbers are promised never to change.
    rng = np.random.RandomState(0)
    people = rng.permutation(np.unique(subjects))
    owned = np.split(people, np.cumsum(SUBJECTS)[:-1])
    rows = {
        part: rng.permutation(np.flatnonzero(np.isin(subjects, own))) for part, own in zip(PARTS, owned, strict=True)
    }
    train = rows["train"]
    inputs = (inputs - inputs[train].mean(0)) / inputs[train].std(0)
    targets = (targets - targets[train].mean()) / targets[train].std()
    parts = {
        part: Examples(
            torch.from_numpy(inputs[index].astype(np.float32)), torch.from_numpy(targets[index].astype(np.float32))
        )
        for part, index in rows.items()
    }
    groups = {part: torch.from_numpy(subjects[index].astype(np.int64)) for part, index in rows.items()}
    return Dataset("parkinsons", **parts, n_classes=None, feature_names=tuple(features), groups=groups)
