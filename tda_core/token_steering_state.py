"""What training steering operators of a language model changes, step by step: all that a stopped run needs to go on."""

import torch
from torch import Tensor

from tda_core.token_steering import TokenSteering

BETAS, EPSILON = (0.9, 0.999), 1e-12


class State:
    """What training changes, by name: matrices, first and second (moments), projection, losses; and the step."""

    def __init__(self, tensors: dict[str, Tensor], settings: TokenSteering) -> None:
        device = tensors["projection"].device
        self.tensors = {name: value.to(device) for name, value in tensors.items()}
        self.learned = settings.basis == "linear"

    @classmethod
    def start(cls, projection: Tensor, shape: tuple[int, int, int], settings: TokenSteering) -> "State":
        own = settings.second_moment == "own"
        zeros = {"matrices": shape, "first": shape, "second": shape if own else shape[1:]}
        tensors = {name: torch.zeros(size, device=projection.device) for name, size in zeros.items()}
        tensors |= {"projection": projection, "losses": torch.zeros(settings.steps, 3), "step": torch.tensor(0)}
        if settings.basis == "linear":
            tensors |= {f"projection_{name}": torch.zeros_like(projection) for name in ("first", "second")}
        return cls(tensors, settings)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def step(self) -> int:
        return int(self.tensors["step"])

    def finished(self) -> dict[str, Tensor]:
        """What is kept of a training that is over."""
        return {name: self.tensors[name] for name in ("matrices", "projection", "losses", "step")}


def move(values: Tensor, first: Tensor, second: Tensor, step: int, rate: float) -> None:
    """Adam's step (Kingma & Ba 2015), moments without their start's bias."""
    root = (second / (1 - BETAS[1] ** (step + 1))).sqrt_().add_(EPSILON)
    values.addcdiv_(first, root, value=-rate / (1 - BETAS[0] ** (step + 1)))
