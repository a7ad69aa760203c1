"""Downloads that are encrypted all the way, of a known hash, and whole or absent."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
)

from vision_ssm._version import __version__
from vision_ssm.engine.checkpoint import make_writable, publish

__all__ = ["DownloadError", "cache_folder", "download"]

LIMIT = 4 << 30
"""Bytes that no checkpoint of a card exceeds."""

BLOCK = 1 << 20
PATIENCE = 60.0  # seconds without a byte


class DownloadError(OSError):
    """A file could not be fetched, or is not what it should be; nothing is left of it."""


class EncryptedRedirects(HTTPRedirectHandler):
    """Follows the server from https to https alone."""

    def redirect_request(
        self, request: Request, file: Any, code: int, message: str, headers: Any, address: str
    ) -> Request | None:
        require_https(address, f"{request.full_url} leads to it")
        return super().redirect_request(request, file, code, message, headers, address)


def cache_folder() -> Path:
    """Where fetched files of this user are kept: ``vision_ssm`` in XDG_CACHE_HOME, or in ~/.cache."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "vision_ssm"


def download(
    url: str,
    target: Path,
    *,
    sha256: str,
    limit: int = LIMIT,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> None:
    """Fetches a file; it appears under its name when it is complete, on the disk, and has the hash.

    Args:
        url: an https address; so must be all that it leads to.
        target: file to write, replaced if it exists; its folder is made.
        sha256: 64 hexadecimal digits.
        limit: largest size accepted, in bytes.
        progress: called with the bytes fetched and, if the server says so, all of them.

    Raises:
        ValueError: ``sha256`` is none.
        DownloadError: an address that is not https, no answer, an error of the server, another size or hash.
        PermissionError: the folder cannot be written.
    """
    require_https(url, "it is what was asked for")
    require_sha256(sha256)
    make_writable(target.parent)
    descriptor, name = tempfile.mkstemp(prefix=".partial-", dir=target.parent)  # its own: others may fetch it as well
    partial = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            found = receive(url, file.write, limit, progress)
            file.flush()
            os.fsync(file.fileno())
        if found != sha256.lower():
            raise DownloadError(
                f"{url} has the SHA-256 {found}, not {sha256.lower()}; nothing of it is kept. It may have been damaged "
                "on its way, replaced by its publisher, or tampered with"
            )
        publish(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def receive(url: str, write: Callable[[bytes], object], limit: int, progress: Callable[[int, int | None], None]) -> str:
    """Writes what the server sends, block by block; returns its SHA-256."""
    digest = hashlib.sha256()
    done = 0
    try:
        request = Request(url, headers={"User-Agent": f"vision_ssm/{__version__}"})
        with encrypted().open(request, timeout=PATIENCE) as answer:
            stated = answer.headers.get("Content-Length", "")
            total = int(stated) if stated.isdecimal() else None
            if total is not None and total > limit:
                raise DownloadError(f"{url} has {total} bytes, more than the {limit} that are accepted")
            while block := answer.read(BLOCK):
                done += len(block)
                if done > limit:
                    raise DownloadError(f"{url} sends more than the {limit} bytes that are accepted")
                digest.update(block)
                write(block)
                progress(done, total)
    except HTTPError as error:
        raise DownloadError(f"{url}: the server answers {error.code} {error.reason}") from error
    except URLError as error:
        raise DownloadError(f"{url} cannot be reached: {error.reason}") from error
    except (HTTPException, TimeoutError, ConnectionError) as error:
        raise DownloadError(f"{url} broke off after {done} bytes: {error or type(error).__name__}") from error
    if total is not None and done != total:
        raise DownloadError(f"{url} broke off after {done} of {total} bytes; try again")
    return digest.hexdigest()


def encrypted() -> OpenerDirector:
    """An opener that knows https and nothing else: neither http nor ftp, nor files of this machine."""
    opener = OpenerDirector()
    for handler in (
        ProxyHandler(),
        HTTPSHandler(),
        EncryptedRedirects(),
        HTTPDefaultErrorHandler(),
        HTTPErrorProcessor(),
        UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def require_https(url: str, why: str) -> None:
    if urlsplit(url).scheme != "https" or not urlsplit(url).hostname:
        raise DownloadError(f"{url} is not an https address ({why}); others can be read and changed on their way")


def require_sha256(text: str) -> None:
    if len(text) != 64 or not set(text.lower()) <= set("0123456789abcdef"):
        raise ValueError(f"a SHA-256 has 64 hexadecimal digits; got {text!r}")
