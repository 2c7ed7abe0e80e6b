"""Who may talk to a server: loopback alone, or whoever has the token; and TLS.

A web page in a browser on the same machine could open a websocket to a loopback port. Browsers say
so (the Origin header), clients of robots do not: the server refuses whatever has an origin.
"""

import hmac
import ipaddress
import ssl
from collections.abc import Sequence
from pathlib import Path

MIN_TOKEN = 16  # characters
SCHEMES = ("bearer", "api-key")  # "Api-Key" is what openpi's and starVLA's clients write


def read_token(path: Path) -> str:
    """The token in a file, without the white space around it.

    Raises:
      ValueError: it is too short to be a secret, or could not stand in a header.
    """
    token = path.read_text(encoding="utf-8").strip()
    if len(token) < MIN_TOKEN or not (token.isascii() and token.isprintable() and " " not in token):
        raise ValueError(
            f"{path} must hold one token of at least {MIN_TOKEN} printable ASCII characters; "
            "`openssl rand -hex 32` makes one"
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address; a name other than localhost counts as not."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def allowed(token: str | None, authorization: Sequence[str]) -> bool:
    """Whether a request may pass; takes the same time for every wrong token.

    Args:
      token: the server's; None lets everybody pass.
      authorization: values of the request's Authorization headers.
    """
    if token is None:
        return True
    if len(authorization) != 1:
        return False
    scheme, _, given = authorization[0].partition(" ")
    same = hmac.compare_digest(token.encode(), given.encode(errors="surrogateescape"))
    return same and scheme.lower() in SCHEMES


def tls_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """For a server with a certificate (chain) and its private key, both PEM.

    Raises:
      ValueError: the files hold no such thing, or do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        raise ValueError(f"{certificate} and {key} are no certificate and its key") from error
    return context
