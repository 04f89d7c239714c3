"""TLS with certificates made for the test."""

import datetime
import ipaddress
import socket
import ssl

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from flwr_moe.exchange import ExchangeClient, ExchangeServer, TensorStore, Unreachable

TOKEN = "right"


class Authority:
    """Issues certificates; all files lie in one folder."""

    def __init__(self, folder, name):
        self._folder, self._name = folder, name
        self._key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(name, self._key, name, is_ca=True)
        self.path = folder / f"{name}.pem"
        self.path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, subject, password=None, days=1):
        """Return the paths of a certificate and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(subject, key, self._name, is_ca=False, days=days)
        paths = self._folder / f"{subject}.crt", self._folder / f"{subject}.key"
        locked = serialization.NoEncryption()
        if password:
            locked = serialization.BestAvailableEncryption(password)
        paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        paths[1].write_bytes(
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked)
        )
        return paths

    def _sign(self, subject, key, issuer, is_ca, days=1):
        now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 10 * day)
            .not_valid_after(now + days * day)
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([address]), critical=False)
            .sign(self._key, hashes.SHA256())
        )


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ours"), "ours")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("strange"), "strange")


@pytest.fixture(scope="module")
def identity(authority):
    return authority.issue("server")


def client_of(server, **options):
    return ExchangeClient(server.url, TOKEN, retries=0, **options)


def serve(identity, **options):
    return ExchangeServer(
        TensorStore(), TOKEN, certfile=identity[0], keyfile=identity[1], **options
    )


def test_tensors_travel_over_tls(authority, identity):
    tensors = {"w": torch.randn(300_000, generator=torch.Generator().manual_seed(0))}
    with serve(identity) as server, client_of(server, verify=str(authority.path)) as client:
        assert server.url.startswith("https://")
        client.put("a", tensors)
        assert torch.equal(client.get("a")["w"], tensors["w"])


def test_a_server_signed_by_somebody_else_is_not_trusted(identity, stranger):
    with serve(identity) as server:
        for verify in (stranger.path, None):
            with (
                client_of(server, verify=verify) as client,
                pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"),
            ):
                client.put("a", {"w": torch.ones(3)})


def test_an_expired_certificate_is_not_trusted(authority):
    with (
        serve(authority.issue("expired", days=-1)) as server,
        client_of(server, verify=authority.path) as client,
        pytest.raises(Unreachable, match="expired"),
    ):
        client.names()


def test_a_server_for_another_host_is_not_trusted(authority, identity):
    with (
        serve(identity, host="127.0.0.2") as server,
        client_of(server, verify=authority.path) as client,
        pytest.raises(Unreachable, match="IP address mismatch"),
    ):
        client.names()


def test_client_certificates_are_required_when_asked_for(authority, identity, stranger):
    with serve(identity, client_ca=authority.path) as server:
        with client_of(server, verify=authority.path, cert=authority.issue("node")) as client:
            assert client.names() == []
        for cert in (None, stranger.issue("node")):
            with client_of(server, verify=authority.path, cert=cert) as client:
                with pytest.raises(Unreachable):
                    client.names()
                with pytest.raises(Unreachable):
                    client.health()


def test_plain_text_to_a_tls_port_and_the_reverse(authority, identity):
    with serve(identity) as server:
        plain = server.url.replace("https", "http")
        with ExchangeClient(plain, TOKEN, retries=0) as client, pytest.raises(Unreachable):
            client.names()
    with ExchangeServer(TensorStore(), TOKEN) as server:
        secure = server.url.replace("http", "https")
        with (
            ExchangeClient(secure, TOKEN, retries=0, verify=authority.path) as client,
            pytest.raises(Unreachable),
        ):
            client.names()


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_old_protocols_are_not_spoken(identity, authority):
    context = ssl.create_default_context(cafile=authority.path)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with serve(identity) as server:
        port = int(server.url.rsplit(":", 1)[1])
        with (
            socket.create_connection(("127.0.0.1", port), timeout=10) as raw,
            pytest.raises(ssl.SSLError),
        ):
            context.wrap_socket(raw, server_hostname="127.0.0.1")


def test_files_that_cannot_be_used(authority, identity, tmp_path):
    certificate, key = identity
    text, absent = tmp_path / "text", tmp_path / "absent"
    text.write_text("x")
    locked = authority.issue("locked", password=b"secret")
    other = authority.issue("other")
    servers = [
        ({"certfile": certificate}, "expected both files"),
        ({"keyfile": key}, "expected both files"),
        ({"client_ca": authority.path}, "expected both files"),
        ({"certfile": text, "keyfile": key}, "text with key .* cannot be used"),
        ({"certfile": certificate, "keyfile": absent}, "No such file"),
        ({"certfile": certificate, "keyfile": other[1]}, "MISMATCH"),
        ({"certfile": locked[0], "keyfile": locked[1]}, "locked.key cannot be used"),
        ({"certfile": certificate, "keyfile": key, "client_ca": text}, "text cannot be used"),
    ]
    for options, expected in servers:
        with pytest.raises(ValueError, match=expected) as error:
            ExchangeServer(TensorStore(), TOKEN, **options)
        assert "\n" not in str(error.value)
    clients = [
        ("https://a", {"verify": absent}, "verify is .*absent"),
        ("https://a", {"verify": text}, "verify is .*text"),
        ("https://a", {"cert": (certificate, text)}, "cert is"),
        ("https://a", {"cert": locked}, "cert is"),
        ("http://a", {"verify": authority.path}, "expected https"),
        ("http://a", {"cert": identity}, "expected https"),
    ]
    for url, options, expected in clients:
        with pytest.raises(ValueError, match=expected) as error:
            ExchangeClient(url, TOKEN, **options)
        assert "\n" not in str(error.value)
