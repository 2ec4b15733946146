"""The settings of a run."""

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any, Literal

from sparse_moon.allocation import Allocation, check_sparsity
from sparse_moon.app.names import ModelName, Score, ScoreWithOptions
from sparse_moon.options import MethodOptions, ReliabilityMethod, ReliabilityOptions, TrainingMethod
from sparse_moon.settings import (
    AT_LEAST_0,
    AT_LEAST_1,
    POSITIVE,
    SHARE,
    SHARE_BELOW_ONE,
    ImportPath,
    LibraryModel,
    check_settings,
    is_import_path,
    options_of,
)

if TYPE_CHECKING:
    from sparse_moon.algorithms import Method
    from sparse_moon.reliability import Reliability


@dataclass(frozen=True)
class TrainConfig(MethodOptions, ReliabilityOptions):
    """Settings of a run, with the options of all methods. Defaults are MOON's (arXiv 2403.20047, Section 5 and
    Appendix G), or smaller where the digits ask for it.

    Args:
        dataset: digits, mnist, cifar10, cifar100, imagenet, a keras-style .npz, or a folder with train/ and test/.
        data_root: folder that holds the named data sets.
        download: fetch a missing named data set into data_root.
        image_size: side of the square that images become: their middle, resized.
        resize: length of the shorter side before the middle is cut out; by default what cuts least. ImageNet's is 256.
        crops: of colour images in training, mirrored as well; padded by 4 pixels, or resized parts as for ImageNet.
        workers: processes that decode image files, for each process that trains; 0 are threads.
        ood: out-of-distribution sets, NAME or NAME=PATH; by default those that go with the data set.
        headline: the one score that tables lead with, such as energy or knn:k=200; fixed before test sets are seen.
        score: OOD scores to compute besides it, as in eval; by default all that fit, of which knn takes the longest.
        ece_bins: bins of the calibration errors; some papers and codes have 10.
        diagnostics: measure after each epoch what the papers' theory speaks of; takes more passes, see docs/theory.md.
        model: which network; one of a library as timm:NAME or torchvision:NAME, your own as package.module.function.
        width: channels of the first stage or of the hidden layers (mlp); growth rate (densenet101); for your own, too.
        weights: file of a trained dense network's state dict (torch.save) to start from.
        method: how the topology changes, see docs/topology-methods.md; your own as package.module.Class.
        reliability: training for reliability, see docs/reliability.md; your own as package.module.Class.
        without: parts to leave out: moon's loss, tuning (w is final_weight), voting; cigl's mask, averaging, freezing.
        sparsity: share of weights to leave out, in [0, 1).
        pattern: unstructured, vectorV (V outputs of one input) or blockB.
        allocation: erk, er or uniform.
        selection: weights at the start: random, the largest (magnitude) or constant_fan_in; by default the method's.
        exclude: layers to keep dense, by name with * and ?.
        fuse: batch norm, activation and residual addition are one operation, on a GPU in channels_last.
        recompute: compute what a sparse convolution reads again in the backward pass (less memory).
        epochs: passes over the training data; with weights 0, too.
        batch_size: images a batch, over all processes.
        lr: learning rate at the start; it falls along half a cosine to lr_end at lr_until and then stays.
        lr_end: final learning rate; by default lr / 15.
        lr_until: share of the training after which the learning rate is constant.
        lr_milestones: shares of the training at which the learning rate takes a step, in place of the cosine.
        lr_gamma: what each step multiplies the learning rate by.
        lr_warmup: share of the training in which the learning rate rises to lr in a straight line, before steps.
        momentum: Nesterov momentum of SGD.
        weight_decay: L2 penalty on all parameters but a cosine head's; with top-kast its own penalty on sparse weights.
        interval: batches from topology update to topology update.
        drop_fraction: share of a layer's weights that the first update exchanges; falls to 0, mostly half a cosine.
        stop: share of the training after which the topology is frozen; sup-tickets goes on to the end.
        amp: none, bfloat16 or float16 automatic mixed precision; auto is bfloat16 on a GPU that computes it, else none.
        memory_format: layout of images and network, contiguous or channels_last; auto is channels_last on a GPU only.
        seed: of initial weights, topology, data order and augmentation.
        device: cpu, cuda, cuda:1 ...
        capture: on a GPU a training step is one CUDA graph, see docs/gpu.md; a line says where it cannot be.
        holdout: share of the training images kept out of training, for the temperature and for DICE's p.
        own: options of a method of your own by name, where they are not its defaults.
    """

    dataset: str = "digits"
    data_root: str | None = None
    download: bool = False
    image_size: Annotated[int, AT_LEAST_1] | None = None
    resize: Annotated[int, AT_LEAST_1] | None = None
    crops: Literal["padded", "resized"] = "padded"
    workers: Annotated[int, AT_LEAST_0] = 0
    ood: list[str] | None = None
    headline: Score | ScoreWithOptions = "msp"
    score: list[str] | None = None
    ece_bins: Annotated[int, AT_LEAST_1] = 15
    diagnostics: bool = False
    model: ModelName | LibraryModel | ImportPath = "small-resnet"
    width: Annotated[int, AT_LEAST_1] | None = None
    weights: str | None = None
    method: TrainingMethod | ImportPath = "rigl"
    reliability: ReliabilityMethod | ImportPath = "moon"
    without: tuple[str, ...] = ()
    sparsity: float = 0.9
    pattern: str = "unstructured"
    allocation: Allocation = "erk"
    selection: Literal["random", "magnitude", "constant_fan_in"] | None = None
    exclude: tuple[str, ...] = ()
    fuse: bool = True
    recompute: bool = False
    epochs: Annotated[int, AT_LEAST_0] = 40
    batch_size: Annotated[int, AT_LEAST_1] = 64
    lr: float = 0.12
    lr_end: Annotated[float, AT_LEAST_0] | None = None
    lr_until: Annotated[float, SHARE] = 0.8
    lr_milestones: tuple[float, ...] = ()
    lr_gamma: Annotated[float, POSITIVE] = 0.1
    lr_warmup: Annotated[float, SHARE] = 0.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    interval: Annotated[int, AT_LEAST_1] = 50
    drop_fraction: Annotated[float, SHARE] = 0.3
    stop: Annotated[float, SHARE] = 0.7
    amp: Literal["auto", "none", "bfloat16", "float16"] = "auto"
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    seed: Annotated[int, AT_LEAST_0] = 0
    device: str = "cpu"
    capture: bool | None = None
    holdout: Annotated[float, SHARE_BELOW_ONE] = 0.0
    own: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for anything that can be known to be wrong before the data is read."""
        from sparse_moon.ood import check_score, score_name
        from sparse_moon.topology import block_shape

        check_settings(self)
        for name in ("model", "method", "reliability", "headline"):
            object.__setattr__(self, name, str(getattr(self, name)))  # the command line's paths are of a subclass
        check_score(self.headline)
        for score in self.score or ():
            if is_import_path(score.partition(":")[0]):
                raise ValueError(f"score must be one of the package's, got {score}: eval takes those of your own")
            check_score(score)
        object.__setattr__(self, "headline", score_name(self.headline))
        if self.score is not None:
            object.__setattr__(self, "score", [score_name(score) for score in self.score])
        check_sparsity(self.sparsity)
        block_shape(self.pattern)
        if not (self.lr > 0 and 0 <= self.momentum < 1 and self.weight_decay >= 0):
            raise ValueError(
                f"need lr > 0, momentum in [0, 1) and weight_decay >= 0, "
                f"got {self.lr}, {self.momentum}, {self.weight_decay}"
            )
        if not self.epochs and self.weights is None:
            raise ValueError("epochs must be at least 1 unless weights says what to start from, got 0")
        self._check_steps()
        if self.recompute and not self.fuse:
            raise ValueError("recompute needs fuse: it is the fused batch norm that computes its result again")
        if unknown := sorted(set(self.own) - set(own_options([self.method], [self.reliability]))):
            raise ValueError(f"unknown settings {unknown}")
        self.make_reliability()
        self.method_class.check_options(self.method_options, self.sparsity)
        _check_device(self.device)

    def _check_steps(self) -> None:
        """Raise ``ValueError`` for steps of the learning rate that are not in order, or that something contradicts."""
        shares = self.lr_milestones
        if not all(0 <= a < b < 1 for a, b in zip((0.0, *shares), shares, strict=False)):
            raise ValueError(f"lr_milestones must ascend in (0, 1), got {list(shares)}")
        if shares and self.lr_warmup > shares[0]:
            raise ValueError(f"lr_warmup must be at most {shares[0]}, the first milestone, got {self.lr_warmup}")
        if shares and self.lr_end is not None:
            raise ValueError(f"lr_end is for the cosine: with lr_milestones lr_gamma says it, got {self.lr_end}")
        if shares and self.lr_until != TrainConfig.lr_until:
            raise ValueError(f"lr_until is for the cosine: lr_milestones say when steps end, got {self.lr_until}")
        if self.lr_warmup and not shares:
            raise ValueError(f"lr_warmup is for lr_milestones, the cosine has none, got {self.lr_warmup}")
        if self.lr_gamma != TrainConfig.lr_gamma and not shares:
            raise ValueError(f"lr_gamma is for lr_milestones, the cosine has no steps, got {self.lr_gamma}")

    @property
    def method_class(self) -> "type[Method]":
        """The training method's class."""
        return _algorithm(self.method)

    @property
    def method_options(self) -> Any:
        """The training method's options."""
        return options_of(self.method_class.Options, self, self.own)

    def make_reliability(self) -> "Reliability":
        """The reliability method, not attached to a model yet."""
        from sparse_moon.reliability import ReliabilityRun

        kind = _reliability(self.reliability)
        run = ReliabilityRun(self.dataset, self.epochs, self.stop, self.seed, self.method_class, self.method_options)
        return kind(run, options_of(kind.Options, self, self.own), self.without)

    @property
    def label(self) -> str:
        """The reliability method with what it lacks: ``moon:-tuning``, the syntax of ``sparse-moon compare``."""
        return self.reliability + "".join(f"{':' * (i == 0)}-{part}" for i, part in enumerate(self.without))

    def to_dict(self) -> dict[str, Any]:
        """As ``config.json`` has it."""
        content = asdict(self)
        if not self.own:
            del content["own"]
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "TrainConfig":
        """From ``config.json``; settings that it lacks have their defaults.

        Raises:
            ValueError: unknown settings or bad values.
        """
        unknown = set(content) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"unknown settings {sorted(unknown)}")
        tuples = {name: content.get(name) or () for name in ("exclude", "without", "lr_milestones")}
        return cls(**{**content, **{k: tuple(v) if isinstance(v, list) else v for k, v in tuples.items()}})

    @classmethod
    def of_run(cls, content: Mapping[str, Any]) -> "TrainConfig":
        """From the ``config.json`` of a run that is there, whose device need not be: it may be of another machine.

        Raises:
            ValueError: as :meth:`from_dict`.
        """
        config = cls.from_dict({**content, "device": cls.device})
        object.__setattr__(config, "device", content.get("device", cls.device))
        return config


