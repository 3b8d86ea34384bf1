"""Probes: features times coordinates against plain gradients, factors against explicit projections."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import FLOAT64, Branching, continuous, generator, labelled, random_problem

from tda_core import probes as module
from tda_core.examples import Examples
from tda_core.probes import LayerProbe, TangentProbe, layer_probe
from tda_core.problem import Problem

QUERIES = labelled(6, seed=5)


def close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=FLOAT64)


def sequences(n: int = 6, length: int = 3, width: int = 4, *, seed: int = 0) -> Examples:
    flat = labelled(n, length * width, seed=seed)
    return Examples(flat.inputs.view(n, length, width), flat.targets)


def problem_of(module_: nn.Module, train: Examples | None = None) -> Problem:
    """A cross-entropy problem of this module at random parameters that are not its own."""
    train = labelled(12) if train is None else train
    frozen = {name for name, value in module_.named_parameters() if not value.requires_grad}
    module_ = module_.to(FLOAT64)
    for i, (name, value) in enumerate(module_.named_parameters()):
        value.data = 0.6 * normal(*value.shape, seed=i)
        value.requires_grad_(name not in frozen)
    own = Problem.from_module(module_, "cross_entropy", train)
    return own.at(0.6 * normal(own.n_parameters, seed=99))


def exact(problem: Problem) -> LayerProbe:
    names = {name.rpartition(".")[0] for name in problem.names}
    return LayerProbe(problem, {name: (None, None) for name in names})


def orthonormal(rows: int, width: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(width, rows, seed=seed))[0].T.contiguous()


# -- modules ----------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two branches that meet, a bias here and none there, and layers that run in another order than they are held."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)
        self.gate = nn.Linear(4, 5, bias=False)
        self.inner = nn.ModuleDict({"up": nn.Linear(5, 7), "down": nn.Linear(7, 5, bias=False)})
        self.stem = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        h = h + self.inner["down"](torch.relu(self.inner["up"](h)))
        return self.head(h * torch.sigmoid(self.gate(x)))


class Attention(nn.Module):
    """Causal self-attention in plain linear layers, then the last position or the mean over positions."""

    def __init__(self, pool: str = "last") -> None:
        super().__init__()
        self.pool = pool
        self.qkv = nn.Linear(4, 12, bias=False)
        self.mix = nn.Linear(4, 4)
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        allowed = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        weights = (q @ k.transpose(1, 2) / 2).masked_fill(~allowed, -torch.inf).softmax(-1)
        x = x + self.mix(weights @ v)
        x = x + self.down(torch.nn.functional.gelu(self.up(x)))
        return self.head(x[:, -1] if self.pool == "last" else x.mean(1))


class Pooled(nn.Module):
    """Positions in any number of dimensions, averaged after the layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x))).flatten(1, -2).mean(1)


