"""The files of an export, sealed: MANIFEST.json lists each with its sha256, and only what was hashed is ever parsed."""

import errno
import hashlib
import json
import math
import os
import re
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cifar_fastai.errors import ExportError, UserError

SCHEMA = 4  # of config.json and MANIFEST.json; 2 brought the temperature, 3 unfamiliar_below, 4 tta_views
READ_SCHEMAS = (3, 4)
WEIGHTS, CONFIG, PROBE, PICKLE, CARD, ONNX, MANIFEST = (
    "model.safetensors", "config.json", "probe.npz", "export.pkl", "README.md", "model.onnx", "MANIFEST.json",
)  # fmt: skip
REQUIRED = (WEIGHTS, CONFIG, PROBE)  # the others may be missing
MB, GB = 1_000_000, 1_000_000_000
LIMITS = {WEIGHTS: 4 * GB, CONFIG: 16 * MB, PROBE: 100 * MB, PICKLE: 4 * GB, CARD: MB, ONNX: 4 * GB}  # bytes
MANIFEST_LIMIT = MB // 10
MAX_KEYS = 50_000  # of a JSON file; five times as many as one of the most classes has
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Sealed:
    """The files that a manifest lists. They are read, once each, by `read` alone."""

    folder: Path
    files: dict[str, dict]  # name → {"sha256", "size"}
    digest: str  # sha256 of the manifest, and thereby of all of them

    def read(self, name: str) -> bytes:
        """All of a listed file, which these bytes are known to be. Raises ExportError."""
        entry = self.files[name]
        data = _read(self.folder / name, entry["size"])
        if len(data) != entry["size"] or _sha256(data) != entry["sha256"]:
            raise ExportError(f"{name} is not the file that {MANIFEST} lists; it was damaged or changed.")
        return data

    def read_required(self) -> dict[str, bytes]:
        """The files that make up the network, by name, once everything else in the folder has been checked too.

        Raises ExportError: also over a link, and over a file that is not listed.
        """
        for name in _plain_files(self.folder) - {MANIFEST, *REQUIRED}:
            if name not in self.files:
                raise ExportError(f"{name!r} is not listed in {MANIFEST}; remove it if it is yours.")
            self.read(name)
        return {name: self.read(name) for name in REQUIRED}


def open_sealed(folder: Path, expect_digest: str | None = None) -> Sealed:
    """Read the manifest of an export.

    expect_digest: the sha256, in hexadecimal, that the manifest must have. Raises ExportError; UserError if expect_digest
    is no digest.
    """
    if expect_digest is not None and not SHA256.fullmatch(expect_digest := str(expect_digest).strip().lower()):
        raise UserError("--expect-digest takes a sha256: 64 hexadecimal digits, as an export's making has printed them.")
    data = _read(folder / MANIFEST, MANIFEST_LIMIT)
    if len(data) > MANIFEST_LIMIT:
        raise ExportError(f"{MANIFEST} is damaged (it is far too long).")
    digest = _sha256(data)
    if expect_digest not in (None, digest):
        raise ExportError(f"its digest is {digest}, not the expected one; it is another export, or was changed.")
    return Sealed(folder, _listed(parse_json(MANIFEST, data)), digest)


def _listed(manifest: dict) -> dict[str, dict]:
    """The entries of a manifest. Raises ExportError unless it is one to the letter."""
    check_schema(MANIFEST, manifest)
    files = manifest.get("files")
    if manifest.keys() != {"schema", "files"} or not isinstance(files, dict):
        raise ExportError(f"{MANIFEST} is damaged (it holds other things than a list of files).")
    if strangers := files.keys() - LIMITS.keys():
        raise ExportError(f"{MANIFEST} lists {min(strangers)!r}, which is no file of an export.")
    if missing := set(REQUIRED) - files.keys():
        raise ExportError(f"{MANIFEST} does not list {', '.join(sorted(missing))}.")
    for name, entry in files.items():
        sound = (
            isinstance(entry, dict)
            and entry.keys() == {"sha256", "size"}
            and isinstance(entry["sha256"], str)
            and SHA256.fullmatch(entry["sha256"])
            and type(entry["size"]) is int
            and 0 <= entry["size"] <= LIMITS[name]
        )
        if not sound:
            raise ExportError(f"{MANIFEST} is damaged (sha256 or size of {name}).")
    return files


