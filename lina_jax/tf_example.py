"""Parse serialized tf.train.Example messages, as far as TFDS uses the format, without copying values.

Example {1: Features {1: entry {1: name, 2: Feature {1: BytesList {1: bytes} | 3: Int64List {1: packed varints}}}}}.
Protobuf's own parser copies each value twice, text features of 0.3 MB included, and holds the GIL meanwhile.
"""

_FIRST, _SECOND = 0x0A, 0x12  # tags of fields 1 and 2, length-delimited
_BYTES, _INTEGERS = 0x0A, 0x1A


def parse(record: bytes) -> dict[str, memoryview | int | None]:
    """Fields of one value each: a view of its bytes, or an integer; None if the list is empty.

    Raises ValueError if the bytes are not such a message.
    """
    view = memoryview(record)
    fields = {}
    try:
        at, end = _delimited(record, 0, len(record), _FIRST)
        if end != len(record):
            raise ValueError("extra bytes after its end")
        while at < end:
            entry, at = _delimited(record, at, end, _FIRST)
            name, name_end = _delimited(record, entry, at, _FIRST)
            fields[str(view[name:name_end], "utf-8")] = _value(view, record, *_delimited(record, name_end, at, _SECOND))
    except (IndexError, ValueError) as error:
        raise ValueError(f"not a tf.train.Example: {error}") from None
    return fields


def _value(view: memoryview, record: bytes, at: int, end: int) -> memoryview | int | None:
    if at == end:
        return None
    kind = record[at]
    if kind not in (_BYTES, _INTEGERS):
        raise ValueError(f"a field of kind {kind:#x}")
    at, end = _delimited(record, at, end, kind)
    if at == end:
        return None
    at, end = _delimited(record, at, end, _FIRST)
    if kind == _BYTES:
        return view[at:end]
    integer, _ = _varint(record, at)
    return integer - (1 << 64) if integer >= 1 << 63 else integer


def _delimited(record: bytes, at: int, limit: int, tag: int) -> tuple[int, int]:
    """(start, end) of the contents of the length-delimited field at `at`, which must have `tag` and end by `limit`."""
    if record[at] != tag:
        raise ValueError(f"tag {record[at]:#x} instead of {tag:#x}")
    length = record[at + 1]
    if length < 0x80:
        at += 2
    else:
        length, at = _varint(record, at + 1)
    if at + length > limit:
        raise ValueError("it ends early")
    return at, at + length


def _varint(record: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = record[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
