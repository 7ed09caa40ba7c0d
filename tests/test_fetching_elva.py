"""Downloads from a server on the loopback that answers as told; URLs and addresses against independent readings."""

import contextlib
import errno
import ipaddress
import os
import re
import socket
import socketserver
import ssl
import tempfile
import threading
import time
import traceback
from dataclasses import replace
from urllib.parse import urlsplit

import pytest
import torch
import trustme
from clips_elva import write_counter
from hypothesis import given, settings
from hypothesis import strategies as st

from elva_hf import fetching_elva
from elva_hf.errors_elva import VideoError
from elva_hf.fetching_elva import check_address, check_url, fetch
from elva_hf.limits_elva import UrlPolicy
from elva_hf.video_processing_elva import ElvaVideoProcessor

BODY = bytes(range(256)) * 1000
PUBLIC = UrlPolicy(timeout=5)
LOCAL = UrlPolicy(timeout=5, allow_private_addresses=True)
SECRET = "hunter2"


def head(status=200, **fields):
    lines = [f"HTTP/1.1 {status} Whatever", *(f"{name.replace('_', '-')}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def whole(body=BODY):
    return head(Content_Length=len(body)) + body


def redirect(target, status=302):
    return head(status, Location=target, Set_Cookie="id=1", Content_Length=0)


def drip(start, piece):
    """`start`, and then `piece` again and again, slowly, until nobody listens."""

    def answer(connection):
        connection.sendall(start)
        for _ in range(200):
            time.sleep(0.05)
            connection.sendall(piece)

    return answer


class Conversation(socketserver.BaseRequestHandler):
    def handle(self):
        with (
            contextlib.suppress(OSError),
            self.server.context.wrap_socket(self.request, server_side=True) as connection,
        ):
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(4096) or b"\r\n\r\n"
            self.server.requests.append(request.decode())
            answer = self.server.answers[request.split()[1].decode()]
            if callable(answer):
                answer(connection)
            else:
                connection.sendall(answer)
                connection.unwrap()


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture(scope="module")
def server(authority):
    with Server(("127.0.0.1", 0), Conversation) as server:
        server.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("clips.test", "cdn.clips.test", "127.0.0.1").configure_cert(server.context)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


class Site:
    """The server as seen from here: its names, what was looked up, and where connections went."""

    def __init__(self, server):
        self.server, self.port = server, server.server_address[1]
        self.names = {"clips.test": ["127.0.0.1"], "cdn.clips.test": ["127.0.0.1"], "wrong.test": ["127.0.0.1"]}
        self.looked_up, self.connected = [], []
        server.answers, server.requests = {}, []

    def url(self, path="/clip.mp4", host="clips.test"):
        return f"https://{host}:{self.port}{path}"

    def serve(self, answer, path="/clip.mp4"):
        self.server.answers[path] = answer
        return self.url(path)

    def look_up(self, host, port, *args, **kwargs):
        self.looked_up.append(host)
        if host not in self.names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        kinds = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in self.names[host]]
        return [
            (kind, socket.SOCK_STREAM, 6, "", (address, port))
            for kind, address in zip(kinds, self.names[host], strict=True)
        ]


@pytest.fixture
def site(server, authority, monkeypatch):
    site = Site(server)

    class Socket(socket.socket):
        def connect(self, address):
            site.connected.append(address[0])
            super().connect(("127.0.0.1", address[1]))

    context = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())
    monkeypatch.setattr(socket, "socket", Socket)
    monkeypatch.setattr(socket, "getaddrinfo", site.look_up)
    monkeypatch.setattr(fetching_elva, "_tls_context", lambda: context)
    return site


def refused(reason, url, policy=LOCAL):
    """The error of a download, after all that holds for every such error has been checked."""
    with pytest.raises(VideoError) as caught:
        fetch(url, policy).close()
    error = caught.value
    told = "".join(traceback.format_exception(error))
    assert error.reason == reason, str(error)
    assert "\n" not in str(error) and str(error).startswith(error.source) and str(error).endswith(error.hint)
    assert SECRET not in told and SECRET not in error.source
    return error


