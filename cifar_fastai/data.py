"""The DataBlock: what an item is, how the training split is divided, what happens to a batch.

An item is a row number of the data's image array, so a whole batch is one slice of that array. Anything else a user
hands to `learn.predict` or `dls.test_dl` (a path, bytes, a PIL image, an array, a tensor) takes fastai's usual way.
"""

import cifar_fastai.compat  # noqa: F401  so that torchvision, with fastai.vision.all, can be imported after this

# isort: split
import math
import random
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.data.transforms import IndexSplitter, IntToFloatTensor, Normalize, ToTensor, TrainTestSplitter
from fastai.torch_core import TensorCategory
from fastai.vision.core import PILImage, TensorImage
from fastai.vision.data import ImageBlock
from fastcore.basics import chunked
from fasttransform import Pipeline, Transform
from PIL import Image
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import get_worker_info

from cifar_fastai.augment import Augment, batch_transforms
from cifar_fastai.cache import load_data
from cifar_fastai.errors import DataError, UserError
from cifar_fastai.images import decode_image, fit_image
from cifar_fastai.pretrained import channel_stats
from cifar_fastai.recipes import MIN_VALID_PCT, Recipe
from cifar_fastai.sources import ImageData, one_of_each_class

EVAL_BATCH = 500


class Photo(PILImage):
    """A PIL image from anything `decode_image` takes."""

    @classmethod
    def create(cls, source: str | Path | bytes | Image.Image | np.ndarray | Tensor):
        return cls(decode_image(source))


class FitImage(Transform):
    """A photo as a square of the network's size: what `Classifier` does too."""

    order = 1  # before ToTensor

    def __init__(self, size: int):
        self.size = size

    def encodes(self, image: PILImage):
        return Photo(fit_image(image, self.size))


class _Row(Transform):
    """From a row number to what stands in that row."""

    input_types = (int, np.integer)

    def __init__(self, data: ImageData):
        self.data = data

    def without_data(self):
        """For an export, which knows no rows."""
        return type(self)(None)


class ImageOfRow(_Row):
    def __init__(self, data: ImageData):
        super().__init__(data)
        self._tensors: dict[torch.device, tuple[Tensor, ...]] = {}

    def __getstate__(self):
        return {"data": self.data, "_tensors": {}}  # which are made of the data

    def encodes(self, row):
        return Photo(decode_image(self.data.images[row]))

    def tensors(self, device: torch.device) -> tuple[Tensor, ...]:
        """Images (rows, size, size, 3) uint8 and labels (rows,) int64 from which batches for `device` are cut.

        They are on it, once, however many loaders; or in the file that is mapped into memory if it has no room for all.
        """
        if device not in self._tensors:
            arrays = (self.data.images, self.data.labels)
            place = device if has_room(device, self.data.images.nbytes) else "cpu"
            self._tensors[device] = tuple(torch.from_numpy(array).to(place) for array in arrays)
        return self._tensors[device]


def has_room(device: torch.device, n_bytes: int) -> bool:
    """Whether this much on a device leaves as much for the training."""
    return device.type != "cuda" or n_bytes <= torch.cuda.mem_get_info(device)[0] / 2


class LabelOfRow(_Row):
    def encodes(self, row):
        return self.data.classes[self.data.labels[row]]


class RowLabels(TensorCategory):
    """The labels of a batch of rows.

    A type of their own, so that the batch transforms can be told to leave them alone: where fasttransform finds no method
    for a type it raises and catches an error, whose traceback keeps the batch in memory until the garbage collector comes.
    """


def _leave_labels_alone(transform):
    @transform
    def encodes(self, x: RowLabels):
        return x


for _transform in (Augment, IntToFloatTensor, Normalize):
    _leave_labels_alone(_transform)


