"""What is known of certificates without a connection."""

from __future__ import annotations

import time
from pathlib import Path

from cryptography import x509

from octavo.services.common.tls_files import TlsFiles, certificate_ends
from tests.certificates import Authority


def test_a_certificates_end_is_read_from_its_file_as_it_is_now(tmp_path: Path) -> None:
    certificate, key = Authority(tmp_path).issue("server")
    files = {"tls": TlsFiles(certificate, key), "hop": None}
    end = x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc.timestamp()
    assert certificate_ends(files) == {("tls",): end}
    assert end > time.time()

    certificate.write_text("half a certificate")
    assert certificate_ends(files) == {}
