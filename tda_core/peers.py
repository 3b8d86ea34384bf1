"""Other people's implementations behind our door: fitted once on a `Problem`, then asked for scores.

For comparisons of quality and of query time. Each has the best of its public settings that we found, on the same
model, and does in advance what its interface allows. Installed by `pip install -e ".[peers]"`. A `damping` is in the
units of our own methods unless its function says otherwise, its default near the best for digits' validation queries.
"""

import contextlib
import copy
import importlib
import importlib.util
import inspect
import io
import itertools
import math
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from tda_core.examples import Examples
from tda_core.models import cross_entropy, margin
from tda_core.problem import Problem

BATCH = 500  # examples whose gradients are held at a time
KERNEL_LIMIT = 12_000  # parameters p up to which a (p, p) matrix is built


@dataclass(frozen=True, eq=False)
class Peer:
    """Another library's fitted method.

    score: (inputs (n, ...), targets (n,)) -> scores (n, n_train), with nothing kept from one call to the next.
    folder: where the library keeps its files, removed with this object; None where it needs none.
    """

    problem: Problem
    score: Callable[[Tensor, Tensor], Tensor]
    folder: tempfile.TemporaryDirectory | None = None

    def __post_init__(self) -> None:
        if self.folder:
            weakref.finalize(self, self.folder.cleanup)

    def scores(self, queries: Examples) -> Tensor:
        """Scores of every training example for every query: (n_query, n_train)."""
        self.problem.check(queries)
        inputs = queries.inputs.to(self.problem.theta.dtype)
        batches = zip(inputs.split(BATCH), queries.targets.split(BATCH), strict=True)
        with _quiet():
            return torch.cat([self.score(*batch) for batch in batches])


def traker(problem: Problem, damping: float = 0.3, *, dimension: int | None = 512, seed: int = 0) -> Peer:
    """TRAK of its authors' package, one model, float32; damping 0 is what they published.

    dimension: of the Gaussian projection, kept as one block (in the default blocks of 100 directions it is drawn
    anew for each batch); None for none, which needs few parameters. Scores are ours up to a positive factor.
    Raises ValueError for a regression problem, an invalid damping or dimension, and a singular kernel.
    """
    trak, projectors = _import("traker", "trak"), _import("traker", "trak.projectors")
    _check_settings(problem, damping, dimension, trak_of="traker")
    n, p, model = len(problem.train), problem.n_parameters, _model(problem)
    projector = projectors.NoOpProjector(device="cpu")
    if dimension is not None:
        projector = projectors.BasicProjector(p, dimension, seed, "normal", "cpu", block_size=dimension)
    folder = tempfile.TemporaryDirectory(prefix="tda_core_traker_")
    # not made quietly: it sets up logging for the whole process, to the stderr of that moment
    tracer = trak.TRAKer(
        model=model,
        task="image_classification",  # the margin, of inputs of any shape
        train_set_size=n,
        save_dir=folder.name,
        device="cpu",
        projector=projector,
        use_half_precision=False,
        logging_level="ERROR",
        # its features are gradients times a projection with entries N(0, 1), over sqrt(p)
        lambda_reg=damping * n * (dimension or 1) / p,
    )
    weights = model.state_dict()
    with _quiet():
        tracer.load_checkpoint(weights, model_id=0)
        for batch in _loader(problem, problem.train):
            tracer.featurize(batch, num_samples=len(batch[1]))
        tracer.finalize_features()
    if dimension is not None:  # finalize_features has freed it, and one block is drawn only once
        projector.generate_sketch_matrix(projector.generator_states[0])
    numbers = itertools.count()

    def score(inputs: Tensor, targets: Tensor) -> Tensor:
        name = f"queries{next(numbers)}"  # new, or an interrupted call would leave its size behind
        tracer.start_scoring_checkpoint(name, weights, model_id=0, num_targets=len(targets))
        tracer.score((inputs, targets), num_samples=len(targets))
        scores = torch.tensor(tracer.finalize_scores(name)).T
        tracer.saver.experiments.clear()  # or old queries pile up, in memory and on disk
        tracer.saver.current_store.clear()
        for path in Path(folder.name).rglob(f"{name}*.mmap"):
            path.unlink()
        return scores

    return Peer(problem, score, folder)