class InPlace(nn.Module):
    """What flows out of layers is overwritten afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu_()
        h = h + self.second(h).tanh_()
        return self.last(h).mul_(1.5)


class Discarded(nn.Module):
    """A layer runs, but the loss does not depend on it."""

    def __init__(self) -> None:
        super().__init__()
        self.side, self.last = nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.side(x)
        return self.last(x)


def frozen_below() -> nn.Module:
    module_ = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    module_[0].requires_grad_(False)
    return module_


def frozen_between() -> nn.Module:
    module_ = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    module_[1].requires_grad_(False)
    module_[3].requires_grad_(False)
    return module_


def plain(bias: bool) -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 5, bias=bias), nn.Tanh(), nn.Linear(5, 6, bias=bias), nn.ReLU(), nn.Linear(6, 3, bias=bias)
    )


FLAT = {
    "one_layer": lambda: nn.Linear(4, 3),
    "one_layer_in_a_box": lambda: nn.Sequential(nn.Linear(4, 3, bias=False)),
    "biased": lambda: plain(True),
    "unbiased": lambda: plain(False),
    "residual": Residual,
    "in_place": InPlace,
    "discarded": Discarded,
    "frozen_below": frozen_below,
    "frozen_between": frozen_between,
    "dropout": lambda: nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)),
}
SEQUENTIAL = {
    "attention_last": lambda: (Attention("last"), sequences()),
    "attention_mean": lambda: (Attention("mean"), sequences()),
    "one_position": lambda: (Attention("last"), sequences(length=1)),
    "grid": lambda: (Pooled(2), Examples(normal(6, 3, 2, 2), labelled(6).targets)),
    "square_grid": lambda: (Pooled(2), Examples(normal(6, 3, 3, 2), labelled(6).targets)),
}


def make(name: str) -> Problem:
    return problem_of(FLAT[name]()) if name in FLAT else problem_of(*SEQUENTIAL[name]())


each_module = pytest.mark.parametrize("name", [*FLAT, *SEQUENTIAL])
each_flat_module = pytest.mark.parametrize("name", FLAT)


# -- exact probes -----------------------------------------------------------------------------------


@each_module
def test_features_times_coordinates_are_gradients_along_directions(name):
    problem = make(name)
    assert problem.linear_layers is not None
    probe, directions = exact(problem), normal(7, problem.n_parameters)
    expected = problem.gradients(problem.train) @ directions.T
    assert float(expected.abs().max()) > 0.1
    features, coordinates = probe.features(problem.train), probe.coordinates(directions)
    assert features.shape == (len(problem.train), problem.n_parameters)
    assert coordinates.shape == (7, problem.n_parameters)
    assert probe.n_features == problem.n_parameters
    close(features @ coordinates.T, expected)
    close(probe.read(problem.train, coordinates), expected)
    close(features.norm(dim=1), problem.gradients(problem.train).norm(dim=1))
    close(coordinates.norm(dim=1), directions.norm(dim=1))
    assert not features.requires_grad


@each_flat_module
def test_forward_mode_is_reverse_mode(name):
    problem = make(name)
    probe = exact(problem)
    close(probe.features(QUERIES, "forward"), probe.features(QUERIES), 1e-12)
    close(probe.features(QUERIES, "reverse"), probe.features(QUERIES), 0)
    maps = normal(3, probe.n_features)
    close(probe.read(QUERIES, maps, "forward"), probe.read(QUERIES, maps), 1e-12)
    close(probe.read(QUERIES, maps, "forward"), probe.features(QUERIES) @ maps.T, 1e-12)


def test_regression_is_read_alike():
    problem, queries = random_problem((4, 5, 1)), continuous(6, seed=5)
    directions = normal(3, problem.n_parameters)
    for mode in ("reverse", "forward"):
        found = exact(problem).read(queries, exact(problem).coordinates(directions), mode)
        close(found, problem.gradients(queries) @ directions.T)


@each_module
def test_a_feature_block_is_the_gradient_of_its_layer(name):
    """In the order of `slices`: a row for each output, the bias as last column."""
    problem = make(name)
    probe, gradients = exact(problem), problem.gradients(problem.train)
    features = probe.features(problem.train)
    assert list(probe.slices) == list(dict.fromkeys(name.rpartition(".")[0] for name in problem.names))
    covered = torch.cat([torch.arange(problem.n_parameters)[part] for part in probe.slices.values()])
    assert torch.equal(covered, torch.arange(problem.n_parameters))
    for layer, part in probe.slices.items():
        prefix = f"{layer}." if layer else ""
        shape = probe.layers[layer].weight.shape
        blocks = [gradients[:, problem.offsets[f"{prefix}weight"]].unflatten(1, shape)]
        if f"{prefix}bias" in problem.offsets:
            blocks.append(gradients[:, problem.offsets[f"{prefix}bias"], None])
        close(features[:, part], torch.cat(blocks, 2).flatten(1))


def test_layers_are_read_at_theta_and_the_module_is_left_alone():
    problem = make("biased")
    before = {name: value.clone() for name, value in problem.module.state_dict().items()}
    moved = problem.at(problem.theta + 0.3)
    directions = normal(3, problem.n_parameters)
    for own in (problem, moved):
        close(exact(own).read(QUERIES, exact(own).coordinates(directions)), own.gradients(QUERIES) @ directions.T)
    assert not torch.allclose(exact(moved).features(QUERIES), exact(problem).features(QUERIES), atol=0.01)
    for name, value in problem.module.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(value.requires_grad for value in problem.module.parameters())
    assert not any(part._forward_hooks for part in problem.module.modules())


def test_hooks_are_gone_after_a_failed_pass(monkeypatch):
    problem = make("biased")
    probe = exact(problem)

    def fail(outputs: Tensor, targets: Tensor) -> Tensor:
        raise ArithmeticError

    object.__setattr__(probe.problem, "loss", fail)
    for mode in ("reverse", "forward"):
        with pytest.raises(ArithmeticError):
            probe.features(QUERIES, mode)
        assert not any(part._forward_hooks for part in probe.problem.placed.modules())


def test_neither_mode_forms_parameter_gradients_and_forward_mode_runs_no_backward_pass(monkeypatch):
    problem = make("biased")
    probe = exact(problem)
    expected = {mode: probe.features(QUERIES, mode) for mode in ("reverse", "forward")}

    def refuse(*arguments, **keywords):
        raise AssertionError("a backward pass")

    monkeypatch.setattr("tda_core.problem.grad", refuse)
    monkeypatch.setattr("tda_core.layers.gradients", refuse)
    assert torch.equal(probe.features(QUERIES), expected["reverse"])
    assert not any(value.requires_grad for value in probe.problem.placed.parameters())
    monkeypatch.setattr(torch.autograd, "grad", refuse)
    assert torch.equal(probe.features(QUERIES, "forward"), expected["forward"])
    with pytest.raises(AssertionError, match="a backward pass"):
        probe.features(QUERIES)


def test_features_are_read_where_autograd_is_off():
    problem = make("residual")
    probe = exact(problem)
    expected = probe.features(QUERIES)
    with torch.no_grad():
        assert torch.equal(probe.features(QUERIES), expected)
    assert torch.is_grad_enabled()


def test_forward_mode_in_chunks_of_one_query(monkeypatch):
    probe = exact(make("residual"))
    whole = probe.features(QUERIES, "forward")
    rows = []
    original = LayerProbe._forward_chunk

    def spy(self, examples, *rest):
        rows.append(len(examples))
        return original(self, examples, *rest)

    monkeypatch.setattr(LayerProbe, "_forward_chunk", spy)
    for floats, expected in ((1, [1] * 6), (2 * 25 * 7, [2] * 3), (4 * 25 * 7 + 1, [4, 2])):
        rows.clear()
        monkeypatch.setattr(module, "CHUNK_FLOATS", floats)
        close(probe.features(QUERIES, "forward"), whole, 1e-12)
        assert rows == expected  # 25 outputs of all layers, at most 7 of one


def test_single_precision_follows_theta():
    problem = make("residual")
    single = Problem(problem.module, problem.theta.float(), problem.loss, problem.train)
    for mode in ("reverse", "forward"):
        found = exact(single).features(QUERIES, mode)
        assert found.dtype == torch.float32
        close(found.double(), exact(problem).features(QUERIES), 1e-4)


@settings(deadline=None, max_examples=10)
@given(order=st.permutations(range(6)), mode=st.sampled_from(["reverse", "forward"]))
def test_an_example_is_read_alone_as_among_others(order, mode):
    probe, order = exact(make("residual")), torch.tensor(order)
    close(probe.features(QUERIES[order], mode), probe.features(QUERIES)[order], 1e-12)
    close(probe.features(QUERIES[order[:1]], mode), probe.features(QUERIES)[order[:1]], 1e-12)


@settings(deadline=None, max_examples=10)
@given(a=st.floats(-5, 5), b=st.floats(-5, 5), seed=st.integers(0, 99))
def test_coordinates_and_readings_are_linear(a, b, seed):
    problem = make("biased")
    probe = projected(problem)
    r, s = normal(3, problem.n_parameters, seed=seed), normal(3, problem.n_parameters, seed=seed + 1)
    mixed = a * probe.coordinates(r) + b * probe.coordinates(s)
    close(probe.coordinates(a * r + b * s), mixed)
    close(probe.read(QUERIES, mixed), (probe.read(QUERIES, probe.coordinates(a * r + b * s))))
    weighted = a * probe.read(QUERIES, probe.coordinates(r)) + b * probe.read(QUERIES, probe.coordinates(s))
    close(probe.read(QUERIES, mixed), weighted)


# -- factors ----------------------------------------------------------------------------------------


def projected(problem: Problem, sides: str = "AB") -> LayerProbe:
    """Random factors of two rows on the given sides of every layer."""
    factors = {}
    for i, (name, layer) in enumerate(exact(problem).layers.items()):
        width = layer.in_features + (layer.bias is not None)
        a = orthonormal(2, width, seed=i) if "A" in sides else None
        b = orthonormal(2, layer.out_features, seed=50 + i) if "B" in sides else None
        factors[name] = (a, b)
    return LayerProbe(problem, factors)


@each_module
@pytest.mark.parametrize("sides", ["A", "B", "AB"])
def test_factors_project_the_gradient_of_each_layer(name, sides):
    """Against B G A', with G the layer's gradient."""
    problem = make(name)
    probe, whole, directions = projected(problem, sides), exact(problem), normal(4, problem.n_parameters)
    full, rho = whole.features(problem.train), whole.coordinates(directions)
    features, coordinates = probe.features(problem.train), probe.coordinates(directions)
    assert features.shape == (len(problem.train), probe.n_features)
    assert coordinates.shape == (4, probe.n_features)
    for layer, part in probe.slices.items():
        a, b = probe.factors[layer]
        for found, source in ((features, full), (coordinates, rho)):
            expected = source[:, whole.slices[layer]].unflatten(1, (probe.layers[layer].out_features, -1))
            expected = expected if a is None else expected @ a.T
            expected = expected if b is None else b @ expected
            close(found[:, part], expected.flatten(1))
    if name in FLAT:
        close(probe.features(problem.train, "forward"), features, 1e-12)
    close(probe.read(problem.train, coordinates), features @ coordinates.T, 1e-12)


def test_square_factors_lose_nothing():
    problem = make("residual")
    directions = normal(4, problem.n_parameters)
    factors = {}
    for i, (name, layer) in enumerate(exact(problem).layers.items()):
        width = layer.in_features + (layer.bias is not None)
        factors[name] = (orthonormal(width, width, seed=i), orthonormal(layer.out_features, layer.out_features, i))
    probe = LayerProbe(problem, factors)
    expected = problem.gradients(QUERIES) @ directions.T
    for mode in ("reverse", "forward"):
        close(probe.read(QUERIES, probe.coordinates(directions), mode), expected)


def flowing(problem: Problem, examples: Examples, name: str) -> tuple[Tensor, Tensor]:
    """What flows into a layer (n, T, d), and unit-length derivatives in what flows out, by plain autograd."""
    probe, inputs, deltas = exact(problem), [], []

    def watch(_, args, out):
        inputs.append(args[0].detach())
        out.requires_grad_()
        out.register_hook(deltas.append)

    handle = probe.layers[name].register_forward_hook(watch)
    problem.loss(probe.problem.placed(examples.inputs), examples.targets).sum().backward()
    handle.remove()
    x, delta = (part[0].reshape(len(examples), -1, part[0].shape[-1]) for part in (inputs, deltas))
    return x, delta / delta.flatten(1).norm(dim=1)[:, None, None]


@pytest.mark.parametrize("energy", [0.3, 0.7, 0.9])
@pytest.mark.parametrize("name", ["biased", "unbiased", "residual", "attention_last", "grid"])
def test_energy_is_the_share_of_the_trace_that_factors_keep(name, energy):
    problem = make(name)
    probe = layer_probe(problem, problem.train, energy)
    assert any(factor is not None for pair in probe.factors.values() for factor in pair)
    for layer, (a, b) in probe.factors.items():
        x, delta = flowing(problem, problem.train, layer)
        if probe.layers[layer].bias is not None:
            x = torch.cat([x, torch.ones_like(x[..., :1])], 2)
        for factor, flow in ((a, x), (b, delta)):
            rows = flow.flatten(0, 1)
            values = torch.linalg.svdvals(rows.T @ rows)
            needed = int((values.cumsum(0) < energy * values.sum()).sum()) + 1
            if needed > module.FULL_ABOVE * len(values):
                assert factor is None
                continue
            assert factor.shape == (needed, len(values))
            close(factor @ factor.T, torch.eye(needed, dtype=FLOAT64))
            share = float(((rows @ factor.T) ** 2).sum() / (rows**2).sum())
            assert share == pytest.approx(float(values[:needed].sum() / values.sum()), abs=1e-10)
            assert share >= energy - 1e-12


def test_the_moments_of_many_examples_are_added_up_over_parts():
    """300 examples are more than one part holds."""
    problem = random_problem((4, 9, 3), n=300)
    rows = problem.train.inputs
    values, vectors = torch.linalg.eigh(torch.cat([rows, torch.ones(300, 1, dtype=FLOAT64)], 1).T @ torch.cat(
        [rows, torch.ones(300, 1, dtype=FLOAT64)], 1
    ))  # fmt: skip
    a = layer_probe(problem, problem.train, 0.5).factors["0"][0]
    kept = int((values.flip(0).cumsum(0) < 0.5 * values.sum()).sum()) + 1
    assert a.shape == (kept, 5)
    close(a.T @ a, vectors[:, -kept:] @ vectors[:, -kept:].T, 1e-8)


def test_confident_examples_count_as_much_as_uncertain_ones():
    """Multiplying some examples' losses does not move the factors; in a plain moment it would."""
    problem = random_problem((4, 9, 3), n=30)
    size = torch.where(problem.train.inputs[:, 0] > 0, 1e-3, 1.0).to(FLOAT64)

    def uneven(outputs: Tensor, targets: Tensor) -> Tensor:
        return problem.loss(outputs, targets) * size

    scaled = Problem(problem.module, problem.theta, problem.loss, problem.train)
    assert scaled.linear_layers is not None  # found on one example, which `uneven` does not fit
    object.__setattr__(scaled, "loss", uneven)
    found, expected = (layer_probe(p, p.train, 0.6).factors for p in (scaled, problem))
    assert expected["0"][1] is not None
    for name, pair in expected.items():
        for own, other in zip(found[name], pair, strict=True):
            assert (own is None) == (other is None)
            if own is not None:
                close(own.T @ own, other.T @ other, 1e-8)


