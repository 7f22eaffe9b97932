"""The snapshot directory: what is written is read back, and whatever was changed is found and named."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snapshots import ADDRESS, flip, manifest, places, region, rewrite, thread, write
from tuimig.core import errors
from tuimig.core.manifest import Manifest
from tuimig.core.model import PAGE
from tuimig.core.snapshot import Writer, layout, open_snapshot, verify
from tuimig.core.snapshot.sums import Sums
from tuimig.core.spool import Spool

NAMES = (layout.MANIFEST, layout.PAGES, layout.SUMS)
PROPERTY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    write(tmp_path / "s")
    return tmp_path / "s"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("original") / "s"
    write(directory)
    return directory


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return tmp_path / "copy"


def fresh(original: Path, copy: Path) -> Path:
    """A copy of the original; once for each hypothesis example, so no fixture."""
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(mode=0o700)
    for name in NAMES:
        subprocess.run(["cp", "--sparse=always", original / name, copy / name], check=True)
    return copy


def found(directory: Path) -> bool:
    """Whether opening or verifying finds something wrong; any error of another kind passes through."""
    try:
        return not verify(directory).ok
    except errors.SnapshotDamaged:
        return True


# ---------------------------------------------------------------- round trip


def test_what_was_written_is_read_back(sound: Path) -> None:
    with open_snapshot(sound) as snapshot:
        assert snapshot.manifest.process.comm == "test"
        assert [r.pages for r in snapshot.manifest.regions] == [6, 4, 2, 0]
        assert snapshot.warnings == ()
        assert snapshot.sums[3016] == 1
        assert snapshot.spool.get(13, 1) != bytes(PAGE)
        assert snapshot.spool.get(15, 1) == bytes(PAGE)
    result = verify(sound)
    assert result.ok
    assert result.pages == 12


def test_modes_and_holes(sound: Path) -> None:
    assert sound.stat().st_mode & 0o7777 == 0o700
    assert sorted(p.name for p in sound.iterdir()) == sorted(NAMES)
    for name in NAMES:
        assert (sound / name).stat().st_mode & 0o7777 == 0o600
    assert (sound / layout.PAGES).stat().st_blocks * 512 < 40 * PAGE
    assert (sound / layout.PAGES).stat().st_size > 3000 * PAGE


def test_a_copy_without_holes_is_sound(sound: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    subprocess.run(["cp", "-a", "--sparse=never", sound, dense], check=True)
    assert verify(dense).ok


def test_a_section_is_typed(sound: Path) -> None:
    class Sample(msgspec.Struct):
        n: int

    class Other(msgspec.Struct):
        n: str

    with open_snapshot(sound) as snapshot:
        assert snapshot.section("sample", Sample).n == 1
        with pytest.raises(errors.SnapshotDamaged, match="`sample` is malformed"):
            snapshot.section("sample", Other)
        with pytest.raises(errors.SnapshotDamaged, match="`other` is missing"):
            snapshot.section("other", Other)


def test_an_empty_process_state(tmp_path: Path) -> None:
    with Writer.create(tmp_path / "s") as writer:
        writer.commit(manifest([region(ADDRESS, 1, None)], 0), b"")
    assert verify(tmp_path / "s").pages == 0


def test_a_huge_sparse_region_is_cheap(tmp_path: Path) -> None:
    pages = (1 << 40) // PAGE
    with Writer.create(tmp_path / "s") as writer, Spool(writer.pages_fd, pages, writable=True) as spool:
        for page in (0, 12345678, pages - 1):
            spool.put(page, os.urandom(PAGE))
        written = writer.commit(manifest([region(ADDRESS, pages, 0)], pages * PAGE), spool.sums)
    assert written.regions[0].pages == 3
    assert (tmp_path / "s" / layout.SUMS).stat().st_blocks * 512 <= 64 << 10
    assert verify(tmp_path / "s").pages == 3


def test_other_users_are_warned_of(sound: Path) -> None:
    (sound / layout.PAGES).chmod(0o644)
    sound.chmod(0o777)
    with open_snapshot(sound) as snapshot:
        assert [("read" in w, "changed" in w) for w in snapshot.warnings] == [(False, True), (True, False)]


# ---------------------------------------------------------------- writing


def test_create_takes_an_empty_directory_and_gives_it_back(tmp_path: Path) -> None:
    target = tmp_path / "s"
    target.mkdir(mode=0o755)
    target.chmod(0o755)
    writer = Writer.create(target)
    assert target.stat().st_mode & 0o7777 == 0o700
    writer.abort()
    writer.abort()
    assert list(target.iterdir()) == []
    assert target.stat().st_mode & 0o7777 == 0o755


def test_create_refuses(tmp_path: Path, sound: Path) -> None:
    before = sorted(p.name for p in sound.iterdir())
    with pytest.raises(errors.UsageError, match="holds a snapshot already"):
        Writer.create(sound)
    assert sorted(p.name for p in sound.iterdir()) == before
    (sound / layout.MANIFEST).unlink()
    with pytest.raises(errors.UsageError, match="unfinished"):
        Writer.create(sound)
    (sound / "notes").write_text("mine")
    with pytest.raises(errors.UsageError, match="not empty"):
        Writer.create(sound)
    assert (sound / layout.PAGES).exists()
    with pytest.raises(errors.UsageError, match="missing"):
        Writer.create(tmp_path / "no" / "s")
    with pytest.raises(errors.UsageError, match="no directory"):
        Writer.create(sound / "notes")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(errors.UsageError, match="symbolic link"):
        Writer.create(tmp_path / "link")


def test_leaving_without_a_commit_leaves_nothing(tmp_path: Path) -> None:
    with Writer.create(tmp_path / "s") as writer:
        os.pwrite(writer.pages_fd, b"x", 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("room", [0, 4096, 12000])
def test_a_full_disk_leaves_nothing(tmp_path: Path, room: int) -> None:
    """RLIMIT_FSIZE stands for the disk: sums, or the manifest, cannot be written beyond `room` bytes."""
    code = f"""
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import snapshots
from tuimig.core.errors import SpoolFull
from tuimig.core.snapshot import Writer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
writer = Writer.create(Path(sys.argv[1]))
regions = [snapshots.region(snapshots.ADDRESS + i * 8192, 1, i * 4096) for i in range(100)]
resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))
try:
    writer.commit(snapshots.manifest(regions, 409600), b"\\1\\2\\3\\4" * 100)