def config_of(settings: Mapping[str, Any]) -> TrainConfig:
    """The settings of a run by name, the options of methods of the user's own among them.

    Raises:
        ValueError: unknown settings, bad values, or methods that are not imported.
    """
    method, reliability = (settings.get(name, getattr(TrainConfig, name)) for name in ("method", "reliability"))
    own = own_options([method], [reliability])
    known = [field.name for field in fields(TrainConfig) if field.name != "own"]
    for name in settings:
        if name not in known and name not in own:
            close = get_close_matches(name, [*known, *own], n=1)
            raise ValueError(f"unknown setting {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    defaults = {field.name: field.default for kind in own.values() for field in fields(kind)}
    others = {name: value for name, value in settings.items() if name in own and value != defaults[name]}
    return TrainConfig.from_dict({**{name: settings[name] for name in known if name in settings}, "own": others})


def own_options(methods: Iterable[str], reliability: Iterable[str]) -> dict[str, type]:
    """By name of an option that is not a field of `TrainConfig`, the dataclass that has it.

    Args:
        methods, reliability: names of training methods and of reliability methods; those that are import paths count.

    Raises:
        ValueError: one is not imported, two have an option of the same name that is not the same, or an option has
            the name of a setting and another default, which would not count.
    """
    kinds = [_algorithm(name).Options for name in methods if is_import_path(name)]
    kinds += [_reliability(name).Options for name in reliability if is_import_path(name)]
    found: dict[str, type] = {}
    known = {field.name: field.default for field in fields(TrainConfig)}
    for kind in kinds:
        frozen = is_dataclass(kind) and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
        if not frozen or any(option.default is MISSING for option in fields(kind)):
            raise ValueError(f"{kind.__qualname__} must be a frozen dataclass whose fields have defaults")
        for option in fields(kind):
            if option.name in known:
                if option.default != known[option.name]:
                    raise ValueError(
                        f"{kind.__qualname__} has the default {option.default!r} for {option.name}, which is train's "
                        f"setting of that name and {known[option.name]!r} there: give it that default, or another name"
                    )
                continue
            other = found.setdefault(option.name, kind)
            if (option.type, option.default) not in [(o.type, o.default) for o in fields(other)]:
                raise ValueError(f"{kind.__qualname__} and {other.__qualname__} have different options {option.name}")
    return found


# Their modules need torch, which is not imported before they are asked for: parsing the command line takes no time.
def _algorithm(name: str) -> "type[Method]":
    from sparse_moon.algorithms import ALGORITHMS

    return ALGORITHMS.find(name)


def _reliability(name: str) -> "type[Reliability]":
    from sparse_moon.reliability import RELIABILITY

    return RELIABILITY.find(name)


def _check_device(device: str) -> None:
    """Raise ``ValueError`` for a device that is not there, or does not compute."""
    import torch

    try:
        (torch.zeros(1, device=device) + 1).item()
    except Exception as error:  # each kind of device has its own
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"device {device!r} cannot be used: {reason}") from None


def parse_label(label: str) -> tuple[str, tuple[str, ...]]:
    """Reliability method and the parts to leave out, from :attr:`TrainConfig.label`."""
    name, _, parts = label.partition(":-")
    return name, tuple(part for part in parts.split("-") if part)