class BatchDL(TfmdDL):
    """Slices whole batches out of one uint8 tensor where its items are rows, and is a plain TfmdDL where not.

    The item transforms FitImage and ToTensor change nothing in a row, which is an image of the right size already,
    so they are left out; with any other item transform the loader takes the usual way.
    """

    skip = 0  # batches left out at the beginning of a pass, for an epoch that was begun before
    share = slice(None)  # of each batch, what this process computes; where several train together, the rest is others'
    BY_ITEM = ("do_item", "create_item", "do_batch", "create_batch", "retain")  # fastai's way from items to a batch

    def __init__(self, dataset=None, bs=64, num_workers=0, **kwargs):
        super().__init__(dataset, bs=bs, num_workers=num_workers, **kwargs)

    @property
    def items(self) -> list:
        """As a list, since fastai's Interpretation cannot pick from an array."""
        return list(self.dataset.items)

    def _pre_show_batch(self, b, max_n=9):
        """All that shows images comes by here, and brings fastai's displays for them: with torchvision and timm they take
        seconds to import."""
        import fastai.vision.learner  # noqa: F401

        return super()._pre_show_batch(b, max_n)

    def new(self, dataset=None, cls=None, **kwargs):
        """As TfmdDL's. A loader without items, of which an export is made, lets go of the data too."""
        if isinstance(dataset, Datasets) and len(dataset) == 0:
            for items in dataset.tls:
                without = [tfm.without_data() if isinstance(tfm, _Row) else tfm for tfm in items.tfms.fs]
                items.tfms = Pipeline(without, split_idx=items.tfms.split_idx)
        return super().new(dataset, cls, **kwargs)

    def create_batches(self, samps):
        yield from islice(self._all_batches(samps), self.skip, None)

    def _all_batches(self, samps):
        if not self._items_are_rows():
            yield from super().create_batches(samps)
            return
        getters = [pipeline.tfms.fs[0] for pipeline in self.dataset.tls]
        images, labels = getters[0].tensors(self.device)
        rows = np.asarray(self.dataset.items)
        for numbers in chunked(samps, self.bs, self.drop_last):  # never more of them than are asked for: they may be endless
            whole = torch.from_numpy(rows[numbers])
            batch = whole[self.share].to(images.device, non_blocking=True)
            if len(batch) == 0:  # fewer images than processes
                continue
            x = TensorImage(images[batch].to(self.device).permute(0, 3, 1, 2))
            x.rows = batch.to(self.device)  # for Augment
            yield (x, RowLabels(labels[batch].to(self.device))) if len(getters) > 1 else (x,)

    def _items_are_rows(self) -> bool:
        """Whether each item is a row's image as it is: neither item transforms nor methods of the user's change it, and no
        worker process reads it, which has no access to a GPU."""
        if self.prebatched or get_worker_info() is not None or not isinstance(self.dataset, Datasets):
            return False
        untouched = all(isinstance(tfm, (FitImage, ToTensor)) for tfm in self.after_item.fs) and not self.before_batch.fs
        usual = all(getattr(getattr(self, name), "__func__", None) is getattr(TfmdDL, name) for name in self.BY_ITEM)
        return untouched and usual and isinstance(self.dataset.tls[0].tfms.fs[0], ImageOfRow)


def data_block(data: ImageData, splitter, batch_tfms) -> DataBlock:
    """The DataBlock of every training and of every loaded learner; its source is a list of row numbers of `data`."""
    return DataBlock(
        blocks=(ImageBlock(Photo), CategoryBlock(vocab=list(data.classes), sort=False)),
        get_x=ImageOfRow(data),
        get_y=LabelOfRow(data),
        splitter=splitter,
        item_tfms=FitImage(data.size),
        batch_tfms=batch_tfms,
        dl_type=BatchDL,
    )


