"""Videos from https URLs: every host and address is checked, at every redirect, before a socket is opened.

A name is looked up once and the connection goes to the address that was checked, so a name that changes its answer
gains nothing. No proxies, no cookies, no credentials, no environment variables but those OpenSSL finds its roots by.
"""

from __future__ import annotations

import errno
import http.client
import queue
import re
import socket
import ssl
import string
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any, BinaryIO
from urllib.parse import quote, urljoin

from .errors_elva import VideoError
from .limits_elva import UrlPolicy
from .source_elva import shown

_HEADERS = {"User-Agent": "elva-hf", "Accept": "*/*", "Accept-Encoding": "identity", "Connection": "close"}
_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK = 64 * 2**10
_MAX_LENGTH = 8192
_BY_HAND = "download it yourself and give its path"

_URL = re.compile(
    r"([a-z][a-z0-9+.-]*)://(?:([^/?#]*)@)?(\[[^][/?#@%]*]|[^][/?#@:]+)(?::([0-9]{0,5}))?(/[^?#]*)?(?:\?([^#]*))?(?:#.*)?",
    re.ASCII | re.DOTALL | re.IGNORECASE,
)
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")  # as a last label: an IPv4 address, by any resolver's reading

_GLOBAL_UNICAST = ip_network("2000::/3")
_NAT64 = ip_network("64:ff9b::/96")
_NEVER_PUBLIC = tuple(
    ip_network(block)
    for block in (
        "192.0.0.0/24",  # protocol assignments, metadata services among them
        "192.88.99.0/24",  # 6to4 relays
        "168.63.129.16/32",  # a cloud's host agent
        "2001::/23",  # Teredo and other protocol assignments
        "2001:db8::/32",
        "2002::/16",  # 6to4
        "3fff::/20",  # documentation
    )
)
"""Blocks that `ipaddress` calls global in one Python or another and that reach a private place, or none."""


@dataclass(frozen=True)
class ParsedUrl:
    """A URL that may be asked, as far as the URL alone tells.

    Args:
        scheme: Always `"https"`.
        host: Lower-case name, or an address without brackets.
        port: 1 to 65535.
        path: Starts with `/`; percent-encoded.
        query: What follows `?`, or None.
    """

    scheme: str
    host: str
    port: int
    path: str
    query: str | None = field(default=None, repr=False)


def fetch(url: str, policy: UrlPolicy) -> BinaryIO:
    """Download a video into an anonymous temporary file, positioned at its start.

    Raises:
        VideoError: The URL is not https ("protocol"); it names a user, or a host or address that may not be asked
            ("address"); the look-up, TLS or HTTP failed, or the body is short ("fetch"); the body is larger than
            `policy.max_bytes` ("too_many_bytes"); it all took longer than `policy.timeout` ("timeout").
    """
    deadline = _Deadline(policy.timeout)
    hop = url
    for _ in range(policy.max_redirects + 1):
        with _one_error(url, hop, policy):
            found = _ask(hop, policy, deadline)
        if not isinstance(found, str):
            return found
        hop = found
    source = _shown(url)
    raise _error(source, f"redirects more than {policy.max_redirects} times;", "fetch", f"{_BY_HAND}.")


def check_url(url: str, policy: UrlPolicy) -> ParsedUrl:
    """Parse a URL strictly and refuse what may not be asked; nothing is looked up.

    A host is a name of ASCII letters, digits, `-` and `_` (others in punycode, no dot at its end), an IPv4 address of
    four decimal numbers, or an IPv6 address in brackets; every other spelling is refused.

    Raises:
        VideoError: It is not https ("protocol"); it cannot be parsed, names a user, or its host or address may not be
            asked ("address").
    """
    name = _shown(url)
    if url[:6].lower() != "https:":
        raise _error(name, "is not https, and nothing else is fetched;", "protocol", f"{_BY_HAND}.")
    found = _URL.fullmatch(url)
    if found is None or len(url) > _MAX_LENGTH or not url.isprintable() or " " in url or "\\" in url:
        hint = f"write at most {_MAX_LENGTH} printable characters, spaces and backslashes percent-encoded."
        raise _error(name, "is no https URL;", "address", hint)
    _, user, host, port, path, query = found.groups()
    if user is not None:
        problem = "has a user name or password in front of its host, and none is ever sent;"
        raise _error(name, problem, "address", f"leave them out, or {_BY_HAND}.")
    if port and not 1 <= int(port) <= 65535:
        raise _error(name, f"asks port {port};", "address", "ports are 1 to 65535.")
    host = _check_host(host.lower(), name)
    _check_allowed(host, name, policy)
    if _is_address(host):
        check_address(host, policy, name)
    return ParsedUrl("https", host, int(port or 443), _encoded(path or "/"), query and _encoded(query))