def test_more_energy_keeps_more_and_all_of_it_is_exact():
    problem = random_problem((8, 9, 3), n=30)
    widths = [layer_probe(problem, problem.train, energy).n_features for energy in (0.2, 0.6, 0.9, 0.999999)]
    assert widths == sorted(widths)
    assert widths[0] < widths[1] < problem.n_parameters
    whole = layer_probe(problem, problem.train, 1.0)
    assert whole.factors == {"0": (None, None), "2": (None, None)}
    assert whole.n_features == problem.n_parameters
    queries = labelled(6, 8, seed=5)
    directions = problem.gradients(queries)
    exact_products = directions @ directions.T
    errors = []
    for energy in (0.5, 0.8, 0.95, 1.0):
        probe = layer_probe(problem, problem.train, energy)
        errors.append(float((probe.read(queries, probe.coordinates(directions)) - exact_products).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-10 < errors[0]


def test_examples_without_any_gradient_leave_finite_factors():
    problem = random_problem((4, 9, 3)).at(torch.zeros(9 * 5 + 3 * 10, dtype=FLOAT64))
    probe = layer_probe(problem, problem.train, 0.9)  # the upper weights are zero, so no delta reaches the lower layer
    assert all(torch.isfinite(t).all() for t in probe.tensors().values())
    assert torch.isfinite(probe.features(QUERIES)).all()


# -- tensors and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["one_layer", "residual", "frozen_below"])
def test_a_probe_comes_back_from_its_tensors(name):
    problem = make(name)
    for probe in (exact(problem), projected(problem), projected(problem, "A"), projected(problem, "B")):
        named = probe.tensors()
        sides = [side for pair in probe.factors.values() for side, t in zip("AB", pair, strict=True) if t is not None]
        assert len(named) == len(sides)
        again = LayerProbe.restore(problem, named)
        assert again.slices == probe.slices
        assert torch.equal(again.features(QUERIES), probe.features(QUERIES))
    directions = normal(2, problem.n_parameters)
    assert torch.equal(again.coordinates(directions), probe.coordinates(directions))


# -- the plain probe --------------------------------------------------------------------------------


@pytest.mark.parametrize("branching", [True, False])
def test_a_tangent_probe_is_the_gradient_itself(branching):
    problem = problem_of(Branching()) if branching else make("residual")
    probe, directions = TangentProbe(problem), normal(4, problem.n_parameters)
    gradients = problem.gradients(QUERIES)
    assert probe.n_features == problem.n_parameters
    assert torch.equal(probe.features(QUERIES), gradients)
    assert probe.coordinates(directions) is directions
    assert torch.equal(probe.read(QUERIES, directions), problem.derivatives_along(QUERIES, directions))
    assert torch.equal(probe.read(QUERIES, directions, "forward"), probe.read(QUERIES, directions))
    close(probe.read(QUERIES, directions), gradients @ directions.T)
    assert probe.tensors() == {}


# -- which modules ----------------------------------------------------------------------------------


class Twice(nn.Module):
    """One layer at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class Never(Twice):
    """A layer that does not run."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x)


class Folded(nn.Module):
    """Positions folded into the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.inner(x.reshape(-1, 2))).view(len(x), 2, 4).mean(1))


class Functional(Twice):
    """A layer's weights at work without the layer."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x @ self.inner.weight.T + self.inner.bias)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Gained(nn.Linear):
    def __init__(self, *widths: int) -> None:
        super().__init__(*widths)
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * super().forward(x)


def tied() -> nn.Module:
    module_ = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
    module_[2].weight = module_[0].weight
    return module_


def shared() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(4, 3))


def half_frozen(kind: str) -> nn.Module:
    module_ = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    getattr(module_[0], kind).requires_grad_(False)
    return module_


def only_norms() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3).requires_grad_(False), nn.LayerNorm(3))


