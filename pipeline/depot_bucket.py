"""A static registry below a prefix of an S3 bucket.

S3 shows an object when all of it is there. The index is replaced only where it is still the one that was read
(conditional writes, by ETag), and while somebody sweeps there is a note of that, for want of locks.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
import random
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pipeline.depot import Change, Entry, blocks, other_bytes
from pipeline.errors import ReleaseError, UnavailableError, first_line

Result = TypeVar("Result")
_ONE_PUT = 32 << 20  # larger files go up in parts, and are not held in memory
_PART, _PARTS_AT_ONCE = 16 << 20, 4  # but for these
_TRIES = 200  # at one index, against other writers
_SWEEP = ".sweep.json"
_SWEEP_S = 900.0  # how long a sweep may take; an older note was left by one that was killed
_OTHERS_WON = {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}
_DELETED_AT_ONCE = 1000

log = logging.getLogger("pipeline.depot_bucket")


class _LostError(Exception):
    """Somebody else has written the object since it was read."""


@dataclass(frozen=True)
class BucketDepot:
    """See the module. `files` is an ``s3fs.S3FileSystem``; `root` is ``bucket/prefix``."""

    files: Any
    root: str

    @property
    def name(self) -> str:
        """See `Depot`."""
        return f"s3://{self.root}"

    def read(self, name: str) -> bytes | None:
        """See `Depot`."""
        return self._get(name)[0]

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """See `Depot`."""
        wanted = set(names)
        folders = {name.rpartition("/")[0] for name in wanted}
        return {one.name: one.size_bytes for folder in folders for one in self.entries(folder) if one.name in wanted}

    def put(self, name: str, data: bytes) -> None:
        """See `Depot`."""
        self._asked(lambda: self._put(name, data))

    def put_file(self, name: str, source: Path, sha256: str) -> None:
        """See `Depot`."""
        before = _state(source)
        if before[0] <= _ONE_PUT:
            data = b"".join(bytes(block) for block in blocks(source))
            if hashlib.sha256(data).hexdigest() != sha256:
                raise other_bytes(source)
            self.put(name, data)
            return
        hashed = hashlib.sha256()
        for block in blocks(source):
            hashed.update(block)
        if hashed.hexdigest() != sha256:
            raise other_bytes(source)
        side = f"{self._key(name)}.{uuid.uuid4().hex}.part"  # until it is known that nobody has changed the file
        kept = {
            "CacheControl": _caching(name),
            "chunksize": max(_PART, before[0] // 9000),
            "max_concurrency": _PARTS_AT_ONCE,
        }
        self._asked(lambda: self.files.put_file(str(source), f"{self._bucket}/{side}", **kept))
        try:
            if _state(source) != before:
                raise other_bytes(source)
            self._asked(lambda: self.files.copy(f"{self._bucket}/{side}", f"{self.root}/{name}"))
        finally:
            self._asked(lambda: self._call("delete_object", Key=side))

    def digest(self, name: str) -> str | None:
        """See `Depot`."""

        def work() -> str | None:
            hashed = hashlib.sha256()
            try:
                self.files.invalidate_cache()
                with self.files.open(f"{self.root}/{name}", "rb") as stream:
                    while block := stream.read(1 << 20):
                        hashed.update(block)
            except FileNotFoundError:
                return None
            return hashed.hexdigest()

        return self._asked(work)

    def change(self, name: str, work: Change) -> None:
        """See `Depot`."""
        for turn in range(_TRIES):
            data, tag = self._get(name)
            made = work(data)
            if made is None:
                return
            condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
            with contextlib.suppress(_LostError):
                self._asked(partial(self._put, name, made, **condition))
                return
            time.sleep(random.uniform(0, min(2.0, 0.02 * 2**turn)))  # noqa: S311  so that writers don't keep step
        raise UnavailableError(
            f"`{self.name}/{name}` is changed by others all the time", hint="run this again when fewer publish"
        )

    def folders(self) -> list[str]:
        """See `Depot`."""
        return sorted(name.rstrip("/") for name, one in self._listed("") if not one)

    def entries(self, folder: str) -> list[Entry]:
        """See `Depot`."""
        now = datetime.now(UTC)
        return [
            Entry(name, int(one["Size"]), (now - one["LastModified"]).total_seconds())
            for name, one in self._listed(f"{folder}/")
            if one
        ]

    def remove(self, names: Iterable[str]) -> None:
        """See `Depot`."""
        left = [{"Key": self._key(name)} for name in names]
        while left:
            some, left = left[:_DELETED_AT_ONCE], left[_DELETED_AT_ONCE:]
            answer = self._asked(partial(self._call, "delete_objects", Delete={"Objects": some, "Quiet": True}))
            for fault in answer.get("Errors", []):
                raise self._away(f"{fault.get('Code')}: {fault.get('Message')} ({fault.get('Key')})")

    @contextlib.contextmanager
    def sweeping(self, recipe: str) -> Iterator[None]:
        """See `Depot`."""
        name = f"{recipe}/{_SWEEP}"
        self.after_sweep(recipe)
        try:
            self._asked(lambda: self._put(name, b"{}\n", IfNoneMatch="*"))
        except _LostError:
            raise UnavailableError("somebody else sweeps this registry", hint="run this again in a minute") from None
        try:
            yield
        finally:
            self.remove([name])

    def after_sweep(self, recipe: str) -> None:
        """See `Depot`."""
        name, said = f"{recipe}/{_SWEEP}", False
        while True:
            found = [one for one in self.entries(recipe) if one.name == name]
            if not found:
                return
            if found[0].age_s > _SWEEP_S:
                self.remove([name])
                return
            if not said:
                log.warning("somebody sweeps `%s/%s`; waiting for its end", self.name, recipe)
                said = True
            time.sleep(1)

    # --- S3 ----------------------------------------------------------------------------------------------------------

    @property
    def _bucket(self) -> str:
        return self.root.partition("/")[0]

    def _key(self, name: str) -> str:
        return f"{self.root.partition('/')[2]}/{name}".lstrip("/")

    def _call(self, method: str, **options: Any) -> Any:
        return self.files.call_s3(method, Bucket=self._bucket, **options)

    def _get(self, name: str) -> tuple[bytes | None, str | None]:
        """An object's content and ETag, both None where there is none."""
        from fsspec.asyn import sync

        async def read() -> tuple[bytes, str]:
            answer = await self.files._call_s3("get_object", Bucket=self._bucket, Key=self._key(name))
            async with answer["Body"] as body:
                return await body.read(), answer["ETag"]

        def work() -> tuple[bytes | None, str | None]:
            try:
                found: tuple[bytes, str] = sync(self.files.loop, read)
            except FileNotFoundError:
                self._check_there()
                return None, None
            return found

        return self._asked(work)

    def _put(self, name: str, data: bytes, **condition: str) -> None:
        # S3 compares the checksum, and refuses what has been damaged on the way
        checksum = base64.b64encode(hashlib.sha256(data).digest()).decode()
        kind = "application/json" if name.endswith(".json") else "application/octet-stream"
        self._call(
            "put_object",
            Key=self._key(name),
            Body=data,
            ChecksumSHA256=checksum,
            ContentType=kind,
            CacheControl=_caching(name),
            **condition,
        )

    def _listed(self, below: str) -> list[tuple[str, dict[str, Any]]]:
        """Names of the objects directly in a folder with what S3 tells of them, and of its folders with nothing."""
        front, found = self._key(below), []
        options: dict[str, str] = {"Prefix": front, "Delimiter": "/"}
        skip = len(self._key("x")) - 1
        while True:
            answer = self._asked(lambda: self._call("list_objects_v2", **options))
            found += [(one["Key"][skip:], one) for one in answer.get("Contents", [])]
            found += [(one["Prefix"][skip:], {}) for one in answer.get("CommonPrefixes", [])]
            if not answer.get("IsTruncated"):
                return found
            options["ContinuationToken"] = answer["NextContinuationToken"]

    def _check_there(self) -> None:
        """A bucket that isn't there is no empty registry."""
        try:
            self._call("head_bucket")
        except FileNotFoundError:
            raise self._away("there is no such bucket") from None

    def _asked(self, work: Callable[[], Result]) -> Result:
        try:
            return work()
        except (UnavailableError, ReleaseError, _LostError):
            raise
        except Exception as error:  # s3fs, botocore and aiohttp have failures of their own
            cause = getattr(error.__cause__, "response", None) or {}
            if str(cause.get("Error", {}).get("Code")) in _OTHERS_WON:
                raise _LostError from error
            raise self._away(f"{type(error).__name__}: {first_line(error)}") from error

    def _away(self, why: str) -> UnavailableError:
        return UnavailableError(
            f"the registry `{self.name}` can't be used: {why}",
            hint="see that the bucket can be reached from here, and that you may write to it",
        )


def _caching(name: str) -> str:
    """What caches between here and a device may do: bytes under their digest never change, all else may."""
    return "public, max-age=31536000, immutable" if "/blobs/" in name else "no-cache"


def _state(source: Path) -> tuple[int, int]:
    try:
        found = source.stat()
    except OSError as error:
        raise ReleaseError(f"can't read `{source}`: {error.strerror}") from error
    return found.st_size, found.st_mtime_ns