except SpoolFull as error:
    print(error)
    raise SystemExit(7)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "s"], capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    assert "no room" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_full_filesystem(tmp_path: Path) -> None:
    """A real one, small, in a mount namespace of its own."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    code = f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import snapshots
from tuimig.core.errors import SpoolFull
from tuimig.core.snapshot import Writer
from tuimig.core.spool import Spool
place = Path(sys.argv[1])
try:
    with Writer.create(place / "s") as writer, Spool(writer.pages_fd, 1000, True) as spool:
        for page in range(1000):
            spool.put(page, os.urandom(4096))
except SpoolFull as error:
    print(error, os.listdir(place))
    raise SystemExit(7)
"""
    script = 'mount -t tmpfs -o size=1m none "$1" && exec "$2" -c "$3" "$1"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", tmp_path, sys.executable, code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 7, done.stderr
    assert os.strerror(errno.ENOSPC) in done.stdout
    assert done.stdout.endswith("[]\n")


def test_a_manifest_that_would_be_refused_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(errors.EngineError, match="overlaps"), Writer.create(tmp_path / "s") as writer:
        writer.commit(manifest([region(ADDRESS, 2, 0), region(ADDRESS + PAGE, 2, 2 * PAGE)], 4 * PAGE), bytes(16))
    assert list(tmp_path.iterdir()) == []


