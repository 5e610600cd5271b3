"""Each piece of a sequence's state is written in one place."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from octavo.services.scheduler.requests import sequence
from octavo.services.scheduler.requests.sequence import Sequence

OWNER = Path(sequence.__file__)
CHANGES = {"append", "extend", "insert", "remove", "pop", "clear", "reverse", "sort"}
OTHERS = {"self", "box", "box.finished[-1]", "member.hello"}  # what has fields of the same names


def writes(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield the attributes of anything but OTHERS that are assigned, deleted or changed in place, with their lines."""
    for node in ast.walk(tree):
        written: ast.AST | None = None
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del)):
            written = node
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
            written = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
            written = node.func.value
        if isinstance(written, ast.Attribute) and ast.unparse(written.value) not in OTHERS:
            yield written.attr, written.lineno


def test_only_a_sequence_writes_its_fields() -> None:
    fields = set(Sequence.__slots__)
    found = [
        f"{path.name}:{line} writes {name}"
        for path in sorted(OWNER.parent.parent.rglob("*.py"))
        if path != OWNER
        for name, line in writes(ast.parse(path.read_text()))
        if name in fields
    ]
    assert not found, found


def test_a_write_is_seen_however_it_is_made() -> None:
    code = """
seq.slot = seq.request
seq.num_preemptions += 1
seq.token_ids.append(1)
del seq.block_table[0]
self.slot = 2
"""
    assert sorted(writes(ast.parse(code))) == [
        ("block_table", 5),
        ("num_preemptions", 3),
        ("slot", 2),
        ("token_ids", 4),
    ]