def test_a_download_is_whole_at_its_start_and_in_no_folder(site):
    with fetch(site.serve(whole()), LOCAL) as file:
        assert file.tell() == 0 and file.read() == BODY
        assert isinstance(file.name, int) and os.fstat(file.fileno()).st_nlink == 0


@pytest.mark.parametrize("isolate", [False, True])
def test_a_processor_reads_a_video_from_a_url(site, tmp_path, isolate):
    clip = write_counter(tmp_path / "clip.mp4", 12)
    processor = ElvaVideoProcessor(num_frames=4, longest_edge=56)
    url = site.serve(redirect(site.serve(whole(clip.read_bytes()))), "/moved.mp4")
    with pytest.raises(VideoError, match="allow_urls"):
        processor(url)
    assert not site.connected
    found = processor(url, allow_urls=LOCAL, isolate=isolate)["pixel_values_videos"]
    assert torch.equal(found, processor(clip)["pixel_values_videos"])
    with pytest.raises(VideoError) as caught:  # an address that is not public
        processor(url, allow_urls=True)
    assert caught.value.reason == "address"


def test_a_request_says_no_more_than_it_must(site):
    site.serve(whole(), "/a%20b/%C3%A9.mp4?x=1&y=")
    fetch(site.url("/a%20b/é.mp4?x=1&y=#part"), LOCAL).close()
    (request,) = site.server.requests
    lines = request.rstrip().split("\r\n")
    assert lines[0] == "GET /a%20b/%C3%A9.mp4?x=1&y= HTTP/1.1"
    assert {line.partition(": ")[0]: line.partition(": ")[2] for line in lines[1:]} == {
        "Host": f"clips.test:{site.port}",
        "User-Agent": "elva-hf",
        "Accept": "*/*",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }


def test_proxies_of_the_environment_are_not_asked(site, monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with fetch(site.serve(whole()), LOCAL) as file:
        assert file.read() == BODY


@pytest.mark.parametrize(
    "answer",
    [
        head() + BODY,
        head(Transfer_Encoding="chunked") + b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY),
        head(Content_Length=len(BODY), Content_Encoding="identity") + BODY + b"and more that nobody reads",
        head(100) + whole(),
    ],
    ids=["closed at its end", "chunked", "longer than it says", "continued"],
)
def test_every_way_to_frame_a_body_gives_the_body(site, answer):
    with fetch(site.serve(answer), LOCAL) as file:
        assert file.read() == BODY


def test_redirects_are_followed_and_cookies_forgotten(site):
    site.serve(redirect("/two?token=1", 301), "/one")
    site.serve(redirect("three", 303), "/two?token=1")
    site.serve(redirect(f"//clips.test:{site.port}/four", 307), "/three")
    site.serve(redirect(site.url("/vé.mp4", "cdn.clips.test"), 308), "/four")
    site.server.answers["/v%E9.mp4"] = whole()
    with fetch(site.url("/one"), LOCAL) as file:
        assert file.read() == BODY
    assert site.looked_up == ["clips.test"] * 4 + ["cdn.clips.test"]
    assert not any("cookie" in request.lower() for request in site.server.requests)


@pytest.mark.parametrize("most", [0, 3])
def test_no_more_redirects_than_allowed_are_followed(site, most):
    url = site.serve(redirect("/clip.mp4"))
    error = refused("fetch", url, UrlPolicy(timeout=5, allow_private_addresses=True, max_redirects=most))
    assert f"more than {most} times" in str(error) and len(site.server.requests) == most + 1


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("http://clips.test/clip.mp4", "protocol"),
        ("file:///etc/passwd", "protocol"),
        ("data:video/mp4;base64,AAAA", "protocol"),
        ("https://169.254.169.254/latest/meta-data", "address"),
        ("https://[::ffff:10.0.0.1]/", "address"),
        ("https://inside.test/", "address"),
        ("//0x7f.1/", "address"),
        ("https://clips.test\\@127.0.0.1/", "address"),
        (f"https://user:{SECRET}@clips.test/", "address"),
        (f"http://user:{SECRET}@inside.test/?token={SECRET}#{SECRET}", "protocol"),
        (f"https://nowhere.test/?token={SECRET}", "fetch"),
        ("https://[/", "fetch"),
        ("", "fetch"),
    ],
)
def test_a_redirect_is_checked_like_the_first_url(site, target, reason):
    site.names.update({"clips.test": ["93.184.216.34"], "inside.test": ["10.0.0.1"]})
    error = refused(reason, site.serve(redirect(target), f"/clip.mp4?token={SECRET}"), PUBLIC)
    assert error.source == f"'{site.url()}'"
    assert len(site.server.requests) == 1 and site.connected == ["93.184.216.34"]
    assert ("redirects: " in str(error)) == (target not in ("", "https://[/"))


