import numpy as np
import pytest
import torch
from fastai.data.transforms import ToTensor
from fasttransform import Transform
from helpers.files import COLOURS
from torch import Tensor

from cifar_fastai import data as data_module
from cifar_fastai import dataloaders, get_recipe
from cifar_fastai.cache import load_data
from cifar_fastai.errors import DataError, UserError
from cifar_fastai.sources import ImageData

RECIPE = get_recipe("classic-adam", bs=64)


@pytest.fixture(scope="module")
def data():
    return load_data("digits")


@pytest.fixture
def dls(data):
    return dataloaders(data, RECIPE, seed=7)


def rows_of(dl):
    return list(dl.dataset.items)


def batches(dl):
    return [tuple(part.as_subclass(Tensor).clone() for part in batch) for batch in dl]


# --- the split ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("valid_pct", [0.1, 0.15, 0.2])
def test_split_is_disjoint_complete_and_stratified(data, valid_pct):
    dls = dataloaders(data, get_recipe("fast", valid_pct=valid_pct))
    train, valid, test = rows_of(dls.train), rows_of(dls.valid), rows_of(dls.test)
    assert sorted(train + valid) == list(range(data.n_train))
    assert test == list(range(data.n_train, len(data.images)))
    assert len(valid) == int(np.ceil(valid_pct * data.n_train))
    expected = np.bincount(data.labels[: data.n_train]) * valid_pct
    assert np.abs(np.bincount(data.labels[valid]) - expected).max() <= 1


def test_split_depends_on_the_seed_alone(data):
    first, again, other = (dataloaders(data, RECIPE, seed=seed) for seed in (1, 1, 2))
    assert rows_of(first.valid) == rows_of(again.valid) != rows_of(other.valid)


def test_subset_is_stratified_and_leaves_the_test_split_whole(data):
    dls = dataloaders(data, RECIPE, subset=500)
    rows = rows_of(dls.train) + rows_of(dls.valid)
    assert len(rows) == len(set(rows)) == 500 and max(rows) < data.n_train
    assert np.abs(np.bincount(data.labels[rows]) - 50).max() <= 2
    assert len(dls.test.dataset) == data.n_test


@pytest.mark.parametrize("subset", [0, 99, 1438, -5])
def test_impossible_subsets(data, subset):
    with pytest.raises(UserError, match="between 100 and 1427, or be all 1437 images"):
        dataloaders(data, RECIPE, subset=subset)


def test_a_class_of_one_image_cannot_be_divided():
    labels = np.array([0] * 30 + [1] + [0, 1])
    data = ImageData("tiny", np.zeros((33, 32, 32, 3), np.uint8), labels, ("a", "b"), 31, "lossless")
    with pytest.raises(DataError, match="tiny: too few training images"):
        dataloaders(data, RECIPE)


def test_channel_stats_against_numpy():
    random = np.random.default_rng(0)
    images = random.integers(0, 200, (1503, 16, 16, 3), dtype=np.uint8) * np.array([1, 0.5, 0], dtype=np.float32)
    data = ImageData("r", images.astype(np.uint8), np.zeros(1503, np.int64), ("a", "b"), 1500, "lossless")
    train = images.astype(np.uint8)[:1500] / 255
    means, stds = data.channel_stats
    assert means == pytest.approx(train.mean(axis=(0, 1, 2)).tolist(), abs=1e-9)
    assert stds[:2] == pytest.approx(train.std(axis=(0, 1, 2)).tolist()[:2], abs=1e-6)
    assert stds[2] == pytest.approx(1 / 255)  # a channel without contrast is not divided by zero


# --- batches -----------------------------------------------------------------------------------------------------


