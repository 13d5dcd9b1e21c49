"""Networks that others have trained: torchvision's architectures, and timm's where it is installed, under a new head.

As fastai's `vision_learner` makes them (https://docs.fast.ai/vision.learner.html), with two differences. fastai cuts an
architecture before its last pooling layer, which many do not have at their top level (densenet, mobilenet_v2, vit); here its
last layer alone is taken away, so that any architecture will do, and files of weights fit as they are. And none of it needs
fastai, so that predicting does not either.
"""

import errno
import hashlib
import socket
import stat
import sys
from contextlib import ExitStack, contextmanager, redirect_stderr
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from cifar_fastai.errors import DataError, UserError, first_line
from cifar_fastai.models import MODELS, TwoHalves, misfit
from cifar_fastai.recipes import Recipe, nearest

UNFIT = ("googlenet", "inception_v3")  # they have several outputs, and weights made for images normalised otherwise
TIMEOUT = 10  # seconds that a server may be silent
HUB_FILE = "model.safetensors"  # in each of timm's repositories
HIDDEN = 512  # units of the head's hidden layer


FROM_SCRATCH = "from scratch"


class TransferNet(TwoHalves):
    """`body`, an architecture without its last layer, and under it a new `head`.

    Images of any size are brought to `side` x `side` pixels first, on the device: what is kept and loaded stays small.
    Each architecture makes features of its maps in its own way, so `maps` are of a single place, (N, D, 1, 1): the features;
    `last_maps` lies further inside.
    """

    def __init__(self, body: nn.Module, n_classes: int, side: int):
        super().__init__()
        self.side = side
        n_features, self.maps_name = look_through(body, side)
        self.body, self.head = body, create_head(n_features, n_classes)

    @property
    def last_maps(self) -> nn.Module:
        """The layer that puts out the last feature maps, which tell where something is; a transformer's are its patches."""
        return self.body.get_submodule(self.maps_name)

    def maps(self, x):
        if x.shape[-1] != self.side:
            x = F.interpolate(x, size=(self.side, self.side), mode="bilinear")
        return self.body(x)[..., None, None]

    def classify(self, maps):
        return self.head(maps.flatten(1))


def create_head(n_features: int, n_classes: int) -> nn.Sequential:
    """fastai's `create_head(n_features, n_classes, pool=False)`, initialised as its `add_head` does."""
    head = nn.Sequential(
        nn.BatchNorm1d(n_features),
        nn.Dropout(0.25),
        nn.Linear(n_features, HIDDEN, bias=False),
        nn.ReLU(inplace=True),
        nn.BatchNorm1d(HIDDEN),
        nn.Dropout(0.5),
        nn.Linear(HIDDEN, n_classes, bias=False),
    )
    for layer in (head[2], head[6]):
        nn.init.kaiming_normal_(layer.weight)
    return head


def look_through(body: nn.Module, side: int) -> tuple[int, str]:
    """How many features a body makes of an image, and the name of its last layer whose maps have more than one place.

    Raises ValueError if images of this size are not for it.
    """
    maps = []

    def hook(name):
        def note(module, inputs, out):
            if isinstance(out, Tensor) and out.ndim == 4 and out.shape[2] == out.shape[3]:
                maps.append((name, out.shape))

        return note

    with ExitStack() as stack, torch.no_grad():
        for name, module in body.named_modules():
            if isinstance(module, nn.Dropout | nn.Softmax):
                continue  # what these put out in a transformer is attention, square too
            stack.enter_context(module.register_forward_hook(hook(name)))
        try:
            features = body.eval()(torch.zeros(1, 3, side, side, device=next(body.parameters()).device))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(first_line(error)) from None
    body.train()
    if features.ndim != 2 or not maps:
        raise ValueError("it is no classifier of images")
    wide = [name for name, shape in maps if shape[-1] > 1]
    return features.shape[1], (wide or [maps[-1][0]])[-1]


# --- names -------------------------------------------------------------------------------------------------------


def architectures() -> list[str]:
    """The names that can be had: torchvision's, then timm's."""
    names = _torchvision_names()
    return names + [name for name in _timm().list_models() if name not in names] if _timm() else names


def is_architecture(name: str) -> bool:
    """Whether torchvision or, with or without the tag of certain weights, timm has an architecture of this name."""
    return name in _torchvision_names() or bool(_timm() and _timm().is_model(name))