def test_a_name_is_looked_up_once_and_what_was_checked_is_what_is_asked(site, monkeypatch):
    answers = iter([["93.184.216.34"], ["127.0.0.1"]])
    look_up = site.look_up

    def rebinding(host, port, *args, **kwargs):
        site.names[host] = next(answers)
        return look_up(host, port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    with fetch(site.serve(whole()), PUBLIC) as file:
        assert file.read() == BODY
    assert site.looked_up == ["clips.test"] and site.connected == ["93.184.216.34"]
    refused("address", site.url(), PUBLIC)
    assert site.connected == ["93.184.216.34"]


@pytest.mark.parametrize("bad", ["127.0.0.1", "10.1.2.3", "fe80::1%lo", "::1", "64:ff9b::7f00:1", "not an address"])
def test_one_private_answer_among_public_ones_refuses_the_host(site, bad):
    site.names["clips.test"] = ["93.184.216.34", "2606:2800:220:1::1", bad]
    refused("address", site.serve(whole()), PUBLIC)
    assert not site.connected


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://clips.test/", "protocol"),
        ("ftp://clips.test/", "protocol"),
        ("clips.test/clip.mp4", "protocol"),
        (f"https://user:{SECRET}@clips.test/", "address"),
        (f"https://user:{SECRET}/{SECRET}@clips.test/", "address"),
        (f"https:user:{SECRET}@clips.test/?{SECRET}", "address"),
        ("https://127.0.0.1/", "address"),
        ("https://2130706433/", "address"),
        ("https://0x7f000001/", "address"),
        ("https://0177.0.0.1/", "address"),
        ("https://127.1/", "address"),
        ("https://clips.0x7f/", "address"),
        ("https://\uff11\uff12\uff17.0.0.1/", "address"),
        ("https://[::1]/", "address"),
        ("https://[::ffff:127.0.0.1]/", "address"),
        ("https://[64:ff9b::10.0.0.1]/", "address"),
        ("https://[2002:7f00:1::]/", "address"),
        ("https://[2001:0:4136:e378:8000:63bf:3fff:fdd2]/", "address"),
        ("https://[fec0::1]/", "address"),
        ("https://[fe80::1%25eth0]/", "address"),
        ("https://[2606:4700::1111%25eth0]/", "address"),
        ("https://0.0.0.0/", "address"),
        ("https://224.0.0.1/", "address"),
        ("https://clips.test./", "address"),
        ("https://clips..test/", "address"),
        ("https://münchen.test/", "address"),
        ("https://%63lips.test/", "address"),
        ("https://clips.test\\.evil.test/", "address"),
        ("https://clips.test/a b", "address"),
        ("https://clips.test/a\\b", "address"),
        ("https://clips.test/a\r\nX-Header: 1", "address"),
        ("https://clips.test\t/", "address"),
        ("https://clips.test/\ud800", "address"),
        ("https://clips.test:0/", "address"),
        ("https://clips.test:65536/", "address"),
        ("https://clips.test:4 43/", "address"),
        ("https:///clip.mp4", "address"),
        ("https://", "address"),
        ("https://clips.test/" + "a" * 8192, "address"),
    ],
)
def test_what_the_url_alone_refuses_asks_no_name_and_opens_no_socket(site, monkeypatch, url, reason):
    def opened(*args, **kwargs):
        raise AssertionError("a socket")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, opened)
    refused(reason, url, PUBLIC)