def test_evaluation_batches_are_the_images_normalised_in_order(dls, data):
    for dl in (dls.valid, dls.test):
        rows = rows_of(dl)
        x, y = (torch.cat(parts) for parts in zip(*batches(dl), strict=True))
        mean, std = (np.float32(stat) for stat in data.channel_stats)
        expected = ((data.images[rows].astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)
        assert np.abs(x.numpy() - expected).max() < 1e-5
        assert y.tolist() == data.labels[rows].tolist()


def test_evaluation_is_deterministic_and_training_random(dls):
    for first, second in zip(batches(dls.valid), batches(dls.valid), strict=True):
        assert torch.equal(first[0], second[0])
    assert not torch.equal(batches(dls.train)[0][0], batches(dls.train)[0][0])


def test_training_batches_repeat_by_seed_whatever_else_draws_numbers(data):
    first = batches(dataloaders(data, RECIPE, seed=3).train)
    torch.rand(5), np.random.rand(5)
    again, other = (batches(dataloaders(data, RECIPE, seed=seed).train) for seed in (3, 4))
    assert all(torch.equal(a, b) for pair in zip(first, again, strict=True) for a, b in zip(*pair, strict=True))
    assert not torch.equal(first[0][1], other[0][1])


def test_an_epoch_shows_every_training_image_once_in_full_batches(data):
    dls = dataloaders(data, get_recipe("classic-adam", bs=64, flip="off", rotate=0.0))
    shown = batches(dls.train)
    assert {len(x) for x, _ in shown} == {64} and len(shown) == len(dls.train_ds) // 64
    hashes = [image.numpy().tobytes() for x, _ in shown for image in x]
    originals = {
        dls.train.after_batch((image[None],))[0].numpy().tobytes() for image in uint8_rows(data, rows_of(dls.train))
    }
    assert set(hashes) <= originals and len(set(hashes)) >= len(hashes) - 5  # the digits hold a few equal images


def uint8_rows(data, rows):
    from fastai.vision.core import TensorImage

    return [TensorImage(torch.from_numpy(data.images[row]).permute(2, 0, 1)) for row in rows]


def test_batches_by_slice_equal_batches_by_item(dls):
    by_slice = batches(dls.valid)
    slow = dls.valid.new()
    slow.after_item.add(Nothing())  # a transform that the loader does not know: it must take fastai's usual way
    assert not slow._items_are_rows()
    for (x, y), (slow_x, slow_y) in zip(by_slice, batches(slow), strict=True):
        assert torch.equal(x, slow_x) and torch.equal(y, slow_y)


class Nothing(Transform):
    def encodes(self, x):
        return x


def test_images_stay_in_the_mapped_file_where_a_device_has_no_room_for_all(data, monkeypatch):
    """Batches alone go there. torch's device without memory stands for one with too little."""
    monkeypatch.setattr(data_module, "has_room", lambda device, n_bytes: False)
    dl = dataloaders(data, get_recipe("classic-adam"), device=torch.device("cpu")).valid
    dl.device = torch.device("meta")
    images, labels = dl.dataset.tls[0].tfms.fs[0].tensors(dl.device)
    assert images.data_ptr() == data.images.ctypes.data and labels.device.type == "cpu"
    x, y = next(dl.create_batches(range(3)))
    assert {x.device.type, x.rows.device.type, y.device.type} == {"meta"} and x.shape == (3, 3, 32, 32)


def test_a_batch_size_beyond_the_images_still_trains(pictures):
    dls = dataloaders(pictures, get_recipe("fast", bs=1024))
    assert len(dls.train) == 1 and len(batches(dls.train)[0][0]) == 54


# --- as a fastai user expects ------------------------------------------------------------------------------------


def test_vocab_and_getters(dls, data):
    assert list(dls.vocab) == list(data.classes)
    image, label = dls.valid_ds[0]
    row = rows_of(dls.valid)[0]
    assert np.array_equal(np.asarray(image), data.images[row]) and label == data.labels[row]


def test_vocab_keeps_the_order_of_the_classes(pictures):
    data = load_data(pictures)
    backwards = ImageData(data.source, data.images, 2 - data.labels, data.classes[::-1], data.n_train, "lossless")
    dls = dataloaders(backwards, RECIPE)
    _, y = dls.valid.one_batch()
    assert list(dls.vocab) == sorted(COLOURS, reverse=True)
    assert [dls.vocab[label] for label in y] == [backwards.classes[backwards.labels[row]] for row in rows_of(dls.valid)]


def test_show_batch_draws_the_images(dls, monkeypatch):
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    dls.show_batch(max_n=4)
    axes = [axis for axis in pyplot.gcf().axes if axis.images]
    assert len(axes) == 4 and all(axis.get_title() in dls.vocab for axis in axes)
    pixels = axes[0].images[0].get_array()
    assert pixels.shape == (32, 32, 3) and pixels.max() > 100
    pyplot.close("all")


def test_test_dl_takes_users_own_items(dls, pictures):
    files = sorted(pictures.rglob("*.png"))[:3]
    (x,) = dls.test_dl(files).one_batch()
    assert x.shape == (3, 3, 32, 32)
    assert isinstance(dls.valid.after_item.fs[-1], ToTensor)


# --- small and odd data -------------------------------------------------------------------------------------------


def noise(counts, n_test=2, **fields):
    """Images of noise, so many of each class for training."""
    labels = np.array([label for label, n in enumerate(counts) for _ in range(n)] + list(range(n_test)), dtype=np.int64)
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8)
    classes = tuple(f"class{n}" for n in range(len(counts)))
    return ImageData("noise", images, labels, classes, len(labels) - n_test, "lossless", **fields)


