"""An index of a tar archive, read strictly: damage is reported, never silently taken as the end."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

BLOCK = 512
_END = bytes(BLOCK)


class TarDamage(Exception):
    """The archive stops making sense; the message says where and how."""


@dataclass(frozen=True, slots=True)
class Member:
    """One regular file of an archive: its name there, and where its bytes are."""

    name: str
    offset: int
    size: int


class Stream(Protocol):
    """What is needed of a file, or of one that is decompressed on the way."""

    def read(self, size: int = -1, /) -> bytes: ...

    def seek(self, offset: int, /) -> int: ...


def members(file: Stream) -> Iterator[Member]:
    """Regular files in the order of the archive (ustar, GNU, pax names; links and devices are passed over).

    `file` is only read forwards, in blocks and at each member's offset, so it may be a decompressing stream;
    between two steps the caller may read the member just given. Nothing is ever extracted, so names cannot
    escape anywhere. Raises TarDamage where the archive is truncated or a header is not one.
    """
    position = 0
    given_name: str | None = None
    given_size: int | None = None
    while True:
        file.seek(position)
        block = file.read(BLOCK)
        if block == _END:
            return
        if len(block) < BLOCK:
            raise TarDamage(f"it ends at byte {position + len(block)} without the end-of-archive mark")
        if _number(block[148:156], position) != sum(block) - sum(block[148:156]) + 8 * ord(" "):
            raise TarDamage(f"the header at byte {position} has a wrong checksum")
        size = _number(block[124:136], position)
        kind = block[156:157]
        data = position + BLOCK
        if kind in b"LKxg" and kind:  # these describe the member that follows
            position = data + _padded(size)
            text = file.read(size)
            if len(text) < size:
                raise TarDamage(f"it ends inside the long header at byte {data}")
            if kind == b"L":
                given_name = _text(text)
            elif kind == b"x":
                fields = _pax(text)
                given_name = fields.get("path", given_name)
                given_size = int(fields["size"]) if fields.get("size", "").isdigit() else given_size
            continue
        if kind in b"0\0007":
            if given_size is not None:
                size = given_size
            name = given_name
            if name is None:
                name = _text(block[:100])
                if block[257:262] == b"ustar" and block[345] and block[257:265] != b"ustar  \0":
                    name = f"{_text(block[345:500])}/{name}"
            if not name.endswith("/"):
                yield Member(name, data, size)
            position = data + _padded(size)
        elif kind in b"123456":  # links, devices and folders have no data, whatever their size field says
            position = data
        else:
            position = data + _padded(size)
        given_name = given_size = None


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "replace")


def _number(field: bytes, position: int) -> int:
    if field[0] & 0x80:  # GNU: big-endian binary, for sizes of 8 GiB and more
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if not re.fullmatch(rb"[0-7]*", digits):
        raise TarDamage(f"the header at byte {position} is not one of a tar archive")
    return int(digits or b"0", 8)


def _pax(text: bytes) -> dict[str, str]:
    fields = {}
    while match := re.match(rb"(\d{1,9}) ([^=]+)=", text):
        end = int(match[1])
        if end <= match.end():
            break
        fields[match[2].decode("utf-8", "replace")] = text[match.end() : end - 1].decode("utf-8", "replace")
        text = text[end:]
    return fields
