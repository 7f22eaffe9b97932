"""The three files of a snapshot and the form of `manifest.json`, shared by the writing and the reading side.

The manifest is wrapped with a checksum of its own bytes: `{"blake2b":"<hex>","manifest":{...}}`, with no spaces, so
that any changed byte of the file shows.
"""

from __future__ import annotations

import hashlib

import msgspec

MANIFEST = "manifest.json"
PAGES = "pages"
SUMS = "sums"
UNFINISHED = "manifest.json.part"  # the manifest until it is renamed: the instant at which a snapshot is complete
FILES = (MANIFEST, PAGES, SUMS, UNFINISHED)

DIRECTORY_MODE = 0o700
FILE_MODE = 0o600
MANIFEST_LIMIT = 256 << 20  # bytes; a process of 100,000 regions and 10,000 threads stays below


class Wrapper(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `manifest.json` holds."""

    blake2b: str
    manifest: msgspec.Raw


def wrap(manifest: bytes) -> bytes:
    return msgspec.json.encode(Wrapper(checksum(manifest), msgspec.Raw(manifest)))


def checksum(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
