"""What lies in a folder or an archive, which of it is an image of which class, and the bytes. Nothing is decoded here."""

import errno
import itertools
import os
import stat
import tarfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath

from cifar_fastai.download import digests
from cifar_fastai.errors import DataError, first_line
from cifar_fastai.images import EXTENSIONS, FORMATS, TOO_LARGE, BadImage
from cifar_fastai.labels import label_of
from cifar_fastai.terminal import printable

SPLITS = ("train", "valid", "test")
SPLIT_WORDS = {"train": "training", "valid": "validation", "test": "test"}
SPLIT_FOLDERS = {  # what people call them, in whatever case
    "train": "train", "training": "train", "valid": "valid", "val": "valid", "validation": "valid", "dev": "valid",
    "test": "test", "testing": "test",
}  # fmt: skip
BATCH_FILES = {"train": [f"data_batch_{n}" for n in range(1, 6)], "test": ["test_batch"]}
BATCH_NAMES = {"batches.meta", *BATCH_FILES["train"], *BATCH_FILES["test"]}
CIFAR100_NAMES = {"meta", "train", "test"}
HIDDEN = frozenset(  # what operating systems and storage devices leave in folders, beside names that begin with a dot
    "__macosx desktop.ini thumbs.db ehthumbs.db $recycle.bin lost+found @eadir #recycle @recycle".split()
) | {"system volume information"}
MAX_HEADER = 1_000_000  # bytes of a name or of attributes in a tar, which tarfile would read whole
HEADERS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, *(b"x", b"g", b"X"))
TAIL_BYTES = 4_000_000  # read at once behind an archive's last member
LONGEST_PATH = 200  # letters of a path in a message
LAYOUT_HELP = (
    "A folder or archive of images holds train/<class>/<image>, and valid/<class>/<image> and test/<class>/<image> if you "
    "have them."
)


@dataclass(frozen=True)
class Entry:
    """What a folder or an archive lists. Nothing of it is in memory yet."""

    path: PurePosixPath  # within the folder or archive
    size: int  # bytes, as announced
    kind: str  # "file", "folder", "link" (in an archive) or "device"


REFUSED = {"link": "A link.", "device": "No regular file."}


def shown(path) -> str:
    """A path for a message: on one line, and of some length."""
    text = printable(str(path))
    return text if len(text) <= LONGEST_PATH else f"{text[: LONGEST_PATH // 2]}…{text[-LONGEST_PATH // 2 :]}"