OTHERS = {
    "twice": Twice,
    "never": Never,
    "folded": Folded,
    "functional": Functional,
    "scaled": lambda: nn.Sequential(Scaled(4, 5), nn.Tanh(), nn.Linear(5, 3)),
    "gained": lambda: nn.Sequential(Gained(4, 5), nn.Tanh(), nn.Linear(5, 3)),
    "tied": tied,
    "shared": shared,
    "weight_norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Linear(5, 3)),
    "frozen_weight": lambda: half_frozen("weight"),
    "frozen_bias": lambda: half_frozen("bias"),
    "layer_norm": lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)),
    "only_norms": only_norms,
    "branching": Branching,
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_modules_have_no_layer_probe(name):
    problem = Problem.from_module(OTHERS[name]().to(FLOAT64), "cross_entropy", labelled(12))
    assert problem.linear_layers is None
    assert not any(part._forward_hooks for part in problem.module.modules())
    with pytest.raises(
        ValueError, match=r"LayerProbe needs parameters that all lie in nn.Linear layers, each run once"
    ):
        LayerProbe(problem, {})
    with pytest.raises(ValueError, match=r"LayerProbe needs parameters that all lie in nn.Linear layers"):
        layer_probe(problem, problem.train, 0.9)


def test_norms_without_parameters_or_frozen_ones_are_no_hindrance():
    free = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5, elementwise_affine=False), nn.Linear(5, 3))
    assert problem_of(free).linear_layers is not None
    assert make("frozen_between").linear_layers is not None
    assert list(exact(make("frozen_between")).layers) == ["0", "5"]
    assert list(exact(make("frozen_below")).layers) == ["2", "4"]