def test_killed_before_the_commit_is_an_unfinished_snapshot(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from tuimig.core.snapshot import Writer
Writer.create(Path(sys.argv[1]))
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "s"], check=False)
    with pytest.raises(errors.SnapshotDamaged, match="unfinished"):
        open_snapshot(tmp_path / "s")


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file(sound: Path, name: str) -> None:
    (sound / name).unlink()
    with pytest.raises(errors.SnapshotDamaged, match="unfinished" if name == layout.MANIFEST else name):
        verify(sound)


@pytest.mark.parametrize("name", NAMES)
def test_no_links_and_no_fifos(sound: Path, name: str, tmp_path: Path) -> None:
    (sound / name).rename(tmp_path / name)
    (sound / name).symlink_to(tmp_path / name)
    with pytest.raises(errors.SnapshotDamaged, match="symbolic link"):
        open_snapshot(sound)
    (sound / name).unlink()
    os.mkfifo(sound / name)
    with pytest.raises(errors.SnapshotDamaged, match="regular file"):
        open_snapshot(sound)


def test_what_is_no_snapshot(tmp_path: Path) -> None:
    with pytest.raises(errors.SnapshotDamaged, match="no snapshot"):
        open_snapshot(tmp_path)
    with pytest.raises(errors.UsageError, match="no such"):
        open_snapshot(tmp_path / "nothing")


def test_a_flipped_page_is_named(sound: Path) -> None:
    flip(sound / layout.PAGES, 2 * PAGE + 17, 1)
    flip(sound / layout.PAGES, 1500 * PAGE, 0x80)
    result = verify(sound)
    assert [(d.region, d.address, d.pages) for d in result.damage] == [
        (0, ADDRESS + 2 * PAGE, 1),
        (1, ADDRESS + (1 << 30) + 1487 * PAGE, 1),
    ]
    assert f"{ADDRESS:x}" in result.damage[0].name
    assert result.pages == 12


def test_a_lost_page_and_data_in_a_hole_are_named(sound: Path) -> None:
    fd = os.open(sound / layout.PAGES, os.O_RDWR)
    os.pwrite(fd, bytes(PAGE), 13 * PAGE)
    os.pwrite(fd, b"x", 700 * PAGE + 5)
    os.pwrite(fd, b"x", 701 * PAGE + 5)
    os.pwrite(fd, b"x", 12 * PAGE)  # between two regions
    os.close(fd)
    result = verify(sound)
    assert [(d.region, d.pages) for d in result.damage] == [(-1, 1), (1, 1), (1, 2)]
    assert "no region" in result.damage[0].name
    assert "where a zero page" in result.damage[2].why


def test_reading_a_damaged_page_fails(sound: Path) -> None:
    flip(sound / layout.PAGES, 0, 1)
    with open_snapshot(sound) as snapshot, pytest.raises(errors.SnapshotDamaged, match="page 0"):
        snapshot.spool.get(0, 1)


def test_a_changed_sum_names_its_region(sound: Path) -> None:
    flip(sound / layout.SUMS, 1400 * 4, 4)
    with pytest.raises(errors.SnapshotDamaged, match=f"{ADDRESS + (1 << 30):x}"):
        open_snapshot(sound)


def test_another_format_says_so(sound: Path) -> None:
    rewrite(sound, b'{"format":2,"new":[1]}')
    with pytest.raises(errors.SnapshotDamaged, match="format 2"):
        open_snapshot(sound)


@PROPERTY
@given(data=st.data())
def test_any_flipped_byte_is_found(original: Path, copy: Path, data: st.DataObject) -> None:
    fresh(original, copy)
    name = data.draw(st.sampled_from(NAMES))
    offset = data.draw(st.integers(0, (copy / name).stat().st_size - 1))
    flip(copy / name, offset, data.draw(st.integers(1, 255)))
    assert found(copy)