@lru_cache(10_000)
def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is nothing that somebody has put there."""
    return name.startswith(".") or name.lower() in HIDDEN


def _read(file, size: int, limit: int) -> bytes | BadImage:
    """The bytes of an open file; a reason if there are more than `limit`, however few were announced."""
    data = file.read(limit + 1) if size <= limit else b""
    return data if size <= limit and len(data) <= limit else BadImage(TOO_LARGE)


# --- folders -----------------------------------------------------------------------------------------------------


def list_folder(folder: Path) -> list[tuple[str, os.stat_result]]:
    """All that lies in a folder and is not hidden, by path from there, in order; links are followed. Raises DataError."""
    found = []
    waiting: list[tuple[str, str, tuple]] = [(str(folder), "", ())]  # a folder, its path from there, those it lies in
    try:
        while waiting:
            path, prefix, above = waiting.pop()
            about = Path(path).stat()
            here = (about.st_dev, about.st_ino)
            if here in above:
                continue  # a link that leads back
            with os.scandir(path) as scan:
                entries = sorted((entry for entry in scan if not is_hidden(entry.name)), key=lambda entry: entry.name)
            for entry in entries:
                try:
                    found.append((prefix + entry.name, entry.stat()))
                except FileNotFoundError:
                    reason = "the link leads nowhere" if entry.is_symlink() else os.strerror(errno.ENOENT)
                    raise FileNotFoundError(errno.ENOENT, reason, entry.path) from None
                if stat.S_ISDIR(found[-1][1].st_mode):
                    waiting.append((entry.path, f"{prefix}{entry.name}/", (*above, here)))
    except OSError as error:
        raise DataError(f"{shown(error.filename or folder)} cannot be read: {error.strerror or error}.") from None
    return sorted(found, key=lambda item: item[0].split("/"))


class Folder:
    """A folder of files. listing: as `list_folder` gives it."""

    sha256 = None

    def __init__(self, path: Path, listing: list[tuple[str, os.stat_result]]):
        self.path, self.listing, self.name = path, listing, printable(path.resolve().name)

    def entries(self, show: Callable[[float], None]) -> list[Entry]:
        return [Entry(PurePosixPath(name), about.st_size, _kind(about.st_mode)) for name, about in self.listing]

    def contents(self, wanted: Collection[int], limit: int) -> Iterator[tuple[int, bytes | BadImage]]:
        for number in sorted(wanted):
            name, about = self.listing[number]
            try:
                with (self.path / name).open("rb") as file:
                    content = _read(file, about.st_size, limit)
            except OSError as error:
                reason = error.strerror or error
                raise DataError(f"{shown(error.filename or self.path / name)} cannot be read: {reason}.") from None
            yield number, content


def _kind(mode: int) -> str:
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "device"


# --- archives ----------------------------------------------------------------------------------------------------
# Members are read in memory and nothing is written, so hostile names and links in an archive have no effect.


def open_archive(path: Path) -> "Tar | Zip":
    """Raises DataError, as does all that is done with it."""
    with _archives_errors(path):
        return (Zip if zipfile.is_zipfile(path) else Tar)(path)


@contextmanager
def _archives_errors(path: Path):
    """Everything that Python's modules raise over an archive, as DataError."""
    try:
        yield
    except DataError:
        raise
    except NotImplementedError as error:
        raise DataError(f"--data {path}: it cannot be unpacked here ({shown(error)}): unpack it otherwise.") from None
    except Exception as error:  # a damaged archive makes them raise nearly anything
        if isinstance(error, OSError) and error.errno:
            raise DataError(f"--data {path}: it cannot be read: {error.strerror}.") from None
        raise DataError(f"--data {path}: the archive is damaged ({shown(first_line(error))}). Fetch it again.") from None


class _Archive:
    def __init__(self, path: Path):
        self.path, self.name = path, printable(path.name)

    @property
    def sha256(self) -> str:
        with _archives_errors(self.path):
            return digests(self.path, "sha256")[0]


class _Member(tarfile.TarInfo):
    """A member of a tar whose headers have a bounded size."""

    def _proc_member(self, archive):
        if self.size < 0 or (self.type in HEADERS and self.size > MAX_HEADER):
            raise tarfile.ReadError("a header in it announces an impossible size")
        return super()._proc_member(archive)


class Tar(_Archive):
    """A tar archive, compressed or not. It can only be read from its beginning to its end."""

    def entries(self, show: Callable[[float], None]) -> list[Entry]:
        length, found = self.path.stat().st_size, []
        with _archives_errors(self.path), self.path.open("rb") as file, self._open(file) as archive:
            for member in self._members(archive):
                link = member.issym() or member.islnk()
                kind = "folder" if member.isdir() else "file" if member.isfile() else "link" if link else "device"
                found.append(Entry(PurePosixPath(member.name.lstrip("/")), member.size, kind))
                if len(found) % 50 == 0:
                    show(file.tell() / length)
            # tarfile stops at the end mark, or at a header it cannot read. What follows tells which; gzip's CRC comes last.
            while rest := archive.fileobj.read(TAIL_BYTES):
                if rest.count(0) < len(rest):
                    raise tarfile.ReadError("a header in it cannot be read")
        return found

    def contents(self, wanted: Collection[int], limit: int) -> Iterator[tuple[int, bytes | BadImage]]:
        left = len(wanted)
        with _archives_errors(self.path), self.path.open("rb") as file, self._open(file) as archive:
            for number, member in enumerate(self._members(archive) if wanted else ()):
                if number in wanted:
                    yield number, _read(archive.extractfile(member), member.size, limit)
                    left -= 1
                if not left:
                    return

    def _open(self, file) -> tarfile.TarFile:
        try:
            return tarfile.open(fileobj=file, tarinfo=_Member)
        except tarfile.ReadError:
            words = f"--data {self.path}: neither a tar nor a zip archive, or a damaged one. {LAYOUT_HELP}"
            raise DataError(words) from None

    @staticmethod
    def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
        last = -1
        for member in archive:
            if member.offset <= last or member.size < 0:
                raise tarfile.ReadError("its headers lead back")
            last = member.offset
            yield member