def test_multicast_and_unspecified_addresses_are_never_asked():
    for address in ("224.0.0.1", "ff02::1", "0.0.0.0", "::", "::ffff:0.0.0.0"):
        with pytest.raises(VideoError, match="no address of one host"):
            check_address(address, LOCAL)
    for address in ("127.0.0.1", "10.0.0.1", "fe80::1", "::1", "169.254.1.1", "::ffff:192.168.0.1"):
        assert str(check_address(address, LOCAL)) == str(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("clips.test", True),
        ("CLIPS.test", True),
        ("www.clips.test", False),
        ("evilclips.test", False),
        ("clips.test.evil.test", False),
        ("cdn.test", False),
        ("a.cdn.test", True),
        ("a.b.cdn.test", True),
        ("acdn.test", False),
        ("8.8.8.8", True),
        ("9.8.8.8", False),
        ("[2606:4700::1111]", True),
        ("[2606:4700::1112]", False),
    ],
)
def test_only_allowed_hosts_and_subdomains_of_dotted_ones_are_asked(host, allowed):
    policy = UrlPolicy(allowed_hosts=("Clips.test", ".cdn.test", "8.8.8.8", ".8.8.8", "[2606:4700::1111]"))
    if allowed:
        assert check_url(f"https://{host}/", policy).host == host.lower().strip("[]")
    else:
        with pytest.raises(VideoError, match=r"host that may not be asked.*allowed_hosts") as caught:
            check_url(f"https://{host}/", policy)
        assert caught.value.reason == "address"


def test_no_allowed_hosts_is_none_and_a_redirect_cannot_leave_them(site):
    url = site.serve(redirect(site.url(host="cdn.clips.test")))
    refused("address", url, UrlPolicy(allow_private_addresses=True, allowed_hosts=()))
    assert not site.looked_up
    refused("address", url, UrlPolicy(allow_private_addresses=True, allowed_hosts=("clips.test",)))
    assert site.looked_up == ["clips.test"]


def test_an_endless_body_ends_at_the_cap(site):
    hung_up = threading.Event()

    def endless(connection):
        connection.sendall(head())
        try:
            while True:
                connection.sendall(BODY)
        except OSError:
            hung_up.set()

    error = refused("too_many_bytes", site.serve(endless), replace(LOCAL, max_bytes=10**6))
    assert "max_bytes of a download is 1000000" in str(error)
    assert hung_up.wait(2)  # while the error, and what its traceback holds, lives


def test_a_length_above_the_cap_is_refused_before_the_body_comes(site):
    silent = threading.Event()
    url = site.serve(lambda connection: (connection.sendall(head(Content_Length=10**12)), silent.wait(6)))
    start = time.monotonic()
    assert "1000000000000 bytes" in str(refused("too_many_bytes", url))
    assert time.monotonic() - start < 3
    silent.set()


@pytest.mark.parametrize("known", [True, False])
def test_the_cap_is_exact(site, known):
    url = site.serve(whole() if known else head() + BODY)
    fetch(url, UrlPolicy(allow_private_addresses=True, max_bytes=len(BODY))).close()
    refused("too_many_bytes", url, UrlPolicy(allow_private_addresses=True, max_bytes=len(BODY) - 1))


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"", b""),
        (b"", b"H"),
        (head()[:-2] + b"X: ", b"y"),
        (b"", head(100)),
        (head(Content_Length=10**6), b"y"),
        (head(Transfer_Encoding="chunked"), b"0"),
        (head(Transfer_Encoding="chunked") + b"0\r\n", b"X: y\r\n"),
    ],
    ids=["silence", "status", "header", "continue", "body", "chunk size", "trailer"],
)
def test_a_dripping_server_does_not_outlive_the_deadline(site, start, piece):
    began = time.monotonic()
    refused("timeout", site.serve(drip(start, piece)), UrlPolicy(timeout=0.2, allow_private_addresses=True))
    assert 0.15 < time.monotonic() - began < 3