def dattri_trak(problem: Problem, damping: float = 0.3, *, dimension: int | None = 512, seed: int = 0) -> Peer:
    """TRAK of dattri, one model; damping 0 is what was published. Scores are in the units of our `trak`.

    dimension: of the Gaussian projection, which it draws anew for each batch (its random_mask is faster and much
    worse); None for none, which needs few parameters.
    Raises ValueError for a regression problem, an invalid damping or dimension, and a singular kernel.
    """
    algorithm, task = _import("dattri", "dattri.algorithm"), _import("dattri", "dattri.task")
    _check_settings(problem, damping, dimension, trak_of="dattri")
    model, p, kind = _model(problem), problem.n_parameters, "normal" if dimension else "identity"

    def output(parameters: dict[str, Tensor], example: tuple[Tensor, Tensor]) -> Tensor:
        inputs, target = example
        return margin(functional_call(model, parameters, (inputs[None],)), target[None])[0]

    attributor = algorithm.TRAKAttributor(
        task.AttributionTask(output, model, model.state_dict()),
        correct_probability_func=lambda parameters, example: torch.sigmoid(output(parameters, example)),
        projector_kwargs={"proj_dim": dimension or p, "proj_type": kind, "proj_seed": seed},
        regularization=damping * len(problem.train) / p,  # its gradients are over sqrt(p)
    )
    # or the next one fitted would change it: all share one dictionary of settings
    attributor.projector_kwargs = dict(attributor.projector_kwargs)
    with _quiet():
        attributor.cache(_loader(problem, problem.train))
    return Peer(problem, lambda *batch: attributor.attribute(DataLoader(TensorDataset(*batch), len(batch[1]))).T)


def dattri_influence(problem: Problem, damping: float = 0.3, *, dimension: int | None = 1024) -> Peer:
    """Influence by dattri's LoGra: each layer's empirical Fisher matrix, of projected gradients.

    Of dattri's influence functions the one that keeps the training examples' side; the others compute all training
    gradients again at every query (50 ms or more on digits, where this takes 2). damping: times the mean eigenvalue
    of each layer's matrix. dimension: per layer, a square number; None for none, which needs few parameters.
    Raises ValueError for another loss than the cross-entropy (dattri's is built in), for inputs that are not
    (n, d), for parameters outside of linear layers, and for an invalid damping or dimension.
    """
    algorithm, task = _import("dattri", "dattri.algorithm"), _import("dattri", "dattri.task")
    _check_settings(problem, damping, dimension)
    _check_linear("dattri", problem)
    if problem.loss is not cross_entropy:
        raise ValueError(f"dattri's influence needs the loss cross_entropy, got {problem.loss}")
    if problem.train.inputs.ndim != 2:
        raise ValueError(f"dattri's influence needs inputs (n, d), got {tuple(problem.train.inputs.shape)}")
    model = nn.Sequential(_model(problem), nn.Flatten(1))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor], device: str) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1]).mean()  # the mean: it multiplies by the batch size

    method, settings = algorithm.LoGraAttributor, {"proj_dim": dimension}
    if dimension is None:
        identity = {"device": "cpu", "proj_dim": -1, "proj_max_batch_size": 64, "proj_type": "identity"}
        method, settings = algorithm.BlockProjectedIFAttributor, {"sparsifier_kwargs": identity}
    # or it leaves a file in the working folder, and reads the one that it finds there
    folder = tempfile.TemporaryDirectory(prefix="tda_core_dattri_")
    settings |= {"damping": damping, "offload": "none", "cache_dir": folder.name}
    attributor = method(task.AttributionTask(loss, model, model.state_dict()), **settings)

    def loader(inputs: Tensor, targets: Tensor) -> DataLoader:
        # sequences of length one: its set-up takes an example out of a batch, and fails on a vector
        return DataLoader(TensorDataset(inputs[:, None], targets), min(len(targets), BATCH))

    train = loader(problem.train.inputs.to(problem.theta.dtype), problem.train.targets)
    # not compiled, which takes a C++ compiler and many seconds, and makes queries no faster
    eager = partial(torch.compiler.set_stance, "force_eager")
    with _quiet(), eager():
        attributor.cache(train)
    return Peer(problem, eager()(lambda *batch: attributor.attribute(train, loader(*batch)).T), folder)


def captum_arnoldi(
    problem: Problem, damping: float = 3e-3, *, rank: int = 200, krylov: int = 300, seed: int = 0
) -> Peer:
    """Influence by captum's `ArnoldiInfluenceFunction`: our `exact_influence` with the Hessian's top eigenvectors.

    rank, krylov: eigenvectors kept, and steps that find them (its defaults, 50 and 200, are faster and cost a third
    of the LDS on digits). Raises ValueError for parameters outside of linear layers and for an invalid damping.
    """
    # not among the names that captum.influence lists, but documented here
    method = _import("captum", "captum.influence._core.arnoldi_influence_function").ArnoldiInfluenceFunction
    return _captum(problem, method, damping, projection_dim=rank, arnoldi_dim=krylov, seed=seed)


def captum_last_layer(problem: Problem, damping: float = 0.0) -> Peer:
    """Influence of the last layer by captum's `NaiveInfluenceFunction`: our `exact_influence(last_layer=True)`.

    The Hessian is inverted by a general eigensolver, which all layers together would keep busy for very long.
    Raises ValueError for parameters outside of linear layers and for an invalid damping.
    """
    method = _import("captum", "captum.influence").NaiveInfluenceFunction
    layers = [problem.last_layer] if problem.last_layer else None
    return _captum(problem, method, damping, projection_dim=None, layers=layers)