def check_model(recipe: Recipe) -> None:
    """Raises UserError if there is no model of the recipe's name, naming the nearest, or if the recipe is not for it."""
    name = recipe.model
    if name in MODELS and recipe.weights:
        raise UserError(f"--weights is for pretrained models such as resnet18; {name!r} is trained from scratch.")
    if name not in MODELS and not is_architecture(name):
        raise UserError(
            f"There is no model {name!r}.{nearest(name, [*MODELS, *architectures()])} "
            f"There are: {', '.join(MODELS)}, and the classifiers of torchvision.models and timm{timm_hint()}."
        )
    if recipe.start_size and (name == "small" or name not in MODELS):
        suited = "classic-sgd" if name in MODELS else "transfer"
        raise UserError(
            f"The model {name!r} takes images of one size, and the recipe {recipe.name!r} begins with smaller ones "
            f"(start_size). Choose --recipe {suited}, or the model base, slim, deep or large."
        )
    if recipe.optimizer == "muon" and name not in MODELS:
        raise UserError(
            f"The optimizer muon is for {', '.join(MODELS)}, which normalise what their convolutions give, not for {name!r}."
        )


def try_model(recipe: Recipe) -> None:
    """Raises at once what `check_model` and `create_pretrained` would raise later, when the data is there.

    Published weights are downloaded on the way; torchvision and timm keep them.
    """
    check_model(recipe)
    if recipe.model not in MODELS:
        create_pretrained(recipe, n_classes=2, size=recipe.size)


def timm_hint() -> str:
    """What to say where timm might know a name, but is not there."""
    return "" if _timm() else " (timm is not installed: `pip install timm`)"


def _torchvision_names() -> list[str]:
    return [name for name in _torchvision().list_models(module=_torchvision()) if name not in UNFIT]


def _torchvision():
    """torchvision's models. It takes seconds to import, and only these networks need it."""
    import cifar_fastai.compat  # noqa: F401, I001  before torchvision
    from torchvision import models

    return models


def _timm():
    """The package timm, or None where it is not installed."""
    try:
        import timm
    except ModuleNotFoundError:
        return None
    return timm


# --- networks ----------------------------------------------------------------------------------------------------


def create_pretrained(recipe: Recipe, n_classes: int, size: int) -> TransferNet:
    """The recipe's architecture with pretrained weights, or at random if it says so, for images of `size` pixels.

    Raises DataError if the weights are not to be had, UserError if they or the size of the images do not fit.
    """
    if not recipe.pretrained:
        network = _architecture(recipe.model)
    elif recipe.weights:
        network = _from_file(recipe.model, Path(recipe.weights))
    else:
        network = _published(recipe.model)
    return _under_new_head(recipe.model, network, n_classes, network_side(recipe, size))


def create_architecture(name: str, n_classes: int, side: int, hollow: bool = False) -> TransferNet:
    """The architecture called `name` with random weights under a new head, as `create_pretrained` makes it.

    hollow: on the meta device, which takes hardly any memory or time. Raises UserError if it cannot see images of `side` x
    `side` pixels.
    """
    if not hollow:
        return _under_new_head(name, _architecture(name), n_classes, side)
    try:
        with _Hollow():
            network = _architecture(name).to("meta")
        with torch.device("meta"):
            return _under_new_head(name, network, n_classes, side)
    except (NotImplementedError, RuntimeError):  # some of timm's want all on one device
        with torch.device("meta"):
            return _under_new_head(name, _architecture(name), n_classes, side)


class _Hollow(TorchFunctionMode):
    """Makes weights on the meta device. (`torch.device("meta")` alone moves the numbers too by which some architectures, the
    RegNets among them, compute how wide they are.)"""

    MAKERS = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.MAKERS and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def network_side(recipe: Recipe, size: int) -> int:
    """The side to which an architecture's images are brought: smaller ones are enlarged, larger ones left alone."""
    return max(recipe.input_size, size)


def channel_stats(recipe: Recipe):
    """Mean and standard deviation for which the recipe's weights were made; None if they start at random.

    Raises UserError for an unknown model.
    """
    check_model(recipe)
    name = recipe.model
    if name in MODELS or not recipe.pretrained:
        return None
    if name in _torchvision_names():
        published = _torchvision().get_model_weights(name).DEFAULT.transforms()
    else:
        published = _timm().get_pretrained_cfg(name)
    return published.mean, published.std


def weights_origin(recipe: Recipe) -> str:
    """Where the recipe's network starts, in words. Raises DataError if its file of weights cannot be read."""
    name = recipe.model
    if name in MODELS or not recipe.pretrained:
        return FROM_SCRATCH
    if recipe.weights:
        path = Path(recipe.weights)
        try:
            _check_regular(path)
            return f"from {path.name} (sha256 {hashlib.sha256(path.read_bytes()).hexdigest()})"
        except OSError as error:
            raise _unreadable(path, error) from None
    return f"from {_published_at(name)}"