def test_a_handshake_does_not_outlive_the_deadline(site):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connected by the system, answered by nobody
        site.port = silent.getsockname()[1]
        began = time.monotonic()
        refused("timeout", site.url(), UrlPolicy(timeout=0.2, allow_private_addresses=True))
        assert 0.15 < time.monotonic() - began < 3


def test_a_look_up_does_not_outlive_the_deadline(site, monkeypatch):
    stuck = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: stuck.wait(5))
    began = time.monotonic()
    error = refused("timeout", site.url(), UrlPolicy(timeout=0.2, allow_private_addresses=True))
    assert 0.15 < time.monotonic() - began < 3 and "took longer than 0.2 s" in str(error)
    assert all(thread.daemon for thread in threading.enumerate() if "look-up" in thread.name)
    stuck.set()


def test_redirects_share_one_deadline(site):
    def slow(connection):
        time.sleep(0.15)
        connection.sendall(redirect("/clip.mp4"))

    began = time.monotonic()
    policy = UrlPolicy(timeout=0.4, allow_private_addresses=True, max_redirects=50)
    refused("timeout", site.serve(slow), policy)
    assert time.monotonic() - began < 3


def cut(start):
    return lambda connection: (connection.sendall(start), connection.shutdown(socket.SHUT_RDWR))


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (head(Content_Length=len(BODY) + 1) + BODY, f"{len(BODY)} bytes of {len(BODY) + 1} came"),
        (cut(head(Content_Length=len(BODY) + 1) + BODY), "the connection was cut"),
        (cut(head() + BODY), "the connection was cut"),
        (head(Transfer_Encoding="chunked") + b"5\r\nabc", "IncompleteRead"),
        (head(Transfer_Encoding="chunked") + SECRET.encode(), "IncompleteRead"),
        (head(404, Content_Length=3) + b"abc", "status 404"),
        (head(204), "status 204"),
        (head(206, Content_Length=3) + b"abc", "status 206"),
        (head(500), "status 500"),
        (head(300, Location="/clip.mp4"), "status 300"),
        (head(302), "does not say where"),
        (head(Content_Encoding="gzip", Content_Length=3) + b"abc", "encoding that was not asked for"),
        (head(Transfer_Encoding="gzip", Content_Length=3) + b"abc", "encoding that was not asked for"),
        (head(Content_Length="3_0") + BODY, "a length that is no number"),
        (head(Content_Length=-1) + BODY, "a length that is no number"),
        (head(Content_Length="9" * 5000) + BODY, "a length that is no number"),
        (f"{SECRET}\r\n\r\n".encode(), "no HTTP"),
        (b"", "no HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200, "no HTTP"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 10**5, "no HTTP"),
    ],
)
def test_an_answer_that_is_not_a_whole_video_is_an_error(site, answer, told):
    error = refused("fetch", site.serve(answer, f"/clip.mp4?token={SECRET}"))
    assert told in str(error) and error.source == f"'{site.url()}'"


def test_a_certificate_of_an_unknown_authority_is_refused(site, monkeypatch):
    monkeypatch.setattr(fetching_elva, "_tls_context", ssl.create_default_context)
    assert "certificate is refused" in str(refused("fetch", site.serve(whole())))
    assert not site.server.requests


def test_a_certificate_for_another_host_is_refused(site):
    site.serve(whole())
    for host in ("wrong.test", "127.0.0.2"):
        assert "certificate is refused" in str(refused("fetch", site.url(host=host)))
    assert not site.server.requests
    fetch(site.url(host="127.0.0.1"), LOCAL).close()


def test_the_context_of_downloads_checks_certificates_and_names():
    context = fetching_elva._tls_context()
    assert context.verify_mode == ssl.CERT_REQUIRED and context.check_hostname
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2


def test_a_host_that_is_not_found_or_does_not_answer_is_an_error(site):
    assert "host is not found" in str(refused("fetch", site.url(host="nowhere.test")))
    site.names["clips.test"] = []
    assert "no address" in str(refused("fetch", site.url()))
    site.names["clips.test"] = ["127.0.0.1"]
    with socket.create_server(("127.0.0.1", 0)) as closed:
        site.port = closed.getsockname()[1]
    assert "Connection refused" in str(refused("fetch", site.url()))


