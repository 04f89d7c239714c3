"""TLS for both ends of the tensor exchange."""

from __future__ import annotations

import ssl
from pathlib import Path


def server_context(
    certfile: Path | str | None, keyfile: Path | str | None, client_ca: Path | str | None
) -> ssl.SSLContext | None:
    """TLS of a server, None without any file; ValueError if one cannot be used.

    With `client_ca`, clients must show a certificate signed by one of those.
    """
    if certfile is None and keyfile is None and client_ca is None:
        return None
    if certfile is None or keyfile is None:
        raise ValueError("TLS takes a certificate and its key, expected both files")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # An encrypted key is refused; without a password at hand, OpenSSL would ask the terminal.
        context.load_cert_chain(certfile, keyfile, password=lambda: b"")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"certificate {certfile} with key {keyfile} cannot be used: {_reason(error)}"
        ) from None
    if client_ca is not None:
        try:
            context.load_verify_locations(client_ca)
        except OSError as error:
            raise ValueError(
                f"client certificates' authority {client_ca} cannot be used: {_reason(error)}"
            ) from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(
    verify: Path | str | None, cert: tuple[Path | str, Path | str] | None
) -> ssl.SSLContext:
    """TLS of a client that trusts `verify` alone, if given; ValueError if a file cannot be used."""
    try:
        context = ssl.create_default_context(cafile=verify)
    except OSError as error:
        raise ValueError(f"verify is {verify}, which cannot be used: {_reason(error)}") from None
    if cert is not None:
        try:
            context.load_cert_chain(*cert, password=lambda: b"")
        except (OSError, ValueError) as error:
            raise ValueError(f"cert is {cert}, which cannot be used: {_reason(error)}") from None
    return context


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
