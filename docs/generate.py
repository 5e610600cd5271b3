"""Writes docs/api.md: the services that clients call, their messages and limits, from the comments of the protos.

`--check` writes nothing and fails if the file is not current.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
TARGET = ROOT / "docs" / "api.md"
# What clients call, the most used first. What the processes say to each other is not theirs.
FILES = (
    "inference/v1/generation.proto",
    "inference/v1/embedding.proto",
    "inference/v1/tokenizer.proto",
    "inference/v1/model.proto",
    "inference/v1/load.proto",
    "common/v1/common.proto",
    "admin/v1/admin.proto",
)
_RULES_FILE = "octavo/common/v1/rules.proto"
_INTRODUCTION = """# API reference

<!-- Written by docs/generate.py from the comments in protos/; change them there. -->

The gRPC services of a gateway, and `AdminService`, which every process serves at its admin address. A running server
describes itself, too: `grpcurl -plaintext 127.0.0.1:50051 describe`. Limits are checked before anything else: a field
that breaks one is named in the `BadRequest` of an `INVALID_ARGUMENT`. The HTTP API is in [openai.md](openai.md).
"""
_LIMITS = {
    "required": "required",
    "min": "at least {}",
    "max": "at most {}",
    "max_bytes": "at most {:,} bytes",
    "min_bytes": "at least {:,} bytes",
    "max_items": "at most {:,} items",
    "min_value": "values at least {}",
    "max_value": "values at most {}",
}
_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {number: name.removeprefix("TYPE_").lower() for name, number in _Field.Type.items()}


def main(arguments: list[str]) -> None:
    """Write the file, or check it."""
    text = render(read_protos())
    if "--check" in arguments:
        if not TARGET.exists() or TARGET.read_text() != text:
            raise SystemExit(f"{TARGET} is not current: python docs/generate.py writes it anew")
        return
    TARGET.write_text(text)


def read_protos() -> descriptor_pb2.FileDescriptorSet:
    """Return the descriptors of FILES and of all that they import, with their comments."""
    with tempfile.NamedTemporaryFile(suffix=".binpb") as output:
        command = ["protoc", f"--proto_path={PROTOS}", "--include_imports", "--include_source_info"]
        command += [f"--proto_path={Path(protoc.__file__).parent / '_proto'}", f"--descriptor_set_out={output.name}"]
        if protoc.main([*command, *(f"octavo/{name}" for name in FILES)]):
            raise SystemExit("the protos cannot be compiled")
        return descriptor_pb2.FileDescriptorSet.FromString(Path(output.name).read_bytes())


def render(protos: descriptor_pb2.FileDescriptorSet) -> str:
    """Return the document."""
    pool = descriptor_pool.DescriptorPool()
    for file in protos.file:
        pool.Add(file)
    rules = pool.FindExtensionByName("octavo.common.v1.rules")
    options_class = message_factory.GetMessageClass(pool.FindMessageTypeByName("google.protobuf.FieldOptions"))
    message_factory.GetMessageClassesForFiles([_RULES_FILE], pool)
    by_name = {file.name: file for file in protos.file}
    parts = [_INTRODUCTION]
    for name in FILES:
        parts += _Page(by_name[f"octavo/{name}"], options_class, rules).lines()
    return "\n".join(parts).rstrip() + "\n"


class _Page:
    """The part of one file."""

    def __init__(self, file: descriptor_pb2.FileDescriptorProto, options_class: type, rules: object) -> None:
        self._file = file
        self._options_class = options_class
        self._rules = rules
        self._comments = {tuple(each.path): each.leading_comments for each in file.source_code_info.location}

    def lines(self) -> Iterator[str]:
        """Yield the lines."""
        yield f"## {self._file.package}: {Path(self._file.name).name}\n"
        for number, service in enumerate(self._file.service):
            yield f"### {service.name}\n\n{self._comment(6, number)}\n\n| call | |\n| --- | --- |"
            for index, method in enumerate(service.method):
                request = f"{'stream ' if method.client_streaming else ''}{_link(method.input_type)}"
                answer = f"{'stream ' if method.server_streaming else ''}{_link(method.output_type)}"
                yield f"| `{method.name}` ({request}) returns ({answer}) | {self._cell(6, number, 2, index)} |"
            yield ""
        for number, message in enumerate(self._file.message_type):
            yield from self._message(message, (4, number), "")
        for number, enum in enumerate(self._file.enum_type):
            yield from self._enum(enum, (5, number), "")

    def _message(self, message: descriptor_pb2.DescriptorProto, path: tuple[int, ...], outer: str) -> Iterator[str]:
        name = outer + message.name
        yield f"### {name}\n\n{self._comment(*path)}\n"
        if message.field:
            yield "| field | type | |\n| --- | --- | --- |"
        entries = {each.name: each for each in message.nested_type if each.options.map_entry}
        for index, field in enumerate(message.field):
            about = self._cell(*path, 2, index)
            if field.HasField("oneof_index") and not field.proto3_optional:
                about += f" One of `{message.oneof_decl[field.oneof_index].name}`."
            limits = self._limits(field)
            about += f" ({limits})" if limits else ""
            yield f"| `{field.name}` | {_type_of(field, entries)} | {about.strip()} |"
        yield ""
        for index, nested in enumerate(message.nested_type):
            if not nested.options.map_entry:
                yield from self._message(nested, (*path, 3, index), f"{name}.")
        for index, enum in enumerate(message.enum_type):
            yield from self._enum(enum, (*path, 4, index), f"{name}.")

    def _enum(self, enum: descriptor_pb2.EnumDescriptorProto, path: tuple[int, ...], outer: str) -> Iterator[str]:
        yield f"### {outer}{enum.name}\n\n{self._comment(*path)}\n\n| value | |\n| --- | --- |"
        for index, value in enumerate(enum.value):
            yield f"| `{value.name}` = {value.number} | {self._cell(*path, 2, index)} |"
        yield ""

    def _limits(self, field: descriptor_pb2.FieldDescriptorProto) -> str:
        options = self._options_class.FromString(field.options.SerializeToString())  # type: ignore[attr-defined]
        if not options.HasExtension(self._rules):
            return ""
        rules = options.Extensions[self._rules]
        found = []
        for each, value in rules.ListFields():
            number = int(value) if isinstance(value, float) and value == int(value) else value
            words = _LIMITS.get(each.name, "")
            if each.name == "min" and rules.exclusive_min:
                words = "above {}"
            found += [words.format(number)] if words else []
        return ", ".join(found)

    def _comment(self, *path: int) -> str:
        return re.sub(r"\n(?! *[-|])", " ", self._comments.get(path, "").strip().replace("\n ", "\n")).strip()

    def _cell(self, *path: int) -> str:
        return re.sub(r"\s+", " ", self._comments.get(path, "")).strip().replace("|", "\\|")


def _type_of(field: descriptor_pb2.FieldDescriptorProto, entries: dict[str, descriptor_pb2.DescriptorProto]) -> str:
    entry = entries.get(field.type_name.rpartition(".")[2])
    if entry is not None:
        key, value = entry.field
        return f"map<{_type_of(key, {})}, {_type_of(value, {})}>"
    name = _link(field.type_name) if field.type_name else _SCALARS[field.type]
    if field.label == _Field.LABEL_REPEATED:
        return f"repeated {name}"
    return f"optional {name}" if field.proto3_optional else name


def _link(type_name: str) -> str:
    """Return a message's or enum's name, linked to where it is described."""
    package, _, name = re.fullmatch(r"\.((?:[a-z0-9_]+\.)*)()(.*)", type_name).groups()  # type: ignore[union-attr]
    if not package.startswith("octavo."):
        return f"{package}{name}"
    return f"[{name}](#{name.lower().replace('.', '')})"


if __name__ == "__main__":
    main(sys.argv[1:])
