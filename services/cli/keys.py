"""`octavo keys ACTION`: makes API keys, and the key pairs of schedulers and workers on different hosts."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from octavo.services.common import config as config_loader
from octavo.services.common.folders import locked, sync


@dataclass(frozen=True)
class KeysConfig:
    """Settings of `octavo keys`."""

    action: str = field(
        metadata={
            "positional": True,
            "help": "add: make an API key for --tenant and print it, once; list: show whose keys there are; remove: "
            "take the key --id away; curve: make a key pair for the hop between scheduler and workers in --directory",
            "choices": ("add", "list", "remove", "curve"),
        }
    )
    file: Path = field(default=Path("api-keys.yaml"), metadata={"help": "the file of API keys; it holds hashes only"})
    tenant: str = field(default="", metadata={"help": "whose requests the key makes"})
    admin: bool = field(default=False, metadata={"help": "the key may call octavo.admin.v1 as well"})
    id: str = field(default="", metadata={"help": "a key's id: what stands after oct_"})
    directory: Path = field(default=Path("."), metadata={"help": "where `curve` writes", "metavar": "PATH"})
    name: str = field(default="octavo", metadata={"help": "name of the key pair's files"})


def main(argv: Sequence[str]) -> int:
    """Do what is asked; `argv[0]` is the command's name. Return 1, with one line on stderr, if that fails."""
    config = config_loader.load(
        KeysConfig,
        argv[1:],
        prog="octavo keys",
        description="Makes keys; servers follow the files.",
    )
    try:
        {"add": _add, "list": _list, "remove": _remove, "curve": _curve}[config.action](config)
    except (ValueError, OSError) as error:
        print(f"octavo keys: {error}", file=sys.stderr)
        return 1
    return 0


def _add(config: KeysConfig) -> None:
    from octavo.services.common.api_keys import make_key

    if not config.tenant:
        raise ValueError("--tenant is missing: whose requests the key makes")
    key, entry = make_key(config.tenant, is_admin=config.admin)
    with _changing(config.file) as file:
        _write(file, [*_read(file), entry])
    print(key)


def _list(config: KeysConfig) -> None:
    for entry in _read(config.file):
        print(f"{entry['id']}  {entry['tenant']}{'  admin' if entry.get('admin') else ''}")


def _remove(config: KeysConfig) -> None:
    if not config.id:
        raise ValueError("--id is missing: what stands after oct_ in the key, as `octavo keys list` shows it")
    with _changing(config.file) as file:
        entries = _read(file)
        left = [entry for entry in entries if entry["id"] != config.id]
        if len(left) == len(entries):
            raise ValueError(f"no key has the id {config.id!r}; `octavo keys list` shows them")
        _write(file, left)


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[Path]:
    """Keep other changes of the file waiting; return where it is, behind any links."""
    path = path.resolve()
    with locked(path.parent):
        yield path


def _curve(config: KeysConfig) -> None:
    """Write NAME.key (secret) and NAME.pub, as CurveZMQ's Z85 text."""
    import zmq

    public, secret = zmq.curve_keypair()
    _write_private(config.directory / f"{config.name}.key", secret)
    (config.directory / f"{config.name}.pub").write_bytes(public + b"\n")
    print(public.decode())


def _read(path: Path) -> list[dict[str, object]]:
    from octavo.services.common.api_keys import parse_keys

    if not path.exists():
        return []
    data = path.read_bytes()
    parse_keys(data)
    entries: list[dict[str, object]] = yaml.safe_load(data)
    return entries


def _write(path: Path, entries: list[dict[str, object]]) -> None:
    """Replace the file as a whole, so that a server never reads half of it. Who may read it stays as it is."""
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    _write_private(part, yaml.safe_dump(entries, sort_keys=False).encode())
    try:
        if path.exists():
            _make_alike(part, path.stat())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


def _make_alike(path: Path, about: os.stat_result) -> None:
    """Give a file the owner and mode of another. Raises ValueError."""
    try:
        os.chown(path, about.st_uid, about.st_gid)
    except PermissionError:
        raise ValueError(
            f"the file belongs to user {about.st_uid} and group {about.st_gid}: change it as that user, or a server "
            "that may read it now could not any more"
        ) from None
    path.chmod(stat.S_IMODE(about.st_mode))


def _write_private(path: Path, data: bytes) -> None:
    """Write a file that only this user can read. Raises FileExistsError: a secret is not overwritten."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
