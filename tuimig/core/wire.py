"""Control messages between a source and a destination: their types, and the frames that carry them.

A frame is a header (magic, protocol version, flags, length) and one msgpack document. What comes from the other side is
untrusted: lengths are bounded before anything is read, memory grows only as bytes arrive, types are strict.
"""

from __future__ import annotations

import struct
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from tuimig.core.errors import ProtocolError
from tuimig.core.manifest import Strict
from tuimig.core.model import PAGE

VERSION: Final = 3
MAGIC: Final = b"TMIG"
HEADER: Final = struct.Struct("<4sHHI")  # magic, version, zero, length of the body
SMALL: Final = 4 << 20  # the most that any message but an Image may have
EARLY_SPARE: Final = 1 << 16  # pages
LARGE: Final = 320 << 20  # an Image: the manifest and the lists of pages

Short = Annotated[str, Meta(max_length=4096)]
Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class Message(Strict, frozen=True, tag=True):
    """Base of all."""


class Fact(Strict, frozen=True):
    """An Obstacle on its way."""

    name: Short
    where: Short
    why: Short
    cure: Short
    asks: bool = False


class Trouble(Strict, frozen=True):
    """A TuimigError on its way. `kind` is its class."""

    kind: Short
    what: Short
    subject: Short = ""
    syscall: Short = ""
    errno: int = 0
    cure: Short = ""
    obstacles: Annotated[tuple[Fact, ...], Meta(max_length=1000)] = ()


class Settings(Strict, frozen=True):
    """What the destination is to do; a part of Options."""

    verb: str  # clone | move
    map_ports: list[tuple[int, int]]
    map_paths: list[tuple[str, str]]
    pid_namespace: str
    tcp: str
    stdio: str
    full: bool
    yes: bool
    on_loss: str  # kill | poison
    reconnect_s: Annotated[float, Meta(ge=0, le=86400)]


class NeededFile(Strict, frozen=True):
    path: Short
    size: int  # -1: any
    mtime_ns: int  # -1: any
    build_id: Short  # "": none is known
    writable: bool
    directory: bool = False


class Needs(Strict, frozen=True):
    """What a process needs at its destination, found before anything is stopped."""

    arch: Short
    page_size: int
    kernel: Short
    cpu_flags: list[Short]
    vdso: list[tuple[str, int]]  # name and size of each region that the kernel provides
    memory: Count  # bytes resident
    pid: int
    command: Short
    files: Annotated[list[NeededFile], Meta(max_length=100_000)]
    ports: Annotated[list[tuple[str, int, str]], Meta(max_length=10_000)]  # family, port, address; after --map-port
    encoding: str


# ---------------------------------------------------------------- from the source


class Open(Message, frozen=True, tag="open"):
    """The first frame of every connection. `session` is the secret by which later connections join."""

    session: Annotated[str, Meta(min_length=32, max_length=64, pattern="^[0-9a-f]+$")]
    kind: str  # control | demand | pages
    first: bool  # a new session begins
    epoch: int
    tuimig: Short


class Hello(Message, frozen=True, tag="hello"):
    needs: Needs
    settings: Settings


class Precopy(Message, frozen=True, tag="precopy"):
    """Pages come before T0, at places below `pages`, at most `most` different ones."""

    epoch: int
    pages: Annotated[int, Meta(ge=1, le=1 << 36)]
    most: Count


class Sketch(Message, frozen=True, tag="sketch"):
    """What the process looks like before T0, so that a place for it can be made: an Outline of the manifest.

    `at_ns`: the destination's CLOCK_MONOTONIC when the outline's clocks were read, as far as the source can tell.
    """

    epoch: int
    outline: bytes
    at_ns: int


class Image(Message, frozen=True, tag="image"):
    """T0: everything but the protected pages. `go`: it may run as soon as it is built.

    `kept`: expected pages that came before T0 and are valid.
    """

    epoch: int
    manifest: bytes
    expected: bytes
    urgent: bytes
    go: bool
    kept: bytes = b""


class Abandon(Message, frozen=True, tag="abandon"):
    """This attempt is over; what was built of it is to be ended."""

    epoch: int
    why: Short


class Go(Message, frozen=True, tag="go"):
    """It may run. Of a move this is the hand-over."""

    epoch: int


class End(Message, frozen=True, tag="end"):
    """All is done on the source's side."""


# ---------------------------------------------------------------- from the destination


class Answer(Message, frozen=True, tag="answer"):
    """To Hello: everything that stands in the way, at once."""

    tuimig: Short
    kernel: Short
    host: Short
    obstacles: Annotated[list[Fact], Meta(max_length=1000)]
    privilege: bool  # one of them is a missing privilege or kernel feature


