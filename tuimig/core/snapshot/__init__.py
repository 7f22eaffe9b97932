"""The snapshot directory: write, commit, open, verify (design, section 5).

`manifest.json` is written last, so a directory without it is an unfinished snapshot; `pages` holds each region at its
fixed place, with holes for zero pages; `sums` holds a checksum a page. Whatever is read back is untrusted.
"""

from __future__ import annotations

from tuimig.core.snapshot.read import Snapshot, open_snapshot
from tuimig.core.snapshot.verify import Damage, VerifyResult, verify
from tuimig.core.snapshot.write import Writer

__all__ = ["Damage", "Snapshot", "VerifyResult", "Writer", "open_snapshot", "verify"]
