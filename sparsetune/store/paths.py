"""The files of a sweep, in a folder or on `s3://bucket/path`, and patience while they are away.

The rule to know: everything takes a `pathlib.Path`, which `place` makes of what a user wrote. Of a
URL it makes an `S3Path`: /bucket/key with those methods of Path that sweeps need. An object is
written whole or not at all; there are no folders, only names that begin alike.

pyarrow's file system rather than s3fs, which asks for botocore, whose python-dateutil is older than
the one that everything else here runs with: pyarrow is there, ray.tune has imported it anyway, and
an object is put by one request. obstore could put on a condition, which locks would like, but knows
no AWS profiles (github.com/developmentseed/obstore/issues/571).
"""

from __future__ import annotations

import functools
import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PosixPath
from typing import IO, Any, Self, TypeVar

T = TypeVar("T")
Trouble = Callable[[OSError, float], None]
SCHEME = "s3://"
AWAY_SECONDS = 300.0  # how long a sweep waits for its storage
CONNECT_SECONDS = 5.0


class CheckpointLost(ValueError):
    """A checkpoint that a journal speaks of is not there."""


class StorageAway(OSError):
    """Storage that cannot be read or written; says which, why and what to do."""


def place(text: str | Path) -> Path:
    """The path of a local folder or of an `s3://` URL; a path as it is."""
    if isinstance(text, Path):
        return text
    return S3Path("/" + text.removeprefix(SCHEME)) if text.startswith(SCHEME) else Path(text)


def why(error: OSError) -> str:
    """pyarrow's errors have no `strerror`."""
    return error.strerror or str(error).partition(" (Request ID")[0]


@functools.cache
def _s3(bucket: str) -> Any:
    try:
        from pyarrow import fs

        make = fs.S3FileSystem
    except (ImportError, AttributeError) as error:
        raise ValueError(
            "storage: this pyarrow was built without S3; get the one of PyPI by: pip install "
            "--force-reinstall --no-deps pyarrow"
        ) from error
    env = os.environ
    endpoint = env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL") or None
    region = env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION")
    if not region:
        region = "us-east-1" if endpoint else fs.resolve_s3_region(bucket)
    return make(
        region=region,
        endpoint_override=endpoint,
        connect_timeout=CONNECT_SECONDS,
        allow_delayed_open=True,  # one request for an object of up to 5 MB instead of three
        background_writes=False,
    )


class S3Path(PosixPath):
    """`s3://bucket/key`. Whatever of Path is not here goes to `stat` or `open`, and fails."""

    def __str__(self) -> str:
        return "s3:/" + super().__str__()

    @property
    def _key(self) -> str:
        return "/".join(self.parts[1:])

    @contextmanager
    def _client(self) -> Iterator[Any]:
        try:
            yield _s3(self.parts[1] if len(self.parts) > 1 else "")
        except StorageAway:
            raise
        except OSError as error:
            # Deleted after it was opened and before it was read, it is no FileNotFoundError yet.
            absent = any(code in str(error) for code in ("NO_SUCH_KEY", "RESOURCE_NOT_FOUND"))
            if absent or isinstance(error, FileNotFoundError):
                raise FileNotFoundError(2, "no such object", str(self)) from error
            raise StorageAway(f"{self}: {why(error)}") from error

    def exists(self) -> bool:
        with self._client() as s3:
            return s3.get_file_info(self._key).type.name != "NotFound"

    def is_dir(self) -> bool:
        with self._client() as s3:
            return s3.get_file_info(self._key).type.name == "Directory"

    def iterdir(self) -> Iterator[Self]:  # type: ignore[override]
        from pyarrow.fs import FileSelector

        with self._client() as s3:
            found = s3.get_file_info(FileSelector(self._key, allow_not_found=True))
        return (self / info.base_name for info in found)

    def read_bytes(self) -> bytes:
        with self._client() as s3, s3.open_input_stream(self._key) as stream:
            return bytes(stream.read())

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8")

    def open(self, mode: str = "r", *_: Any, **__: Any) -> Any:  # type: ignore[override]
        """For reading alone; `write_whole` writes."""
        assert mode in ("r", "rb"), mode
        return io.BytesIO(self.read_bytes()) if "b" in mode else io.StringIO(self.read_text())

    def write_bytes(self, data: Any) -> int:
        with self._client() as s3:
            stream = s3.open_output_stream(self._key)
            stream.write(data)
            stream.close()
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, *_: Any, **__: Any) -> int:
        return self.write_bytes(data.encode(encoding or "utf-8"))

    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:
        self.write_bytes(b"")

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            with self._client() as s3:
                s3.delete_file(self._key)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: an object needs no folder."""

    def rmtree(self) -> None:
        with self._client() as s3:
            s3.delete_dir(self._key)

    def resolve(self, strict: bool = False) -> Self:
        return self

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        raise AssertionError(f"{self} is no local file")


@contextmanager
def write_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which is at `path` after the `with`: whole and durable, or not at all."""
    if isinstance(path, S3Path):
        memory = io.BytesIO()
        yield memory
        path.write_bytes(memory.getvalue())
        return
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with scratch.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def give_up(error: OSError, waited: float) -> None:
    """The `trouble` of who does not wait."""
    raise error


def give_up_later(error: OSError, waited: float) -> None:
    """The `trouble` of who waits and has nobody to tell."""
    if waited > AWAY_SECONDS:
        raise error


def insist(action: Callable[[], T], trouble: Trouble = give_up_later) -> T:
    """Does `action` again until it raises no OSError, with longer and longer pauses.

    Each one is told to `trouble`, with the seconds since the first; it may raise, which ends it.
    """
    began, pause = None, 0.25
    while True:
        try:
            return action()
        except OSError as error:
            began = began or time.monotonic()
            trouble(error, time.monotonic() - began if pause > 0.25 else 0.0)
        time.sleep(pause)
        pause = min(2 * pause, 5.0)