def dataloaders(source, recipe: Recipe, seed: int = 42, *, subset: int | None = None, device=None) -> DataLoaders:
    """fastai DataLoaders: `dls.train` and `dls.valid` divide the training split, `dls.test` is the untouched rest,
    None where there is none.

    Where the source has a validation split of its own, `dls.valid` is that one, and the recipe's `valid_pct` has no say.
    source: as for `load_data`, or an ImageData, which is then found as `dls.data`. subset: take only this many
    training images, drawn class by class. The seed fixes subset, division, order and augmentation. Raises DataError
    and UserError.
    """
    data = load_data(source, recipe.size)
    rows, splitter, n_valid = _divided(data, _training_rows(data, subset, seed), recipe.valid_pct, seed)
    mean, std = channel_stats(recipe) or data.channel_stats
    batch_tfms = batch_transforms(recipe, mean, std, seed)
    bs = min(recipe.bs, len(rows) - n_valid)
    val_bs = min(EVAL_BATCH, bs)  # no more than in a step: what has the memory for one can be judged too
    dls = data_block(data, splitter, batch_tfms).dataloaders(rows, bs=bs, val_bs=val_bs, device=device)
    dls.train.rng = random.Random(seed)
    dls.test = dls.test_dl(np.arange(data.n_train, len(data.images)), with_labels=True) if data.n_test else None
    dls.data = data
    return dls


def inference_dataloaders(classes: tuple[str, ...], size: int, mean, std) -> DataLoaders:
    """DataLoaders that hold no images but know how to prepare one: for a learner that is loaded, not trained."""
    blank = ImageData("", np.zeros((2, size, size, 3), np.uint8), np.zeros(2, np.int64), classes, 2, "")
    normalize = Normalize.from_stats(mean, std, cuda=False)
    return data_block(blank, IndexSplitter([1]), [normalize]).dataloaders([0, 1], bs=1, device="cpu").new_empty()


def _divided(data: ImageData, rows: np.ndarray, valid_pct: float, seed: int):
    """The rows of training and validation split, fastai's splitter between them, and how many are for validation.

    rows: of the training split. Raises DataError if a class has too few images.
    """
    labels = data.labels[rows]
    _check_counts(data, labels)
    if data.n_valid:
        own = np.arange(data.n_train - data.n_valid, data.n_train)
        return np.concatenate([rows, own]), IndexSplitter(np.arange(len(own)) + len(rows)), len(own)
    n_valid = math.ceil(len(rows) * valid_pct)
    if n_valid < len(data.classes):
        return rows, IndexSplitter(one_of_each_class(labels, seed)), len(data.classes)
    return rows, TrainTestSplitter(n_valid, random_state=seed, stratify=labels), n_valid


def _check_counts(data: ImageData, labels: np.ndarray) -> None:
    """Raises DataError if these labels, of the training images, are too few of a class."""
    counts = np.bincount(labels, minlength=len(data.classes))
    scarce, least = counts.argmin(), 1 if data.n_valid else 2
    if counts[scarce] >= least:
        return
    found, n_all = counts[scarce], np.count_nonzero(data.labels[: data.n_train - data.n_valid] == scarce)
    where = f" of {n_all} without --subset: raise it" if n_all > found else ": add some, or remove the class"
    why = "one to train on" + (" and one to validate on" if least == 2 else "")
    name = data.classes[scarce]
    raise DataError(
        f"{data.source}: too few training images of the class {name!r}, {found}{where}. It takes {least}, {why}."
    )


def _training_rows(data: ImageData, subset: int | None, seed: int) -> np.ndarray:
    # An array, since fastai divides a list item by item, which takes longer than the first batch.
    n = data.n_train - data.n_valid
    if subset is None or subset == n:
        return np.arange(n)
    labels, n_classes = data.labels[:n], len(data.classes)
    # As many as let every class find a place in a validation split of any share; of few images half.
    least = max(min(math.ceil(n_classes / MIN_VALID_PCT), n // 2), 2 * n_classes)
    most = n - n_classes  # scikit-learn wants one of each class to be left out, too
    if least > most:
        raise UserError(f"subset must be all {n} images, of which there are too few to choose from, not {subset}.")
    if not least <= subset <= most:
        raise UserError(f"subset must lie between {least} and {most}, or be all {n} images, not {subset}.")
    if np.bincount(labels, minlength=n_classes).min() < 2:  # scikit-learn cannot draw from such a class
        raise DataError(
            f"{data.source}: a class has too few training images, a single one, for a subset. Leave --subset out."
        )
    rows, _ = train_test_split(np.arange(n), train_size=subset, stratify=labels, random_state=seed)
    return np.sort(rows)
