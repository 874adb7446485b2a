"""The wire format of a tf.train.Example, as far as TFDS uses it: fields without copying them.

Example {1: Features {1: entry {1: name, 2: Feature {1: BytesList {1: bytes} | 3: Int64List {1: packed varints}}}}}.
Protobuf's own parser copies each value twice, 0.3 MB of text features at a time, and holds the interpreter meanwhile.
"""

_BYTES, _INTEGERS = 0x0A, 0x1A


def parse(record: bytes) -> dict[str, memoryview | int | None]:
    """Fields of one value each: a view of its bytes, or an integer; None for a list without any.

    Raises ValueError where the bytes are something else.
    """
    view = memoryview(record)
    fields = {}
    try:
        features, end = _delimited(view, 0, 0x0A)
        if end != len(view):
            raise ValueError("bytes follow its end")
        at = 0
        while at < len(features):
            entry, at = _delimited(features, at, 0x0A)
            name, value_at = _delimited(entry, 0, 0x0A)
            feature, _ = _delimited(entry, value_at, 0x12)
            fields[str(name, "utf-8")] = _value(feature)
    except (IndexError, ValueError) as error:
        raise ValueError(f"not a tf.train.Example: {error}") from None
    return fields


def _value(feature: memoryview) -> memoryview | int | None:
    if not feature:
        return None
    kind = feature[0]
    if kind not in (_BYTES, _INTEGERS):
        raise ValueError(f"a field of kind {kind:#x}")
    values, _ = _delimited(feature, 0, kind)
    if not values:
        return None
    if kind == _BYTES:
        return _delimited(values, 0, 0x0A)[0]
    integer, _ = _varint(_delimited(values, 0, 0x0A)[0], 0)
    return integer - (1 << 64) if integer >= 1 << 63 else integer


def _delimited(view: memoryview, at: int, tag: int) -> tuple[memoryview, int]:
    """A length-delimited field at `at`, which must have this tag, and where the next one starts."""
    if view[at] != tag:
        raise ValueError(f"tag {view[at]:#x} where {tag:#x} belongs")
    length, at = _varint(view, at + 1)
    if at + length > len(view):
        raise ValueError("it ends early")
    return view[at : at + length], at + length


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