class Zip(_Archive):
    """A zip archive."""

    def entries(self, show: Callable[[float], None]) -> list[Entry]:
        with _archives_errors(self.path), zipfile.ZipFile(self.path) as archive:
            return [self._entry(member) for member in archive.infolist()]

    @staticmethod
    def _entry(member: zipfile.ZipInfo) -> Entry:
        name = member.filename.replace("\\", "/")  # which some programs of Windows write
        link = stat.S_ISLNK(member.external_attr >> 16)
        kind = "folder" if name.endswith("/") else "link" if link else "file"
        return Entry(PurePosixPath(name.lstrip("/")), member.file_size, kind)

    def contents(self, wanted: Collection[int], limit: int) -> Iterator[tuple[int, bytes | BadImage]]:
        with _archives_errors(self.path), zipfile.ZipFile(self.path) as archive:
            members = archive.infolist()
            for number in sorted(wanted):
                member = members[number]
                if member.flag_bits & 1:
                    name = shown(member.filename)
                    raise DataError(f"--data {self.path}: {name} is encrypted. Unpack it, and name the folder.")
                with archive.open(member) as file:
                    yield number, _read(file, member.file_size, limit)


# --- what is what ------------------------------------------------------------------------------------------------


@dataclass
class Layout:
    """Which entries are images of which split and class, or CIFAR's own batches; and all that is neither."""

    entries: list[Entry]
    images: dict[int, tuple[str, str]] = field(default_factory=dict)  # number of an entry → its split and class
    batches: dict[int, str] = field(default_factory=dict)  # number of an entry → its name
    unfit: str | None = None  # why nothing can be trained on these images
    remarks: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    unreadable: dict[tuple[str, str], list[str]] = field(default_factory=lambda: defaultdict(list))  # by split and class
    misplaced: list[str] = field(default_factory=list)
    elsewhere: Counter = field(default_factory=Counter)  # images by the folder they lie in
    places: list[str] = field(default_factory=list)  # where images belong

    def refuse_to_train(self, reason: str) -> None:
        self.unfit = self.unfit or reason

    def classes(self) -> set[str]:
        return {label for _, label in (*self.images.values(), *self.unreadable)}

    def warnings(self) -> list[str]:
        """What was left out, in lines fit to be shown."""
        places = f"{', '.join(self.places[:-1])} or {self.places[-1]}" if len(self.places) > 1 else self.places[0]
        found = count_and_name("not an image file, passed over", self.passed_over)
        found += count_and_name("unreadable, left out", itertools.chain.from_iterable(self.unreadable.values()))
        found += count_and_name(f"not in {places}, left out", self.misplaced)
        if self.elsewhere:
            n = sum(self.elsewhere.values())
            found.append(f"{n} elsewhere than in {places}, left out: {_first_of(sorted(self.elsewhere))}")
        return self.remarks + found


def sort_out(entries: list[Entry], source: str, labelled: bool) -> Layout:
    """What each entry is. Images count from one folder: the one nearest to the top that holds train/.

    labelled: where there is none, the one that holds valid/ or test/, or folders of classes, will do; `unfit` then says
    why they cannot be trained on. Raises DataError if there is nothing of the kind, or more than one folder to choose from.
    """
    layout = Layout(entries)
    visible = _visible(layout)
    images = {parts for parts, number in visible.items() if _looks_like_an_image(entries[number])}
    classes = {parts[:-1] for parts in images}
    root = _top(_holders(classes, "train"), source) or _top(_holders(classes, "valid", "test"), source)
    batches = {parts: number for parts, number in visible.items() if _is_batch(entries[number])}
    home = _top({parts[:-1] for parts in batches}, source)
    if home and root and len(home[0]) == len(root[0]):
        raise DataError(f"--data {source}: it holds CIFAR-10's batches and folders of images. Remove what you do not mean.")
    if home and not (root and len(root[0]) < len(home[0])):
        layout.batches = {number: parts[-1] for parts, number in batches.items() if parts[:-1] == home[0]}
        return layout
    root = root or _top(_holders(visible.keys() | {parts[:-1] for parts in visible}, "train"), source)
    if root:
        _sort_splits(layout, visible, images, root[0], source)
    elif labelled and (root := _home_of_classes(classes, source)):
        _sort_classes(layout, visible, images, root[0])
    else:
        words = "no images in train/, valid/ or test/, nor in folders of classes" if labelled else "no images in train/"
        raise DataError(f"--data {source}: {words}{_guess(visible)}. {LAYOUT_HELP}")
    return layout