def _architecture(name: str, pretrained: bool = False) -> nn.Module:
    if name in _torchvision_names():
        weights = "DEFAULT" if pretrained else None
        return _torchvision().get_model(name, weights=weights, progress=sys.stdout.isatty())
    return _timm().create_model(name, pretrained=pretrained)


def _under_new_head(name: str, network: nn.Module, n_classes: int, side: int) -> TransferNet:
    if name in _torchvision_names():
        network.set_submodule(*_last_layers(name, network), nn.Identity())
    else:
        network.reset_classifier(0)
    try:
        model = TransferNet(network, n_classes, side)
    except ValueError as error:
        raise UserError(
            f"The model {name!r} cannot see images of {side} x {side} pixels ({error}): "
            "try another --input-size; most were trained at 224."
        ) from None
    return model.to(memory_format=torch.channels_last)


def _last_layers(name: str, network: nn.Module) -> tuple[str, ...]:
    """The name of the layer that tells classes apart; some of timm's networks have two."""
    if name in _torchvision_names():
        return ([path for path, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1],)
    names = network.pretrained_cfg["classifier"]
    return (names,) if isinstance(names, str) else tuple(names)


# --- weights -----------------------------------------------------------------------------------------------------


def _from_file(name: str, path: Path) -> nn.Module:
    """An architecture with the weights of a file, of which those of the last layer, which will go, are left out.

    path: a .safetensors, or what `torch.save` made of a state dict; no code from it runs.
    """
    network, found = _architecture(name), _read_weights(path)
    wanted, last = network.state_dict(), tuple(f"{layer}." for layer in _last_layers(name, network))
    found = {key: value for key, value in found.items() if not key.startswith(last)}
    own = {key: value for key, value in wanted.items() if key.startswith(last)}
    if difference := misfit(found | own, wanted, may_lack="num_batches_tracked"):
        raise UserError(f"The weights {path} are not {name}'s: {difference}.")
    network.load_state_dict(found | own)
    return network


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        _check_regular(path)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise _unreadable(path, error) from None
    except Exception as error:  # nearly anything, on a file that is none; torch's words advise to let its code run
        raise DataError(f"{path} is no file of weights, or a damaged one ({type(error).__name__}).") from None
    if not (isinstance(found, dict) and all(isinstance(key, str) and isinstance(found[key], Tensor) for key in found)):
        raise DataError(
            f"{path} holds no state dict: a tensor for each name, as `torch.save(model.state_dict(), …)` writes."
        )
    return found


def _check_regular(path: Path) -> None:
    """Raises OSError for a pipe or a device, which may never end, and if there is nothing."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"The weights {path} cannot be read ({error.strerror or error}).")


def _published(name: str) -> nn.Module:
    """An architecture with the weights that torchvision or timm publish, from their download cache if they are in it."""
    if name not in _torchvision_names() and not _timm().get_pretrained_cfg(name).hf_hub_id:
        raise DataError(f"timm publishes no weights of {name!r}: train --from-scratch, or give your own as --weights FILE.")
    try:
        with _socket_timeout(), redirect_stderr(sys.stdout):  # where progress goes; standard error is for errors
            if name not in _torchvision_names():
                _ask_hub_once(name)
            return _architecture(name, pretrained=True)
    except Exception as error:  # nearly anything, from what a proxy answers to a damaged file kept from the last time
        reason = first_line(getattr(error, "reason", error))
        raise DataError(
            f"The pretrained weights of {name!r} cannot be had ({reason}).\n"
            f"Fetch {_published_at(name)} elsewhere and give the file as --weights FILE, or train --from-scratch."
        ) from None


def _published_at(name: str) -> str:
    if name in _torchvision_names():
        return _torchvision().get_model_weights(name).DEFAULT.url
    return f"{HUB_FILE} of https://huggingface.co/{_timm().get_pretrained_cfg(name).hf_hub_id}"


def _ask_hub_once(name: str) -> None:
    """Raises at once if timm's hub cannot be reached; timm itself would try for a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    repository = _timm().get_pretrained_cfg(name).hf_hub_id
    if not isinstance(try_to_load_from_cache(repository, HUB_FILE), str):
        get_hf_file_metadata(hf_hub_url(repository, HUB_FILE), timeout=TIMEOUT)


@contextmanager
def _socket_timeout():
    """Lets no connection be silent for long; torch.hub itself would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
