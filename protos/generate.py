"""Generate the Python code of every .proto file beside it: python protos/generate.py [--check].

The folder of a proto is its package, and its package is its Python module, so the generated
imports are right as they are. With --check nothing is written; the exit status says whether the
committed files are current.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent


def generate(out: Path) -> list[Path]:
    """Write the generated modules of all protos below ROOT to `out`; return their relative paths."""
    sources = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.proto"))
    with_services = [path for path in sources if "\nservice " in (ROOT / path).read_text()]
    includes = [f"-I{ROOT}", f"-I{Path(grpc_tools.__file__).parent / '_proto'}"]
    messages = [f"--python_out={out}", f"--pyi_out={out}", *map(str, sources)]
    stubs = [f"--grpc_python_out={out}", *map(str, with_services)]
    for arguments in (messages, stubs):
        if protoc.main(["protoc", *includes, *arguments]) != 0:
            raise SystemExit("protoc failed; its messages are above")
    return sorted(path.relative_to(out) for path in out.rglob("*_pb2*.py*") if "__pycache__" not in path.parts)


def main(arguments: list[str]) -> int:
    """Run the command line; return the exit status."""
    if arguments not in ([], ["--check"]):
        print(__doc__)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        made = generate(Path(folder))
        new = {path: (Path(folder) / path).read_bytes() for path in made}
    old = {
        path.relative_to(ROOT): path.read_bytes()
        for path in ROOT.rglob("*_pb2*.py*")
        if "__pycache__" not in path.parts
    }
    if arguments:
        stale = sorted(str(path) for path in new.keys() | old.keys() if new.get(path) != old.get(path))
        if stale:
            print("not current, run `make protos`:", *stale, sep="\n  ", file=sys.stderr)
        return 1 if stale else 0
    for path, content in new.items():
        (ROOT / path).write_bytes(content)
    for path in old.keys() - new.keys():
        (ROOT / path).unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