def _guess(visible: Collection[tuple[str, ...]]) -> str:
    folders = {parts[:-1] for parts in visible}
    if any({(*folder, name) for name in CIFAR100_NAMES} <= set(visible) for folder in folders):
        return "; it looks like CIFAR-100, which is not read as it is"
    return ""


def _visible(layout: Layout) -> dict[tuple[str, ...], int]:
    """The entries that are not hidden, by path; of several with one path the last, which unpacking would leave."""
    found: dict[tuple[str, ...], int] = {}
    outside, replaced = [], []
    for number, entry in enumerate(layout.entries):
        parts = entry.path.parts
        if ".." in parts:
            outside.append(entry.path)
        elif not any(map(is_hidden, parts)):
            if parts in found and entry.kind != "folder":
                replaced.append(entry.path)
            found[parts] = number
    layout.remarks += count_and_name("with a path that leads out of the archive, left out", outside)
    layout.remarks += count_and_name("replaced by a later file of the same name", replaced)
    return found


def _looks_like_an_image(entry: Entry) -> bool:
    return entry.kind != "folder" and entry.path.suffix.lower() in EXTENSIONS


def _is_batch(entry: Entry) -> bool:
    return entry.kind == "file" and entry.path.name in BATCH_NAMES


def _split_of(folder: str) -> str | None:
    return SPLIT_FOLDERS.get(folder.casefold())


def _holders(classes: Iterable[tuple[str, ...]], *splits: str) -> set[tuple[str, ...]]:
    """The folders above the splits in which these folders of classes lie."""
    return {parts[:-2] for parts in classes if len(parts) >= 2 and _split_of(parts[-2]) in splits}


def _top(folders: set[tuple[str, ...]], source: str) -> list[tuple[str, ...]]:
    """The folder nearest to the top, in a list; an empty one if there is none. Raises DataError if there are several."""
    depth = min(map(len, folders), default=0)
    nearest = sorted(parts for parts in folders if len(parts) == depth)
    if len(nearest) > 1:
        first, second = (shown("/".join(parts)) for parts in nearest[:2])
        raise DataError(
            f"--data {source}: {first}/ and {second}/ could both be the data set. Name one of them; unpack an archive first."
        )
    return nearest


def _sort_splits(layout: Layout, visible: dict[tuple, int], images: set[tuple], root: tuple[str, ...], source: str) -> None:
    """Sort what lies in a folder that holds train/, valid/ and test/, or some of them, and what lies beside them."""
    depth = len(root)
    splits = _split_folders([parts for parts in visible if parts[:depth] == root], images, depth, source)
    names = defaultdict(set)  # of the folders of each split and class
    for parts, number in visible.items():
        rest = parts[depth:]
        if parts[:depth] != root or not rest or rest[0] not in splits:
            if parts in images:
                layout.elsewhere[_place(parts, root)] += 1
            continue
        is_folder = layout.entries[number].kind == "folder"
        if len(rest) > (1 if is_folder else 2):
            names[splits[rest[0]], label_of(rest[1])].add("/".join(parts[: depth + 2]))
        if len(rest) == 3 and not is_folder:
            _sort_file(layout, number, splits[rest[0]], label_of(rest[1]))
        elif parts in images:
            layout.misplaced.append("/".join(parts))
    layout.places = [f"{folder}/<class>/" for folder in splits]
    _check_classes(layout, names)