class Built(Message, frozen=True, tag="built"):
    """Only the last step is left."""

    epoch: int


class Running(Message, frozen=True, tag="running"):
    epoch: int
    pid: int
    inner_pid: int
    init_pid: int  # 0: none
    first_ns: int  # its first instruction, CLOCK_MONOTONIC there
    warnings: Annotated[list[Short], Meta(max_length=1000)]
    early: bool = False  # its skeleton was there before T0


class Figures(Strict, frozen=True):
    """The destination's counters, pages of 4 KiB, and its histograms of powers of two nanoseconds."""

    phase: str
    pages: int = 0
    filled: int = 0
    arrived: int = 0
    demand_faults: int = 0
    faults: Annotated[tuple[int, ...], Meta(max_length=64)] = ()  # service times of demand faults
    faults_most_ns: int = 0
    trips: Annotated[tuple[int, ...], Meta(max_length=64)] = ()  # asked to arrived
    trips_most_ns: int = 0
    faults_dropped: int = 0


class Status(Message, frozen=True, tag="status"):
    figures: Figures
    records: Annotated[bytes, Meta(max_length=1 << 20)] = b""  # fault records, as model.Faults holds them


class Filled(Message, frozen=True, tag="filled"):
    """Every page is in. The copy needs nobody any more."""

    epoch: int
    fill_us: int
    figures: Figures


class Joined(Message, frozen=True, tag="joined"):
    """So many page streams of this attempt have come to the session."""

    epoch: int
    streams: int


class State(Message, frozen=True, tag="state"):
    """After a new control connection: where the destination is."""

    epoch: int  # 0: it has no image
    phase: str  # waiting | precopy | arriving | built | running | filled
    present: bytes
    running: Running | None
    filled: Filled | None


class Failed(Message, frozen=True, tag="failed"):
    """The copy could not be built or kept; it is not there any more. `ran`: it had run."""

    epoch: int
    trouble: Trouble
    ran: bool


# ---------------------------------------------------------------- both


class Clock(Message, frozen=True, tag="clock"):
    """Asked by the source, answered at once: CLOCK_MONOTONIC of whoever says it."""

    ns: int


class Beat(Message, frozen=True, tag="beat"):
    """A sign of life."""


FromSource = Open | Hello | Precopy | Sketch | Image | Abandon | Go | End
FromDestination = Answer | Joined | Built | Running | Status | Filled | State | Failed
Any = FromSource | FromDestination | Clock | Beat
_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(Any)


def early_most(memory: int) -> int:
    """Pages that a destination takes before T0 of a process that has so many bytes: it may grow meanwhile."""
    return 2 * memory // PAGE + EARLY_SPARE


def frame(message: Message) -> bytes:
    body = _ENCODER.encode(message)
    return HEADER.pack(MAGIC, VERSION, 0, len(body)) + body


class Frames:
    """Cuts what arrives into messages. `large`: this side takes Images."""

    def __init__(self, *, large: bool) -> None:
        self._most = LARGE if large else SMALL
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """The messages that are whole by now. ProtocolError for what is none of ours."""
        self._buffer += data
        found: list[Message] = []
        while len(self._buffer) >= HEADER.size:
            magic, version, zero, length = HEADER.unpack_from(self._buffer)
            if magic != MAGIC:
                raise ProtocolError(
                    "what answers does not speak tuimig's protocol",
                    cure="Look whether the remote command prints something of its own (a login script's words)",
                )
            if version != VERSION:
                raise ProtocolError(
                    f"the other side speaks protocol {version}, this one {VERSION}",
                    cure="Install the same version of tuimig on both hosts",
                )
            if zero or length > self._most:
                raise ProtocolError(f"a message of {length} bytes is larger than any may be")
            if len(self._buffer) < HEADER.size + length:
                break
            body = memoryview(self._buffer)[HEADER.size : HEADER.size + length]
            try:
                found.append(_decode(body))
            finally:
                body.release()
            del self._buffer[: HEADER.size + length]
        return found

    @property
    def rest(self) -> bytes:
        """What came after the last whole message."""
        return bytes(self._buffer)


def _decode(body: memoryview) -> Message:
    try:
        message: Message = _DECODER.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"a message of the other side is malformed: {error}") from None
    if not isinstance(message, (Image, Sketch)) and len(body) > SMALL:
        raise ProtocolError(f"a message of {len(body)} bytes is larger than its kind may be")
    return message
