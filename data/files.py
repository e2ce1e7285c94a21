"""Files that other programs wrote, and files that we write: what is refused, and nothing half
written.

python -c "from data.files import read_json; print(read_json('out/seed0/tiny-s/config.json'))"
"""

import codecs
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from data.errors import UsageError

# --------------------------------------------------------------------------------------------------
# Reading

LFS = b"version https://git-lfs"
FOREIGN = {  # how a file begins: what it is, and the way out
    LFS: "a git-lfs pointer in place of the file; `git lfs pull` fetches that",
    b"PAR1": "parquet; pandas makes JSON lines of it: read_parquet(FILE).to_json('data.jsonl', orient='records', lines=True)",
    b"ARROW1": "an Arrow file; the library datasets makes JSON lines of it: Dataset.from_file(FILE).to_json('data.jsonl')",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"BZh": "compressed by bzip2; decompress it first",
    b"\xfd7zXZ": "compressed by xz; decompress it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; decompress it first",
    b"SQLite format 3": "an SQLite data base; export its table as JSON lines",
    b"\xff\xfe\0\0": "UTF-32; save it as UTF-8",
    b"\0\0\xfe\xff": "UTF-32; save it as UTF-8",
    b"[\0": "UTF-16 without its mark; save it as UTF-8",
    b"{\0": "UTF-16 without its mark; save it as UTF-8",
    b"\0[": "UTF-16 without its mark; save it as UTF-8",
    b"\0{": "UTF-16 without its mark; save it as UTF-8",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"\x04\x22\x4d\x18": "compressed by lz4; decompress it first",
    b"<html": "a web page; download the file itself, by its 'raw' link for instance",
}
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def check_regular(path: str | Path) -> Path:
    """The path, if it is a file that can be read, more than once; UsageError for folders, pipes and
    devices.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise UsageError(f"{str(path)!a}: no name that a file can have") from None
    if stat.S_ISDIR(mode):
        raise UsageError(f"{path}: Is a directory, where a file is wanted")
    if not stat.S_ISREG(mode):
        raise UsageError(
            f"{path}: no regular file but a pipe or a device; copy what comes from it into a file"
        )
    if not os.access(path, os.R_OK):
        raise UsageError(f"{path}: Permission denied")
    return path


def refuse_foreign(path: Path, start: bytes) -> None:
    """UsageError if a file that begins like this is of a kind that people mistake for what is
    wanted.
    """
    is_page = start.lower().startswith((b"<!doctype html", b"<html")) and path.suffix != ".txt"
    for magic, says in FOREIGN.items():
        if start.startswith(magic) or is_page and magic == b"<html":
            raise UsageError(f"{path}: {says}")


def read_bytes(path: str | Path) -> bytes:
    """All of a regular file."""
    path = check_regular(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    if not content:
        raise UsageError(f"{path}: an empty file")
    refuse_foreign(path, content[:64])
    return content


def read_json(path: str | Path) -> dict:
    """The JSON object in a file, in UTF-8 or in UTF-16 with its mark."""
    try:
        raw = json.loads(read_bytes(path))
    except UsageError:
        raise
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{path}: not JSON: {json_fault(error)}".replace("not JSON: not JSON", "not JSON")
        ) from None
    if not isinstance(raw, dict):
        raise UsageError(f"{path}: not a JSON object")
    return raw


def json_fault(error: ValueError | RecursionError, one_line: bool = False) -> str:
    """What json.loads did not like, in words."""
    if isinstance(error, RecursionError):
        return "not JSON that can be read: nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte {error.start + 1})"
    if not isinstance(error, json.JSONDecodeError):
        return "not JSON that can be read: a number of thousands of digits"
    what = (
        "more behind its end"
        if error.msg == "Extra data"
        else error.msg[:1].lower() + error.msg[1:]
    )
    return (
        f"not JSON ({what}, at "
        + ("" if one_line else f"line {error.lineno}, ")
        + f"column {error.colno})"
    )


def open_text(path: str | Path) -> BinaryIO:
    """A file of text as UTF-8 that can be sought in; .gz and UTF-16 are turned into it, in a file
    without a name.
    """
    path = check_regular(path)
    try:
        with ExitStack() as opened:
            file: BinaryIO = opened.enter_context(open(path, "rb"))
            for _ in range(2):  # a .gz may hold UTF-16
                start = file.read(64)
                file.seek(0)
                refuse_foreign(path, start)
                source = file
                if start.startswith(b"\x1f\x8b"):
                    source = gzip.GzipFile(fileobj=file)
                elif start.startswith(UTF16):
                    source = io.TextIOWrapper(file, "utf-16", newline="")
                if source is not file:
                    copy = opened.enter_context(tempfile.TemporaryFile())
                    spool(source, copy)
                    file.close()
                    file = copy
            opened.pop_all()  # nothing was wrong, so the last one stays open
            return file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UsageError(f"{path}: damaged or truncated gzip ({error})") from None
    except UnicodeError:
        raise UsageError(f"{path}: begins with the mark of UTF-16, and is not UTF-16") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None


def spool(source, copy: BinaryIO) -> None:
    """Write all of a file of bytes, or as UTF-8 one of text, and go back to the beginning."""
    while block := source.read(2**20):
        copy.write(block.encode() if isinstance(block, str) else block)
    copy.seek(0)


def hub_hint(path: Path) -> str:
    """Where the checkpoint may be that is not in this folder, in words: in Hugging Face's cache, or
    on its hub.
    """
    if path.is_dir():
        snapshots = (
            [] if (path / "config.json").exists() else sorted(path.glob("snapshots/*/config.json"))
        )
        return (
            f"; it is the root of a model in Hugging Face's cache, and the checkpoint is {snapshots[-1].parent}"
            if snapshots
            else ""
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or path.parent.exists():
        return ""
    root = Path(
        os.environ.get("HF_HUB_CACHE")
        or Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface") / "hub"
    )
    cached = sorted(
        (root / f"models--{str(path).replace('/', '--')}").glob("snapshots/*/config.json")
    )
    if cached:
        return f"; as the name of a model on Hugging Face's hub it is in the cache: {cached[-1].parent}"
    return f"; if that is the name of a model on Hugging Face's hub, `hf download {path}` fetches it and prints its folder"


def base_folder(path: Path) -> Path:
    """The folder that a checkpoint's weights are in: of a LoRA adapter alone, the one that it names
    as its base's.
    """
    file = path / "adapter_config.json"
    if not file.is_file() or (path / "config.json").exists():
        return path
    named = read_json(file).get("base_model_name_or_path")
    is_name = isinstance(named, str) and 0 < len(named) < 250 and named.isprintable()
    for base in [Path(named), path.parent / named] if is_name else []:
        if (base / "config.json").is_file():
            return base
    hint = hub_hint(Path(named)) if is_name else ""
    raise UsageError(
        f"{path}: a LoRA adapter, and its base is no folder here: {str(named)[:250]!r}{hint}; put its folder into "
        "base_model_name_or_path of adapter_config.json"
    )


def digest(path: str | Path) -> str:
    """A hash of a file's content, by which another file under the same name is noticed."""
    found = hashlib.blake2b(digest_size=16)
    with open(check_regular(path), "rb") as file:
        while block := file.read(2**22):
            found.update(block)
    return found.hexdigest()


# --------------------------------------------------------------------------------------------------
# Writing


@contextmanager
def replacing(path: str | Path, temporary: Path | None = None) -> Iterator[Path]:
    """Where to write a file or folder that takes its place all at once; nothing of it is left if
    that fails.
    """
    path = Path(path)
    temporary = temporary or path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_lines(path: Path, records: Iterable[dict]) -> Path:
    """Records as JSON lines, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def check_output(flag: str, path: Path, kind: str, is_ours: Callable[[bytes], bool]) -> None:
    """UsageError unless a file can be written there and nothing is lost by it: what is there has to
    be of the same kind.

    `is_ours` is asked about the first 64 kB of a file that is there.
    """
    if not path.parent.is_dir():
        raise UsageError(f"{flag} {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"{flag} {path}: the folder {path.parent} is read-only")
    if path.is_symlink():
        raise UsageError(f"{flag} {path}: a symbolic link; name the file itself")
    if not path.exists():
        return
    if not path.is_file():
        raise UsageError(
            f"{flag} {path}: {'a folder' if path.is_dir() else 'no regular file'}; name a file"
        )
    with open(path, "rb") as file:
        if not is_ours(file.read(2**16)):
            raise UsageError(f"{flag} {path}: exists, and is no {kind}; choose another name")