def test_the_next_address_is_asked_when_one_does_not_answer(site, monkeypatch):
    addresses = ["2606:2800:220:1::1", "93.184.216.33", "93.184.216.34"]
    site.names["clips.test"] = [*addresses[:2], *addresses]
    connect, shares = socket.socket.connect, []

    def only_the_last(self, address):
        shares.append(self.gettimeout())
        if address[0] == "93.184.216.34":
            return connect(self, address)
        site.connected.append(address[0])
        raise TimeoutError(errno.ETIMEDOUT, "gave up") if ":" in address[0] else TimeoutError

    monkeypatch.setattr(socket.socket, "connect", only_the_last)
    with fetch(site.serve(whole()), PUBLIC) as file:
        assert file.read() == BODY
    assert site.connected == addresses and shares == pytest.approx([5 / 3, 5 / 2, 5], abs=0.8)
    site.names["clips.test"] = addresses[1::-1]
    assert "does not answer" in str(refused("fetch", site.url(), PUBLIC))


def test_a_full_disk_is_an_error_and_a_failed_download_leaves_no_file(site, monkeypatch):
    files = []
    create = tempfile.TemporaryFile

    def full(**kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **kwargs: files.append(create(**kwargs)) or files[-1])
    refused("fetch", site.serve(head(Content_Length=10) + b"abc"))
    assert len(files) == 1 and files[0].closed
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    assert "No space left" in str(refused("fetch", site.serve(whole())))


def test_no_time_limit_is_a_time_limit_too(site):
    with fetch(site.serve(whole()), UrlPolicy(timeout=float("inf"), allow_private_addresses=True)) as file:
        assert file.read() == BODY


NASTY = st.sampled_from(
    [*"\\/@:#?%[]. \t\r\n\0;&=|^\u3002\uff0e\u2024\u2044\ud800", "//", "..", "%2e", "xn--", "0x", "\u017f", "@"]
)
NUMBER = st.one_of(
    st.integers(0, 256).map(str),
    st.integers(0, 2**32).map(str),
    st.integers(0, 2**32).map(hex),
    st.integers(0, 2**32).map("0{:o}".format),
)
HOST = st.one_of(
    st.sampled_from(["clips.test", "localhost", "a-b_c.xn--p1ai", "CLIPS.TEST"]),
    st.lists(NUMBER, min_size=1, max_size=5).map(".".join),
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map("[{}]".format),
    st.ip_addresses(v=4).map("[::ffff:{}]".format),
    st.text(max_size=12),
)


ODD = {
    "scheme": st.sampled_from(["HTTPS", "http", "file", "ftp", "http\u017f"]),
    "slashes": st.sampled_from(["/", "", "///", "\\\\"]),
    "user": st.sampled_from(["user:{}@", "{}@", "{}:@"]),
    "port": st.sampled_from([":", ":443", ":8443", ":0", ":65536", ":x", ":\uff14\uff14\uff13"]),
    "rest": st.sampled_from(["", "?x={}", "/\u00e9?", "#{}", "/a/b.mp4#{}"]),
}


@st.composite
def urls(draw, secret=""):
    """An https URL, but for a few odd parts and strange characters; with `secret` as its password."""
    parts = {"scheme": "https", "slashes": "//", "user": "user:{}@" if secret else "", "port": "", "rest": "/a?x={}"}
    for part in draw(st.lists(st.sampled_from(sorted(ODD)), max_size=1)):
        parts[part] = draw(ODD[part])
    scheme, slashes, user, port, rest = (part.replace("{}", secret) for part in parts.values())
    url = f"{scheme}:{slashes}{user}{draw(HOST)}{port}{rest}"
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        place = draw(st.integers(0, len(url)))
        if SECRET not in url[max(0, place - len(SECRET)) : place + len(SECRET)]:
            url = url[:place] + draw(NASTY) + url[place:]
    return url


def ends_at(address):
    """Where a connection ends, read independently: the last four bytes where an IPv6 address carries them."""
    packed = address.packed
    if packed[:12] in (bytes(10) + b"\xff\xff", bytes.fromhex("0064ff9b") + bytes(8)):
        return ipaddress.ip_address(packed[12:])
    return address