def check_address(address: str, policy: UrlPolicy, name: str = "the URL") -> IPv4Address | IPv6Address:
    """The address if it may be asked; one that carries an IPv4 address is judged by that instead.

    Tunnels (6to4, Teredo) are never public: what is at their end cannot be told.

    Args:
        address: As `ipaddress` reads it.
        policy: `allow_private_addresses` lets loopback, private and link-local addresses pass, never multicast ones.
        name: What the address was found for, as shown to people.

    Raises:
        VideoError: It is no address, or not a public one ("address").
    """
    try:
        found = ip_address(address)
    except ValueError:
        raise _error(name, f"leads to {address!r}, which is no address;", "address", f"{_BY_HAND}.") from None
    reached = _reached(found)
    if reached.is_multicast or reached.is_unspecified:
        raise _error(name, f"leads to {found}, which is no address of one host;", "address", f"{_BY_HAND}.")
    if not policy.allow_private_addresses and not _is_public(reached):
        hint = f"{_BY_HAND}, or pass UrlPolicy(allow_private_addresses=True)."
        raise _error(name, f"leads to {found}, which is not a public address;", "address", hint)
    return found


def _reached(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The address where a connection to it ends: the IPv4 address in a mapped or NAT64 one, else itself."""
    if isinstance(address, IPv6Address) and (address.ipv4_mapped is not None or address in _NAT64):
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if isinstance(address, IPv6Address) and address not in _GLOBAL_UNICAST:
        return False
    return address.is_global and not address.is_reserved and not any(address in block for block in _NEVER_PUBLIC)


def _check_host(host: str, name: str) -> str:
    """The host without brackets, if it is spelled in the one way that every resolver reads alike."""
    try:
        if host.startswith("["):
            return str(IPv6Address(host[1:-1]))
        labels = host.split(".")
        if _NUMBER.fullmatch(labels[-1]):
            return str(IPv4Address(host))
    except ValueError:
        hint = "write four decimal numbers, or an IPv6 address in brackets."
        raise _error(name, "has a host that is no address in its usual form;", "address", hint) from None
    if len(host) > 253 or not all(map(_LABEL.fullmatch, labels)):
        hint = 'write it in ASCII without a dot at the end, as in "xn--mnchen-3ya.example".'
        raise _error(name, "has a host that is no name;", "address", hint)
    return host


def _check_allowed(host: str, name: str, policy: UrlPolicy) -> None:
    allowed = policy.allowed_hosts
    if allowed is None or host in (each.strip("[]") for each in allowed):
        return
    if _is_address(host) or not host.endswith(tuple(each for each in allowed if each.startswith("."))):
        hint = f'{_BY_HAND}, or pass UrlPolicy(allowed_hosts=(..., "{host}")).'
        raise _error(name, "is on a host that may not be asked;", "address", hint)


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _encoded(text: str) -> str:
    return quote(text, safe=string.punctuation)


def _shown(url: str) -> str:
    """A URL, or what was meant as one, without what may be a secret."""
    return shown(url) if "://" in url or not re.search("[@?#]", url) else "'...'"


def _error(name: str, problem: str, reason: str, hint: str) -> VideoError:
    return VideoError(f"{name} {problem}", reason=reason, source=name, hint=hint)


@contextmanager
def _one_error(url: str, hop: str, policy: UrlPolicy) -> Iterator[None]:
    """Everything that goes wrong at a hop, as one `VideoError` about the URL that was given."""
    name = _shown(hop)
    try:
        try:
            yield
        except TimeoutError as error:
            if error.errno is not None:  # the system gave up on its own
                raise _failed(name, "cannot be downloaded: its host does not answer") from None
            hint = f"{_BY_HAND}, or pass UrlPolicy(timeout=...)."
            raise _error(name, f"took longer than {policy.timeout:g} s;", "timeout", hint) from None
        except (OSError, http.client.HTTPException) as error:
            raise _failed(name, f"cannot be downloaded: {_cause(error)}") from None
    except VideoError as error:
        error.source = _shown(url)
        if hop is not url:
            error.args = (f"{error.source} redirects: {error}",)
        raise


def _failed(name: str, problem: str) -> VideoError:
    return _error(name, f"{problem};", "fetch", f"check the URL, or {_BY_HAND}.")


def _cause(error: Exception) -> str:
    """What went wrong, in words of ours or the system's: a server's own words may repeat the URL's secrets."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is refused ({error.verify_message.rstrip('.')})"
    if isinstance(error, ssl.SSLEOFError):
        return "the connection was cut"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed ({error.reason or type(error).__name__})"
    if isinstance(error, socket.gaierror):
        return f"its host is not found ({error.strerror})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"its host speaks no HTTP that is understood ({type(error).__name__})"


class _Deadline:
    """A moment after which nothing is waited for."""

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until then, above 0.

        Raises:
            TimeoutError: It has passed.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return min(left, threading.TIMEOUT_MAX)


class _TimedSocket(ssl.SSLSocket):
    """A TLS socket of which no read or write outlasts a deadline, however slowly the bytes drip."""

    deadline: _Deadline

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        self.settimeout(self.deadline.left())
        return super().recv_into(buffer, nbytes, flags)

    def send(self, data: Any, flags: int = 0) -> int:
        self.settimeout(self.deadline.left())
        return super().send(data, flags)


def _tls_context() -> ssl.SSLContext:
    return ssl.create_default_context()


def _ask(url: str, policy: UrlPolicy, deadline: _Deadline) -> BinaryIO | str:
    """The file at a URL, or the URL it redirects to."""
    parsed, name = check_url(url, policy), _shown(url)
    found = [parsed.host] if _is_address(parsed.host) else _look_up(parsed.host, parsed.port, deadline)
    addresses = [check_address(address, policy, name) for address in found]
    with (
        _connect(addresses, parsed.port, deadline) as plain,
        _encrypt(plain, parsed.host, deadline) as secure,
        _get(secure, parsed) as response,
    ):
        return _redirect_target(url, response, name) if response.status in _REDIRECTS else _save(response, policy, name)


def _look_up(host: str, port: int, deadline: _Deadline) -> list[str]:
    """The addresses of a name. A thread asks, because a look-up cannot be interrupted."""
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, name="elva-hf look-up", daemon=True).start()
    try:
        answer = answers.get(timeout=deadline.left())
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(answer, Exception):
        raise answer
    return list(dict.fromkeys(str(entry[4][0]) for entry in answer))