def captum_tracin(problem: Problem) -> Peer:
    """Gradient products by captum's `TracInCP`, with the trained model for its one checkpoint.

    Its `TracInCPFast`, which would be for the last layer, runs the training set through the model at each query.
    Raises ValueError for parameters outside of linear layers.
    """
    return _captum(problem, _import("captum", "captum.influence").TracInCP, checkpoints=["trained"])


def _captum(problem: Problem, method: Callable, damping: float | None = None, **options: object) -> Peer:
    """Fitted: embeddings of the training examples, whose products with those of queries are the scores."""
    _check_linear("captum", problem)
    if damping is not None:
        _check_settings(problem, damping)
        # its Hessian is the sum over examples, without the weight decay
        options |= {"checkpoint": "trained", "hessian_reg": len(problem.train) * (damping + problem.weight_decay)}

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return problem.loss(outputs, targets).sum()

    loss.reduction = "sum"
    train = _loader(problem, problem.train)
    # the model has its parameters already: no file is read
    options |= {"loss_fn": loss, "sample_wise_grads_per_batch": True, "checkpoints_load_func": lambda *_: 1.0}
    with _quiet():
        fitted = method(_model(problem), train_dataset=train, **options)
        embeddings = fitted.compute_intermediate_quantities(train)
    return Peer(problem, lambda *batch: fitted.compute_intermediate_quantities(batch) @ embeddings.T)


PEERS: dict[str, Callable[[Problem], Peer]] = {
    "traker": traker,
    "traker/unprojected": partial(traker, dimension=None),
    "dattri": dattri_trak,
    "dattri/unprojected": partial(dattri_trak, dimension=None),
    "dattri/influence": dattri_influence,
    "captum": captum_arnoldi,
    "captum/last_layer": captum_last_layer,
    "captum/tracin": captum_tracin,
}


# Not projected, or hundreds of Hessian products: for small models alone.
SMALL_ONLY = ("traker/unprojected", "dattri/unprojected", "captum")


def installed(problem: Problem | None = None) -> list[str]:
    """The names in PEERS whose packages are installed; of a problem, those that are fitted on it in a minute or so."""
    small = problem is None or problem.n_parameters <= KERNEL_LIMIT
    found = {package: importlib.util.find_spec(package) is not None for package in ("trak", "dattri", "captum")}
    there = [name for name in PEERS if found[name.split("/")[0].replace("traker", "trak")]]
    return [name for name in there if small or name not in SMALL_ONLY]


def default_damping(name: str) -> float | None:
    """The damping that a method of PEERS has unless told otherwise; None where it has none to set."""
    parameter = inspect.signature(PEERS[name]).parameters.get("damping")
    return parameter and parameter.default


def _import(package: str, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'the package {package} is missing ({error}): pip install -e ".[peers]"') from error


def _model(problem: Problem) -> nn.Module:
    """A copy of the module at the trained parameters."""
    model = copy.deepcopy(problem.module).to(problem.theta.dtype).eval()
    model.load_state_dict(problem.unravel(problem.theta), strict=False)  # buffers stay
    return model.requires_grad_(True)


def _loader(problem: Problem, examples: Examples) -> DataLoader:
    return DataLoader(TensorDataset(examples.inputs.to(problem.theta.dtype), examples.targets), BATCH)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars (which nothing else switches off), no warnings; a singular kernel is a ValueError."""
    try:
        # captum seeds torch's global generator, data loaders draw from it
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"singular kernel, expected a larger damping: {error}") from error


def _check_settings(problem: Problem, damping: float, dimension: int | None = 1, *, trak_of: str = "") -> None:
    if not (math.isfinite(damping) and damping >= 0):
        raise ValueError(f"damping must be finite and >= 0, got {damping}")
    if dimension is not None and dimension < 1:
        raise ValueError(f"dimension must be >= 1 or None, got {dimension}")
    if dimension is None and (p := problem.n_parameters) > KERNEL_LIMIT:
        raise ValueError(f"without a projection at most {KERNEL_LIMIT} parameters, got {p}: give a dimension")
    if trak_of and not problem.train.is_classification:
        raise ValueError(f"TRAK of {trak_of} needs class labels (int64), got targets {problem.train.targets.dtype}")


def _check_linear(package: str, problem: Problem) -> None:
    for name, module in problem.module.named_modules():
        if not isinstance(module, nn.Linear) and any(True for _ in module.parameters(recurse=False)):
            raise ValueError(f"{package} needs all parameters in nn.Linear layers, got {type(module).__name__} {name}")