def _split_folders(paths: list[tuple], images: set[tuple], depth: int, source: str) -> dict[str, str]:
    """Which split each folder is. valid/ and test/ count where they hold an image of a class. Raises DataError."""
    named = {parts[depth] for parts in paths if len(parts) > depth and _split_of(parts[depth])}
    filled = {parts[depth] for parts in paths if parts in images and len(parts) == depth + 3}
    found: dict[str, str] = {}
    for split in SPLITS:
        folders = sorted(name for name in named if _split_of(name) == split)
        folders = [name for name in folders if name in filled] or (folders[:1] if split == "train" else [])
        if len(folders) > 1:
            first, second = folders[:2]
            words = f"{shown(first)}/ and {shown(second)}/ are both the {SPLIT_WORDS[split]} split"
            raise DataError(f"--data {source}: {words}. Make one folder of them.")
        found |= dict.fromkeys(folders, split)
    return found


def _place(parts: tuple[str, ...], root: tuple[str, ...]) -> str:
    """Where something outside lies: the first part of its path that does not lead to `root`."""
    same = next((place for place, (one, other) in enumerate(zip(parts, root, strict=False)) if one != other), len(root))
    return "/".join(parts[: same + 1]) + ("/" if len(parts) > same + 1 else "")


def _check_classes(layout: Layout, names: dict[tuple[str, str], set[str]]) -> None:
    filled = {*layout.images.values(), *layout.unreadable}
    if not any(split == "train" for split, _ in names):
        layout.refuse_to_train(f"no images in train/. {LAYOUT_HELP}")
    empty = sorted(min(folders) for key, folders in names.items() if key not in filled)
    if empty:
        words = f"is a class without images ({', '.join(FORMATS)}): put some in, or remove the folder."
        layout.refuse_to_train(f"{shown(empty[0])} {words}")
        layout.remarks += count_and_name("without images, no class", empty)
    for folders in names.values():
        if len(folders) > 1:
            what = "folders whose names are the same text, taken as one class"
            layout.remarks += count_and_name(what, map(ascii, sorted(folders)))


def _home_of_classes(classes: set[tuple[str, ...]], source: str) -> list[tuple[str, ...]]:
    """The folder in which folders of images lie, in a list; an empty one if there is none. Raises DataError over several."""
    homes = {parts[:-1] for parts in classes if parts}
    home = _top(homes, source)
    while home and len(inside := {parts for parts in classes if parts and parts[:-1] == home[0]}) == 1 and inside <= homes:
        home = [*inside]  # a folder around all, with some image of its own
    return home


def _sort_classes(layout: Layout, visible: dict[tuple, int], images: set[tuple], home: tuple[str, ...]) -> None:
    """Sort what lies in a folder that holds folders of classes, and no splits."""
    classes = {parts[:-1] for parts in images if parts[:-2] == home}
    for parts, number in visible.items():
        if parts[:-1] in classes and layout.entries[number].kind != "folder":
            _sort_file(layout, number, "train", label_of(parts[-2]))
        elif parts in images:
            layout.elsewhere[_place(parts, home)] += 1
    layout.places = ["/".join((*home, "<class>/"))]
    layout.refuse_to_train(f"no images in train/, but folders of classes: put them into one of that name. {LAYOUT_HELP}")


def _sort_file(layout: Layout, number: int, split: str, label: str) -> None:
    entry = layout.entries[number]
    if not _looks_like_an_image(entry):
        layout.passed_over.append(str(entry.path))
    elif entry.kind == "file":
        layout.images[number] = (split, label)
    else:
        layout.unreadable[split, label].append(f"{entry.path} ({REFUSED[entry.kind]})")


def count_and_name(what: str, things: Iterable) -> list[str]:
    """A remark in a list, which is empty if there are none of these things."""
    things = list(things)
    return [f"{len(things)} {what}: {_first_of(things)}"] if things else []


def _first_of(things: list) -> str:
    return ", ".join(map(shown, things[:3])) + (" and more" if len(things) > 3 else "")