@pytest.mark.parametrize("counts", [[10] * 5, [8] * 5, [2] * 5, [30, 3, 3, 2, 2]])
def test_each_class_of_a_small_set_is_validated(counts):
    data = noise(counts)
    dls = dataloaders(data, RECIPE, seed=3)
    train, valid = rows_of(dls.train), rows_of(dls.valid)
    assert sorted(train + valid) == list(range(sum(counts)))
    assert set(data.labels[train]) == set(range(5))
    assert len(valid) == max(5, -(-sum(counts) // 5))  # the recipe's share is a fifth
    if sum(counts) <= 25:
        assert set(data.labels[valid]) == set(range(5))


@pytest.mark.parametrize("subset", [20, 30, 35])
def test_a_subset_of_a_small_set(subset):
    data = noise([8] * 5)
    dls = dataloaders(data, get_recipe("classic-sgd", bs=8), subset=subset)
    rows = rows_of(dls.train) + rows_of(dls.valid)
    assert len(rows) == len(set(rows)) == subset and max(rows) < 40
    assert set(data.labels[rows_of(dls.train)]) == set(data.labels[rows_of(dls.valid)]) == set(range(5))


@pytest.mark.parametrize(
    ("counts", "subset", "words"),
    [
        ([8] * 5, 19, "subset must lie between 20 and 35, or be all 40 images, not 19"),
        ([8] * 5, 41, "subset must lie between 20 and 35, or be all 40 images, not 41"),
        ([2] * 5, 8, "subset must be all 10 images, of which there are too few to choose from, not 8"),
        ([90, 4, 4], 30, "of the class 'class1', 1 of 4 without --subset: raise it"),
        ([90, 9, 1], 40, "a single one, for a subset. Leave --subset out"),
        ([9, 9, 1], None, "too few training images of the class 'class2', 1: add some, or remove the class. It takes 2"),
        ([9, 9, 0], None, "too few training images of the class 'class2', 0: add some"),
    ],
)
def test_what_cannot_be_divided_is_said_in_words_of_our_own(counts, subset, words):
    with pytest.raises(UserError, match=words) as error:
        for seed in range(20):  # some draw leaves a small class with too few
            dataloaders(noise(counts), RECIPE, seed, subset=subset)
    assert "member" not in str(error.value) and "n_splits" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": np.array([0, 1, 2, -1])}, "each image has a label of 0 to 1"),
        ({"labels": np.array([0, 1, 0])}, "each image has a label of 0 to 1"),
        ({"images": np.zeros((4, 32, 32, 3))}, "images are uint8 of the shape"),
        ({"images": np.zeros((4, 3, 32, 32), np.uint8)}, "images are uint8 of the shape"),
        ({"classes": ("a", "x" * 300)}, "it has 300 letters"),
        ({"classes": ("a", "b\n")}, "it holds control characters"),
    ],
)
def test_data_by_hand_are_checked_before_the_training(change, words):
    fields = {"source": "mine", "images": np.zeros((4, 32, 32, 3), np.uint8), "labels": np.array([0, 1, 0, 1])}
    fields |= {"classes": ("a", "b"), "n_train": 4, "encoding": "lossless"}
    with pytest.raises(DataError, match=words):
        dataloaders(ImageData(**fields | change), RECIPE)