@given(urls())
@settings(max_examples=300, deadline=None)
def test_a_url_that_passes_means_to_every_reader_what_it_means_to_us(url):
    try:
        parsed = check_url(url, PUBLIC)
    except VideoError as error:
        assert error.reason in ("protocol", "address") and "\n" not in str(error)
        assert (error.reason == "protocol") == (not url.lower().startswith("https:"))
        return
    other = urlsplit(url)
    assert other.scheme == parsed.scheme == "https" and (other.port or 443) == parsed.port and other.username is None
    assert re.fullmatch(r"/[!-~]*", parsed.path) and re.fullmatch(r"[!-~]*", parsed.query or "")
    try:
        address = ipaddress.ip_address(parsed.host)
    except ValueError:
        assert parsed.host == other.hostname == parsed.host.encode("idna").decode()
        with pytest.raises(OSError):
            socket.inet_aton(parsed.host)  # the C library's reading of addresses: decimal, octal, hex, short forms
    else:
        assert ends_at(address).is_global and ipaddress.ip_address(other.hostname) == address


BLOCKS = """
    0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 168.63.129.16/32 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24
    192.0.2.0/24 192.88.99.0/24 192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4
    ::/96 ::ffff:0:0/96 64:ff9b::/96 64:ff9b:1::/48 100::/64 2001::/23 2001:db8::/32 2002::/16 3fff::/20 5f00::/16
    fc00::/7 fe80::/10 fec0::/10 ff00::/8
"""
SPECIAL = [ipaddress.ip_network(block) for block in BLOCKS.split()]
NEAR = st.builds(
    lambda block, low, step: type(block[0])(
        min(max(int(block[0] if low else block[-1]) + step, 0), 2**block.max_prefixlen - 1)
    ),
    st.sampled_from(SPECIAL),
    st.booleans(),
    st.integers(-2, 2),
)
PREFIX = st.sampled_from(["::ffff:0:0", "64:ff9b::", "::", "2002::", "2001::", "64:ff9b:1::", "2606:4700::"])
CARRYING = st.builds(
    lambda prefix, inner: ipaddress.IPv6Address(int(ipaddress.IPv6Address(prefix)) | int(inner)),
    PREFIX,
    st.one_of(st.ip_addresses(v=4), NEAR.filter(lambda address: address.version == 4)),
)


@given(st.one_of(st.ip_addresses(), NEAR, CARRYING))
@settings(max_examples=600, deadline=None)
def test_an_address_passes_just_when_it_ends_in_no_special_block(address):
    end = ends_at(address)
    public = not any(end in block for block in SPECIAL) and (
        end.version == 4 or end in ipaddress.ip_network("2000::/3")
    )
    try:
        assert check_address(str(address), PUBLIC) == address
    except VideoError as error:
        assert error.reason == "address" and not public
    else:
        assert public and end.is_global and not (end.is_multicast or end.is_unspecified or end.is_reserved)


@given(st.one_of(st.text(max_size=20), st.builds("{}{}{}".format, st.ip_addresses(), NASTY, st.ip_addresses())))
@settings(max_examples=300, deadline=None)
def test_text_that_is_no_address_is_refused_in_one_line(text):
    try:
        check_address(text, PUBLIC)
    except VideoError as error:
        assert error.reason == "address" and "\n" not in str(error) and str(error).isprintable()
    else:
        assert ends_at(ipaddress.ip_address(text)).is_global


@given(urls(secret=SECRET))
@settings(max_examples=300, deadline=None)
def test_no_spelling_of_a_url_lets_its_secrets_into_an_error(url):
    for policy in (PUBLIC, UrlPolicy(allowed_hosts=())):
        try:
            parsed = check_url(url, policy)
            assert SECRET not in repr(replace(parsed, path="/"))  # a path is no secret, whoever put a password in it
        except VideoError as error:
            assert SECRET not in f"{error} {error.source} {error.hint}"
            assert error.source.isprintable() and str(error).isprintable()
