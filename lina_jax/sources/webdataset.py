"""WebDataset tar shards: consecutive members KEY.EXTENSION make one sample."""

import contextlib
import io
import json
import lzma
import posixpath
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from lina_jax.errors import first_line
from lina_jax.sources import base
from lina_jax.sources.base import Example, Fields, Reject, Unit

_BLOCK = tarfile.BLOCKSIZE
_UNREADABLE = (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError)  # ValueError: sparse files


class _File(io.FileIO):
    """A file that remembers how it failed: `tarfile.open` takes a failed read for a wrong type of compression."""

    failure: OSError | None = None

    def readinto(self, buffer) -> int | None:
        try:
            return super().readinto(buffer)
        except OSError as error:
            self.failure = error
            raise


class _Sample(NamedTuple):
    key: str
    members: dict[str, tarfile.TarInfo]  # by extension
    problem: str = ""


class WebDatasetSource:
    """Samples of the tar files that match `pattern`, keyed `FILE:KEY`; one unit is one file.

    Fields are extensions (`txt`, `cls`) or entries of a JSON object (`json.short`); the image is the first member with
    the extension of an image. A damaged header costs only its sample: reading continues with the next one. Raises
    UserError if no file matches.
    """

    label_names = ()

    def __init__(self, pattern: str, fields: Fields, unit_items: int):
        del unit_items  # the number of samples is known only when a file is read
        self.name = pattern
        self._fields = fields
        files = base.find_files(pattern)
        self._short = base.relative(list(files))
        self._sizes = files
        self.contents = list(files.items())
        self.units = [Unit(path) for path in files]

    @contextlib.contextmanager
    def open(self, unit: Unit) -> Iterator[tuple[int, Iterator[Example | Reject]]]:
        name = self._short[unit.path]
        with contextlib.ExitStack() as stack:
            path = stack.enter_context(base.local_file(unit.path, self._sizes[unit.path]))
            file = None
            try:
                file = stack.enter_context(_File(path))
                # A header that cannot be read is skipped, like the zeros between concatenated archives.
                archive = stack.enter_context(tarfile.open(fileobj=io.BufferedReader(file), ignore_zeros=True))
                samples = list(_samples(archive))
            except _UNREADABLE as error:
                base.raise_if_storage((file and file.failure) or error)
                yield 1, iter([Reject(name, f"not a tar archive: {first_line(error)}")])
                return
            files = {member.name: member for sample in samples for member in sample.members.values() if member.isfile()}
            yield len(samples), (self._item(archive, f"{name}:{sample.key}", sample, files) for sample in samples)

    def _item(
        self, archive: tarfile.TarFile, key: str, sample: _Sample, files: Mapping[str, tarfile.TarInfo]
    ) -> Example | Reject:
        if sample.problem:
            return Reject(key, sample.problem)
        image = next((extension for extension in sample.members if extension in base.IMAGES), "")
        fields = self._fields._replace(image=image)
        wanted = {field.partition(".")[0] for field in fields} & sample.members.keys()
        try:
            members = {extension: _target(sample.members[extension], files) for extension in wanted}
            # In the order of the archive: a step back in a compressed one would read it again from the start.
            in_order = sorted(wanted, key=lambda extension: members[extension].offset_data)
            data = {extension: _content(archive, members[extension]) for extension in in_order}
            values = [_value(data, field) for field in fields]
        except base.Unusable as why:
            return Reject(key, *why.args)
        return base.checked(key, fields, *values)


def _samples(archive: tarfile.TarFile) -> Iterator[_Sample]:
    """The samples of an archive, in order; damage and repeated keys become samples with a problem."""
    seen: set[str] = set()
    end = count = 0

    def damage(start: int, stop: int | None) -> Iterator[_Sample]:
        try:
            archive.fileobj.seek(start)
            while (stop is None or start < stop) and (block := archive.fileobj.read(_BLOCK)):
                note = _global_note(block) if any(block) else 0
                if note is None:
                    yield _Sample(f"byte {start}", {}, "broken tar member")
                    return
                start += _BLOCK + -(-note // _BLOCK) * _BLOCK
                archive.fileobj.seek(start)
        except _UNREADABLE as error:  # a compressed archive that ends early
            base.raise_if_storage(error)
            yield _Sample(f"byte {start}", {}, "broken tar member")

    current = _Sample("", {})
    for member in _members(archive):
        gap = list(damage(end, member.offset))
        end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
        count += 1
        directory, _, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        key = f"{directory}/{stem}" if directory else stem
        linked = extension and (member.islnk() or member.issym())
        hidden = not stem or not (member.isfile() or linked)
        if gap or (key != current.key and not hidden):
            if current.members:
                yield current
            yield from gap
            current = _Sample(key, {}, "duplicate key" if key in seen else "")
            seen.add(key)
        if hidden:
            continue
        if extension.lower() in current.members:
            current = current._replace(problem="duplicate key")
        current.members[extension.lower()] = member
    if current.members:
        yield current
    if not count:
        raise tarfile.ReadError("no member found")
    yield from damage(end, None)


def _global_note(block: bytes) -> int | None:
    """Number of bytes after a global pax header, which `git archive` writes; None if the block is something else.

    `tarfile` skips these without reporting them, like the zeros between archives.
    """
    try:
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None
    return member.size if member.type == tarfile.XGLTYPE else None


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members up to the end of the file, even if that is in the middle of one."""
    try:
        yield from archive
    except _UNREADABLE as error:
        base.raise_if_storage(error)


def _target(member: tarfile.TarInfo, files: Mapping[str, tarfile.TarInfo]) -> tarfile.TarInfo:
    """The file that a member is or links to (GNU tar links files that share an inode). Raises base.Unusable."""
    if member.isfile():
        return member
    name = member.linkname
    if member.issym():
        name = posixpath.normpath(posixpath.join(posixpath.dirname(member.name), name))
    if name not in files:
        raise base.Unusable("link without a target in tar")
    return files[name]


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    try:
        return archive.extractfile(member).read()
    except _UNREADABLE as error:
        base.raise_if_storage(error)
        raise base.Unusable("truncated tar member") from None


def _value(data: dict[str, bytes], field: str) -> Any:
    """A member, or one entry of a JSON object; None if it is not there."""
    extension, _, entry = field.partition(".")
    if extension not in data or not entry:
        return data.get(extension)
    try:
        content = json.loads(data[extension])
    except (ValueError, RecursionError):  # bytes that are not UTF-8, text that is not JSON, or too many nested brackets
        raise base.Unusable(f"{extension} is not valid JSON") from None
    if not isinstance(content, dict):
        raise base.Unusable(f"{extension} is not a JSON object")
    return content.get(entry)
