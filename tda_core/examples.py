"""Labelled examples: the one form in which training sets and queries travel."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# The label of a position that no loss is taken on.
IGNORED = -100


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs and targets of equal length, checked once, here.

    inputs: (n, ...) float tensor, finite. targets: (n,) int64 class labels, or (n,) float targets. Sequences:
    inputs (n, T) int64 tokens, targets (n, T) int64, the token that follows each position or `IGNORED`.
    Raises ValueError for an empty set, unequal lengths, NaN or infinite values, and a sequence of which every
    position is ignored; TypeError for other types.
    """

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        for name in ("inputs", "targets"):
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        if not self.inputs.is_floating_point() and not (self.is_sequence and self.inputs.dtype == torch.int64):
            raise TypeError(f"inputs must be floating point, got {self.inputs.dtype} (tokens: int64, labels (n, T))")
        if not self.targets.is_floating_point() and self.targets.dtype != torch.int64:
            raise TypeError(f"targets must be int64 class labels or floating point, got {self.targets.dtype}")
        if self.inputs.ndim < 2:
            raise ValueError(f"inputs must be (n, ...) with at least 2 dimensions, got {tuple(self.inputs.shape)}")
        if self.targets.ndim != 1 and not (self.is_sequence and self.targets.shape == self.inputs.shape[:2]):
            raise ValueError(f"targets must be (n,), got {tuple(self.targets.shape)}")
        if len(self.inputs) != len(self.targets):
            raise ValueError(f"{len(self.inputs)} inputs but {len(self.targets)} targets")
        if len(self.inputs) == 0:
            raise ValueError("an example set must not be empty, got 0 examples")
        for name in ("inputs", "targets"):
            value = getattr(self, name)
            if value.is_floating_point() and not torch.isfinite(value).all():
                bad = int((~torch.isfinite(value.flatten(1) if value.ndim > 1 else value[:, None])).any(1).nonzero()[0])
                raise ValueError(f"{name} must be finite, but example {bad} holds NaN or infinity")
        if self.is_sequence and bool((unlabelled := (self.targets == IGNORED).all(1)).any()):
            raise ValueError(f"sequence {int(unlabelled.nonzero()[0])} has no labelled position")
        labels = self.targets[self.targets != IGNORED] if self.is_sequence else self.targets
        if not labels.is_floating_point() and int(labels.min()) < 0:
            raise ValueError(f"class labels must be >= 0, got {int(labels.min())}")

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index) -> "Examples":
        """A subset: slice, index tensor or boolean mask (never a single int, which would drop a dimension)."""
        if isinstance(index, int):
            index = slice(index, index + 1 or None)
        return Examples(self.inputs[index], self.targets[index])

    @property
    def is_classification(self) -> bool:
        return not self.targets.is_floating_point()

    @property
    def is_sequence(self) -> bool:
        """Whether each position has a label of its own."""
        return self.targets.ndim == 2 and self.targets.dtype == torch.int64

    def expect_like(self, other: "Examples", n_outputs: int) -> None:
        """Raise ValueError where a model with `n_outputs` outputs that fits `other` does not fit these examples."""
        if self.is_sequence != other.is_sequence:
            raise ValueError(f"targets must be one a {'token' if other.is_sequence else 'row'}, as in training")
        if self.inputs.shape[1:] != other.inputs.shape[1:] and not self.is_sequence:  # which may be of any length
            expected, got = (", ".join(map(str, e.inputs.shape[1:])) for e in (other, self))
            raise ValueError(f"inputs must have shape (n, {expected}), got (n, {got})")
        if self.is_classification != other.is_classification:
            raise ValueError(f"targets must be {other.targets.dtype} as in training, got {self.targets.dtype}")
        if self.is_classification and int(self.targets.max()) >= n_outputs:
            raise ValueError(f"label {int(self.targets.max())} is out of range for {n_outputs} outputs")

    @property
    def hash(self) -> str:
        """SHA-256 of contents, shapes and types: what cached results are keyed by."""
        return hash_of((self.inputs, self.targets))


def hash_of(tensors: Iterable[Tensor]) -> str:
    """SHA-256 (hex) of tensors' contents, shapes and types, in order."""
    digest = hashlib.sha256()
    for value in tensors:
        digest.update(f"{tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