@PROPERTY
@given(data=st.data())
def test_any_cut_or_removed_byte_is_found(original: Path, copy: Path, data: st.DataObject) -> None:
    fresh(original, copy)
    path = copy / data.draw(st.sampled_from(NAMES))
    size = path.stat().st_size
    if data.draw(st.booleans()):
        os.truncate(path, data.draw(st.integers(0, size - 1)))
    else:
        content = bytearray(path.read_bytes())
        start = data.draw(st.integers(0, size - 1))
        del content[start : start + data.draw(st.integers(1, 5000))]
        path.write_bytes(content)
    assert found(copy)


@PROPERTY
@given(data=st.data())
def test_anything_appended_or_inserted_is_found(original: Path, copy: Path, data: st.DataObject) -> None:
    fresh(original, copy)
    path = copy / data.draw(st.sampled_from(NAMES))
    content = bytearray(path.read_bytes())
    at = data.draw(st.sampled_from([0, len(content), len(content) // 2]))
    content[at:at] = data.draw(st.sampled_from([b" ", b"\n", b"\0", b"{}", bytes(PAGE)]))
    path.write_bytes(content)
    assert found(copy)


# ---------------------------------------------------------------- malformed manifests with a right checksum

ODD = st.one_of(
    st.none(),
    st.integers(-(1 << 70), 1 << 70),
    st.sampled_from([0, 1, -1, PAGE, 1 << 47, 1 << 63, 1 << 64, (1 << 56) - PAGE]),
    st.text(max_size=8),
    st.sampled_from(["", "rwxp", "\0", "eager", "none", "file", "[", "QQ=="]),
    st.lists(st.none() | st.integers() | st.text(max_size=3), max_size=3),
    st.floats(),
    st.booleans(),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@PROPERTY
@given(data=st.data())
def test_a_malformed_manifest_is_an_error_of_ours(original: Path, copy: Path, data: st.DataObject) -> None:
    """It may be accepted where the changed field may have that value, but then the data is as it was."""
    fresh(original, copy)
    document = msgspec.json.decode(msgspec.json.encode(read(original)))
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(document)))
        at = document
        for step in path[:-1]:
            at = at[step]
        if data.draw(st.booleans()):
            at[path[-1]] = data.draw(ODD)
        elif isinstance(at, list):
            at.insert(0, at[path[-1]])
        else:
            del at[path[-1]]
    rewrite(copy, msgspec.json.encode(document))
    if not found(copy):
        changed = read(copy)
        assert [(r.slot, r.end - r.start, r.digest) for r in changed.regions if r.slot is not None] == [
            (r.slot, r.end - r.start, r.digest) for r in read(original).regions if r.slot is not None
        ]


@settings(PROPERTY, max_examples=60)
@given(junk=st.binary(max_size=200) | st.text().map(lambda t: t.encode("utf-8", "surrogatepass")))
def test_junk_is_an_error_of_ours(original: Path, copy: Path, junk: bytes) -> None:
    fresh(original, copy)
    (copy / layout.MANIFEST).write_bytes(junk)
    assert found(copy)
    for deep in (b"[" * 100000, b'{"format":1,"state":{"a":' + b"[" * 100000):
        (copy / layout.MANIFEST).write_bytes(deep)
        assert found(copy)


def read(directory: Path) -> Manifest:
    with open_snapshot(directory) as snapshot:
        return snapshot.manifest


A, B = ADDRESS, ADDRESS + 16 * PAGE
BAD_REGIONS = [
    ([region(A, 4, 0), region(A + 2 * PAGE, 4, 4 * PAGE)], "overlaps the region before"),
    ([region(B, 4, 0), region(A, 4, 4 * PAGE)], "out of order"),
    ([region(A, 4, 0), region(B, 4, 3 * PAGE)], "place in the pages overlaps"),
    ([region(A, 4, 6 * PAGE)], "outside of the pages"),
    ([region(A, 4, 100)], "outside of the pages"),
    ([region(A, 4, -PAGE)], "outside of the pages"),
    ([region(A + 1, 4, 0)], "page boundaries"),
    ([region(A, 0, 0)], "page boundaries"),
    ([region(-PAGE, 1, 0)], "page boundaries"),
    ([region((1 << 56) - PAGE, 1, 0)], "user space"),
    ([region(A, 1, 0, perms="rwzp")], "permissions"),
    ([region(A, 1, 0, kind="odd")], "kind 'odd'"),
    ([region(A, 1, 0, treatment="odd")], "treatment 'odd'"),
    ([region(A, 1, 0, treatment="none")], "not ours"),
    ([region(A, 1, None, pages=1)], "no place"),
    ([region(A, 1, 0, pages=2)], "2 stored pages"),
    ([region(A, 1, 0, digest="0" * 31)], "digest"),
    ([region(A, 1, 0, path="a\0b")], "path"),
    ([region(A, 1, 0, offset=7)], "offset"),
]


@pytest.mark.parametrize(("regions", "clause"), BAD_REGIONS)
def test_regions_that_make_no_sense(sound: Path, regions: list[object], clause: str) -> None:
    digest = "0" * 32
    full = [r if r.slot is None or r.digest else msgspec.structs.replace(r, digest=digest) for r in regions]  # type: ignore[attr-defined]
    rewrite(sound, manifest(full, 8 * PAGE))
    with pytest.raises(errors.SnapshotDamaged, match=clause):
        open_snapshot(sound)


@pytest.mark.parametrize(
    ("threads", "clause"),
    [
        ([], "0 threads"),
        ([thread(7), thread(7)], "two of this id"),
        ([thread(8)], "does not lead"),
        ([thread(7), thread(0)], "id is impossible"),
        ([thread(7, regs=bytes(10))], "registers"),
        ([thread(7, xstate=bytes(10))], "extended state"),
        ([thread(7, sigmask=1 << 63, pending=[b"x"])], "queued signal"),
    ],
)
def test_threads_that_make_no_sense(sound: Path, threads: list[object], clause: str) -> None:
    rewrite(sound, msgspec.structs.replace(read(sound), threads=threads))
    with pytest.raises(errors.SnapshotDamaged, match=clause):
        open_snapshot(sound)


def test_a_sum_outside_of_all_regions(sound: Path) -> None:
    changed = read(sound)
    rewrite(sound, msgspec.structs.replace(changed, regions=changed.regions[1:]))
    with pytest.raises(errors.SnapshotDamaged, match="belongs to no region"):
        open_snapshot(sound)


# ---------------------------------------------------------------- verify


def test_verify_can_be_cancelled(sound: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(errors.Cancelled):
        verify(sound, cancel=stop)


def test_verify_tells_its_progress(sound: Path) -> None:
    seen: list[tuple[int, int]] = []
    verify(sound, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (12, 12)


def test_nothing_stays_open(sound: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    flip(sound / layout.PAGES, 0, 1)
    verify(sound)
    (sound / layout.SUMS).write_bytes(b"")
    with pytest.raises(errors.SnapshotDamaged):
        open_snapshot(sound)
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 0


@given(st.lists(st.integers(0, 20000), max_size=12, unique=True), st.integers(1, 20000), st.integers(1, 9000))
@settings(deadline=None)
def test_digest_by_scan_is_digest_by_runs(used: list[int], n_pages: int, first: int) -> None:
    """What the writer finds by looking equals what the reader finds from the file's extents, whole or in pieces."""
    table = memoryview(bytearray(20001 * 4)).cast("I")
    for page in used:
        table[page] = page + 2
    last = min(first + n_pages, 20001)
    scan, whole = Sums.scan(table), Sums(table, [(0, len(table) * 4)])
    assert scan.region(first * PAGE, (last - first) * PAGE) == whole.region(first * PAGE, (last - first) * PAGE)
    assert scan.region(first * PAGE, (last - first) * PAGE)[1] == sum(first <= page < last for page in used)
    outside = sorted(page for page in used if not first <= page < last)
    assert scan.stray([(first * PAGE, last * PAGE)]) == (outside[0] if outside else None)