# -- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [[], ["0"], ["0", "2", "3"], ["0", "1"]])
def test_factors_of_other_layers_are_refused(names):
    message = rf"factors must be of the layers \['0', '2'\], got \[{', '.join(map(repr, names))}\]"
    with pytest.raises(ValueError, match=message):
        LayerProbe(random_problem(), {name: (None, None) for name in names})


@pytest.mark.parametrize("energy", [0.0, -0.5, 1.0001, float("nan")])
def test_impossible_energies_are_refused(energy):
    problem = random_problem()
    with pytest.raises(ValueError, match=rf"energy must lie in \(0, 1\], got {energy}"):
        layer_probe(problem, problem.train, energy)


@pytest.mark.parametrize("mode", ["backward", "", None])
def test_unknown_modes_are_refused(mode):
    problem = random_problem()
    with pytest.raises(ValueError, match=rf"unknown mode {mode!r}, expected one of \('reverse', 'forward'\)"):
        exact(problem).features(QUERIES, mode)
    with pytest.raises(ValueError, match=rf"unknown mode {mode!r}"):
        exact(problem).read(QUERIES, normal(2, problem.n_parameters), mode)


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_forward_mode_is_refused_for_sequences(name):
    problem = make(name)
    with pytest.raises(ValueError, match=r"forward mode is for one position an example, but layer '\w+' gives"):
        exact(problem).features(problem.train, "forward")


@pytest.mark.parametrize("mode", ["reverse", "backward"])
def test_a_tangent_probe_reads_forward_only(mode):
    problem = random_problem()
    with pytest.raises(ValueError, match=f"a TangentProbe reads in mode 'forward' only, got '{mode}'"):
        TangentProbe(problem).read(QUERIES, normal(2, problem.n_parameters), mode)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize(
    ("queries", "error", "message"),
    [
        (labelled(3).inputs, TypeError, "got Tensor"),
        (labelled(3, d=5), ValueError, r"inputs must have shape \(n, 4\), got \(n, 5\)"),
        (Examples(torch.zeros(1, 4), torch.tensor([5])), ValueError, "label 5 is out of range for 3 outputs"),
        (continuous(3), ValueError, "targets must be torch.int64 as in training"),
    ],
)
def test_queries_that_do_not_fit_are_refused(mode, queries, error, message):
    with pytest.raises(error, match=message):
        exact(random_problem()).features(queries, mode)