def _connect(addresses: Sequence[IPv4Address | IPv6Address], port: int, deadline: _Deadline) -> socket.socket:
    """A connection to the first address that takes one; each may use its share of the time left."""
    failure = OSError(errno.EADDRNOTAVAIL, "its host has no address")
    for num_left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
        try:
            return _connect_to(address, port, deadline.left() / num_left)
        except OSError as error:
            failure = error
    raise failure


def _connect_to(address: IPv4Address | IPv6Address, port: int, timeout: float) -> socket.socket:
    sock = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.connect((str(address), port))
    except BaseException:
        sock.close()
        raise
    return sock


def _encrypt(sock: socket.socket, host: str, deadline: _Deadline) -> ssl.SSLSocket:
    context = _tls_context()
    context.sslsocket_class = _TimedSocket
    sock.settimeout(deadline.left())
    # a cut connection must be an error: it could end a body of unknown length early, and nobody would notice
    secure = context.wrap_socket(sock, server_hostname=host, suppress_ragged_eofs=False)
    secure.deadline = deadline
    return secure


def _get(sock: ssl.SSLSocket, url: ParsedUrl) -> http.client.HTTPResponse:
    """The answer, its body unread."""
    connection = http.client.HTTPSConnection(url.host, url.port, context=sock.context)
    connection.sock = sock  # connected: it looks nothing up and connects to nothing
    connection.request("GET", url.path if url.query is None else f"{url.path}?{url.query}", headers=_HEADERS)
    return connection.getresponse()


def _redirect_target(url: str, response: http.client.HTTPResponse, name: str) -> str:
    location = response.getheader("Location")
    if not location:
        raise _failed(name, f"redirects (status {response.status}) and does not say where")
    try:
        return urljoin(url, quote(location, safe=string.punctuation, encoding="latin-1"))  # as headers are read
    except ValueError:
        raise _failed(name, f"redirects (status {response.status}) to what is no URL") from None


def _save(response: http.client.HTTPResponse, policy: UrlPolicy, name: str) -> BinaryIO:
    """The body in a temporary file, if it is the whole body, as it is, and not too large."""
    length = _check_head(response, name)
    if length is not None and length > policy.max_bytes:
        raise _too_large(name, f"has {length} bytes", policy)
    with ExitStack() as stack:
        file = stack.enter_context(tempfile.TemporaryFile(prefix="elva-hf-"))
        num_bytes = 0
        while chunk := response.read(_CHUNK):
            num_bytes += len(chunk)
            if num_bytes > policy.max_bytes:
                raise _too_large(name, f"has {num_bytes} bytes or more", policy)
            file.write(chunk)
        if length is not None and num_bytes != length:
            raise _failed(name, f"is cut short: {num_bytes} bytes of {length} came")
        file.seek(0)
        stack.pop_all()  # it stays open
    return file


def _check_head(response: http.client.HTTPResponse, name: str) -> int | None:
    """The length of the body where the server says it."""
    if response.status != 200:
        raise _failed(name, f"is answered with status {response.status} and no video")
    coding = response.getheader("Content-Encoding", "identity").strip().lower() or "identity"
    transfer = response.getheader("Transfer-Encoding")
    if coding != "identity" or (transfer is not None and not response.chunked):
        raise _failed(name, "comes in an encoding that was not asked for")
    length = response.getheader("Content-Length")
    if length is None or response.chunked:
        return None
    if response.length is None or not re.fullmatch("[0-9]+", length.strip()):
        raise _failed(name, "comes with a length that is no number")
    return response.length


def _too_large(name: str, size: str, policy: UrlPolicy) -> VideoError:
    problem = f"{size}, and max_bytes of a download is {policy.max_bytes};"
    return _error(name, problem, "too_many_bytes", f"{_BY_HAND}, or pass UrlPolicy(max_bytes=...).")