def check_schema(name: str, content: dict) -> None:
    """Raises ExportError for a file that another version wrote."""
    if type(content.get("schema")) is not int or content["schema"] not in READ_SCHEMAS:
        read = " and ".join(map(str, READ_SCHEMAS))
        raise ExportError(f"{name} has schema {content.get('schema')!r}; this version reads {read}.")


def parse_json(name: str, data: bytes) -> dict:
    """A JSON object, by the letter: UTF-8, no key twice, no NaN, no number out of range. Raises ExportError."""
    n_keys = 0

    def fields(pairs: list[tuple]) -> dict:
        nonlocal n_keys
        n_keys += len(pairs)
        if n_keys > MAX_KEYS:
            raise ValueError(f"more than {MAX_KEYS:,} fields")
        content = dict(pairs)
        if len(content) < len(pairs):
            raise ValueError("a key stands there twice")
        return content

    hooks = {"parse_constant": _no_constant, "parse_float": _finite, "parse_int": _int64, "object_pairs_hook": fields}
    try:
        content = json.loads(data.decode("utf-8"), **hooks)
        json.dumps(content, ensure_ascii=False).encode()  # an escape may stand for half a character
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{name} is damaged ({error}).") from None
    if not isinstance(content, dict):
        raise ExportError(f"{name} is damaged (no JSON object).")
    return content


def _no_constant(word: str):
    raise ValueError(f"{word} is no JSON")


def _finite(digits: str) -> float:
    if math.isfinite(value := float(digits)):
        return value
    raise ValueError("a number out of range")


def _int64(digits: str) -> int:
    if len(digits) <= 20 and -(1 << 63) <= (value := int(digits)) < 1 << 63:
        return value
    raise ValueError("a number out of range")


def check_is_export(folder: Path) -> None:
    """Raises ExportError unless this is a folder, and no link to one, with a manifest and no file that an export has not."""
    if folder.is_symlink() or not folder.is_dir():
        raise ExportError("it is no folder")
    if strangers := _plain_files(folder) - {MANIFEST, *LIMITS}:
        raise ExportError(f"{min(strangers)!r} is no file of one")
    open_sealed(folder)


def _plain_files(folder: Path) -> set[str]:
    """Names of what is in a folder. Raises ExportError unless all are files, and no links to others."""
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise ExportError(f"the folder cannot be read ({error.strerror}).") from None
    for entry in entries:
        if not entry.is_file(follow_symlinks=False):
            raise ExportError(f"{entry.name!r} is a link or a folder; an export holds plain files alone.")
    return {entry.name for entry in entries}


def read_limited(path: Path, limit: int) -> bytes:
    """A file's bytes, up to one more than `limit`. Raises OSError, also for a pipe or a device, which may never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    with path.open("rb") as file:
        return file.read(limit + 1)


def _read(path: Path, limit: int) -> bytes:
    try:
        return read_limited(path, limit)
    except OSError as error:
        raise ExportError(f"{path.name} cannot be read ({error.strerror or error}).") from None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- writing -----------------------------------------------------------------------------------------------------


def write_manifest(folder: Path) -> str:
    """List every other file in the folder in MANIFEST.json; returns its digest."""
    paths = (path for path in sorted(folder.iterdir()) if path.name != MANIFEST)
    data = _manifest({path.name: _entry(path.read_bytes()) for path in paths})
    (folder / MANIFEST).write_bytes(data)
    return _sha256(data)


def add_file(sealed: Sealed, name: str, data: bytes) -> str:
    """Put one more file into an export and its manifest, replacing one of that name; returns the new digest.

    What the manifest says of the others stays: nothing that was damaged becomes valid by this. Interrupted at any moment,
    it leaves an export that loads. Raises UserError if the folder cannot be written to.
    """
    folder = sealed.folder
    manifest = _manifest(dict(sorted({**sealed.files, name: _entry(data)}.items())))
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            for file, content in ((MANIFEST, manifest), (name, data)):
                (Path(scratch) / file).write_bytes(content)
            (folder / name).unlink(missing_ok=True)  # that a listed file is missing is no fault, that it is another is one
            for file in (MANIFEST, name):
                (Path(scratch) / file).replace(folder / file)
    except OSError as error:
        raise UserError(f"{folder / name} cannot be written: {error.strerror or error}.") from None
    return _sha256(manifest)


def _manifest(files: dict[str, dict]) -> bytes:
    return to_json({"schema": SCHEMA, "files": files})


def _entry(data: bytes) -> dict:
    return {"sha256": _sha256(data), "size": len(data)}


def to_json(value) -> bytes:
    """Indented, in UTF-8."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
