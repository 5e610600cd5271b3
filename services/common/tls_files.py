"""Which files TLS uses. Apart from `tls.py`, so that a command line can be read without gRPC."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TlsFiles:
    """PEM files: a certificate chain with its key, and the authorities whose certificates the other side must have.

    Without `ca` a server asks its clients for no certificate, and a client trusts the system's authorities.
    """

    certificate: Path
    key: Path
    ca: Path | None = None


def check_tls_options(what: str, certificate: Path | None, key: Path | None, ca: Path | None) -> TlsFiles | None:
    """Return the files of three settings, or None if none is set. Raises ValueError; `what` begins the flags' names."""
    if certificate is None and key is None and ca is None:
        return None
    if certificate is None or key is None:
        raise ValueError(f"--{what}-certificate and --{what}-key go together: give both, or neither")
    for path in (certificate, key, ca):
        if path is not None and not path.is_file():
            raise ValueError(f"--{what}-...: {path} is no file")
    return TlsFiles(certificate, key, ca)


def certificate_ends(files: Mapping[str, TlsFiles | None]) -> dict[tuple[str, ...], float]:
    """Return when the certificates end, as Unix times, by what they are for; those that cannot be read are left out."""
    ends: dict[tuple[str, ...], float] = {}
    for use, each in files.items():
        if each is not None:
            # The module has no public way to read a certificate that nobody has shown.
            with contextlib.suppress(OSError, ValueError, KeyError):
                about = ssl._ssl._test_decode_cert(str(each.certificate))  # type: ignore[attr-defined]
                ends[use,] = float(ssl.cert_time_to_seconds(about["notAfter"]))
    return ends
