"""The tenant comes from the credential; every call needs one once any is configured."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm

from octavo.admin.v1 import admin_pb2
from octavo.inference.v1 import generation_pb2, load_pb2, model_pb2, tokenizer_pb2
from octavo.services.common import api_keys
from octavo.services.common.api_keys import Caller, make_key
from octavo.services.common.errors import Reason, ServingError
from octavo.services.common.files import WatchedFile
from octavo.services.gateway.app import Gateway
from octavo.services.gateway.authentication import Authenticator
from octavo.services.gateway.config import GatewayConfig
from octavo.services.gateway.security_config import AuthenticationConfig

ISSUER, AUDIENCE = "https://issuer.test", "octavo"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def write_keys(path: Path, *entries: dict[str, object]) -> None:
    path.write_text(yaml.safe_dump(list(entries)))


def refused(authenticator: Authenticator, authorization: str, names: tuple[str, ...] = ()) -> bool:
    with pytest.raises(ServingError) as caught:
        authenticator.identify(authorization, names)
    return caught.value.reason == Reason.UNAUTHENTICATED


def test_without_credentials_configured_everybody_is_the_nameless_tenant() -> None:
    assert Authenticator(AuthenticationConfig()).identify("") == Caller()


def test_a_key_names_its_tenant_and_whether_it_is_an_admins(keys: Path) -> None:
    key, entry = make_key("acme")
    admin, admin_entry = make_key("ops", is_admin=True)
    write_keys(keys, entry, admin_entry)
    authenticator = Authenticator(AuthenticationConfig(api_keys=keys))

    assert authenticator.identify(f"Bearer {key}") == Caller("acme")
    assert authenticator.identify(f"bearer {admin}") == Caller("ops", is_admin=True)


def test_the_file_does_not_hold_the_secret(keys: Path) -> None:
    key, entry = make_key("acme")
    write_keys(keys, entry)

    assert key.rpartition("_")[2] not in keys.read_text()
    assert len({str(make_key("acme")[1]["sha256"]) for _ in range(3)}) == 3


def test_anything_but_the_whole_key_is_refused(keys: Path) -> None:
    key, entry = make_key("acme")
    other, _ = make_key("acme")
    write_keys(keys, entry)
    authenticator = Authenticator(AuthenticationConfig(api_keys=keys))
    wrong = key[:-1] + ("A" if key[-1] != "A" else "B")

    for credential in (wrong, other, key[:-1], key + "A", key.upper(), "", "oct_", key.replace("_", "-"), "x" * 20_000):
        assert refused(authenticator, f"Bearer {credential}")
    for authorization in (key, f"Basic {key}", "Bearer", "", f"Bearer  {key} x"):
        assert refused(authenticator, authorization)


def test_a_wrong_secret_is_compared_in_constant_time(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((len(left), len(right)))
        return False

    monkeypatch.setattr(api_keys.hmac, "compare_digest", compare)
    key, entry = make_key("acme")
    write_keys(keys, entry)
    authenticator = Authenticator(AuthenticationConfig(api_keys=keys))

    assert refused(authenticator, f"Bearer {key}")
    assert refused(authenticator, f"Bearer {make_key('acme')[0]}")  # of an unknown id: the same work
    assert compared == [(32, 32), (32, 32)]


def test_a_key_that_is_taken_out_of_the_file_stops_working_without_a_restart(keys: Path) -> None:
    key, entry = make_key("acme")
    write_keys(keys, entry)
    now = 0.0
    watched = WatchedFile(keys, api_keys.parse_keys, clock=lambda: now)
    assert api_keys.find_key(watched.get(), key) == Caller("acme")

    keys.write_text("[]")
    now = 2.0
    assert api_keys.find_key(watched.get(), key) is None


def test_a_broken_file_leaves_the_last_good_one_in_force(keys: Path) -> None:
    key, entry = make_key("acme")
    write_keys(keys, entry)
    now = 0.0
    watched = WatchedFile(keys, api_keys.parse_keys, clock=lambda: now)

    for number, broken in enumerate(("{", "- id: 1", "x", "")):
        keys.write_text(broken)
        now = 2.0 * (number + 1)
        assert api_keys.find_key(watched.get(), key) == Caller("acme")


@pytest.mark.parametrize("content", ["{", "- id: 1", "just text", "- 5", "- {id: a, salt: zz, sha256: '', tenant: t}"])
def test_a_broken_file_is_refused_at_the_start(keys: Path, content: str) -> None:
    keys.write_text(content)

    with pytest.raises(ValueError, match=r"keys\.yaml"):
        Authenticator(AuthenticationConfig(api_keys=keys))


@pytest.mark.parametrize("tenant", ["", " ", "a b", "a\n", "é", "-a", "x" * 129])
def test_a_tenants_name_is_plain(tenant: str) -> None:
    with pytest.raises(ValueError, match="tenant"):
        make_key(tenant)


@pytest.fixture(scope="module")
def signer() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest.fixture
def tokens(tmp_path: Path, signer: rsa.RSAPrivateKey) -> Authenticator:
    public = json.loads(RSAAlgorithm.to_jwk(signer.public_key()))
    jwks = tmp_path / "jwks.json"
    jwks.write_text(json.dumps({"keys": [{**public, "kid": "k1", "alg": "RS256", "use": "sig"}]}))
    return Authenticator(AuthenticationConfig(jwks=jwks, issuer=ISSUER, audience=AUDIENCE))


def claims(**changes: Any) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC)
    values = {"iss": ISSUER, "aud": AUDIENCE, "sub": "acme", "exp": now + datetime.timedelta(minutes=5), **changes}
    return {name: value for name, value in values.items() if value is not None}


def signed(signer: Any, algorithm: str = "RS256", kid: str | None = "k1", **changes: Any) -> str:
    return "Bearer " + jwt.encode(claims(**changes), signer, algorithm, headers={"kid": kid} if kid else {})


def test_a_token_names_its_tenant(tokens: Authenticator, signer: rsa.RSAPrivateKey) -> None:
    assert tokens.identify(signed(signer)) == Caller("acme")
    assert tokens.identify(signed(signer, kid=None)) == Caller("acme")


def test_a_token_for_others_or_past_its_time_is_refused(tokens: Authenticator, signer: rsa.RSAPrivateKey) -> None:
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=5)
    wrong: list[dict[str, Any]] = [
        {"iss": "x"},
        {"aud": "x"},
        {"exp": past},
        {"exp": None},
        {"sub": None},
        {"sub": "a b"},
    ]
    for changes in wrong:
        assert refused(tokens, signed(signer, **changes))
    assert refused(tokens, signed(signer, kid="k2"))


def test_only_the_keys_owner_can_sign(tokens: Authenticator, signer: rsa.RSAPrivateKey, tmp_path: Path) -> None:
    stranger = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    assert refused(tokens, signed(stranger))
    assert refused(tokens, "Bearer " + jwt.encode(claims(), None, "none", headers={"kid": "k1"}))
    assert refused(tokens, signed("a shared secret that is long enough", "HS256"))
    assert refused(tokens, "Bearer a.b.c")


def test_a_verified_certificate_names_its_tenant_only_if_that_is_wanted() -> None:
    names = ("https://x.test", "spiffe://acme.test/ns/a/sa/b")

    assert Authenticator(AuthenticationConfig(certificates=True)).identify("", names) == Caller("acme.test/ns/a/sa/b")
    assert refused(Authenticator(AuthenticationConfig(certificates=True)), "", ("https://x.test",))


def test_a_prefix_keeps_the_tenants_of_one_kind_of_credential_apart(
    tokens: Authenticator, signer: rsa.RSAPrivateKey, tmp_path: Path
) -> None:
    both = AuthenticationConfig(
        jwks=tmp_path / "jwks.json",
        issuer=ISSUER,
        audience=AUDIENCE,
        certificates=True,
        token_prefix="jwt:",
        certificate_prefix="spiffe:",
    )
    authenticator = Authenticator(both)

    assert authenticator.identify(signed(signer)) == Caller("jwt:acme")
    assert authenticator.identify("", ("spiffe://acme",)) == Caller("spiffe:acme")
    assert refused(authenticator, signed(signer, sub=""))
    assert refused(authenticator, "", ("spiffe://",))


def test_several_kinds_of_credentials_need_prefixes(config: GatewayConfig, tmp_path: Path) -> None:
    """One kind alone does not: its tenants are what they were."""
    file = tmp_path / "file"
    file.touch()
    keys: dict[str, Any] = {"api_keys": file}
    token: dict[str, Any] = {"jwt_jwks": file, "jwt_issuer": "i", "jwt_audience": "a"}
    tls = {"tls_certificate": file, "tls_key": file, "tls_client_ca": file}
    certificates: dict[str, Any] = {"certificate_tenants": True, **tls}
    for alone in (keys, token, certificates):
        dataclasses.replace(config, **alone)
    for together in (keys | token, keys | certificates, token | certificates):
        with pytest.raises(ValueError, match="tenant-prefix must be set"):
            dataclasses.replace(config, **together)
    all_kinds = keys | token | certificates
    for prefix in ("x:", "x", "x:y"):
        with pytest.raises(ValueError, match="begin with each other"):
            dataclasses.replace(config, **all_kinds, jwt_tenant_prefix="x:", certificate_tenant_prefix=prefix)
    with pytest.raises(ValueError, match="letters"):
        dataclasses.replace(config, **token, jwt_tenant_prefix=" ")
    dataclasses.replace(config, **all_kinds, jwt_tenant_prefix="jwt:", certificate_tenant_prefix="spiffe:")


@pytest.mark.parametrize("admin", [False, True])
async def test_every_method_but_health_needs_a_credential(keys: Path, config: GatewayConfig, admin: bool) -> None:
    """Over the wire, for every method that there is."""
    key, entry = make_key("acme")
    write_keys(keys, entry)
    gateway = Gateway(dataclasses.replace(config, api_keys=keys, admin_address="127.0.0.1:0"))
    await gateway.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.admin_port if admin else gateway.port}") as channel:
            for method in methods_of(*([admin_pb2] if admin else PUBLIC)):
                assert await code(channel, method) == grpc.StatusCode.UNAUTHENTICATED, method
                stranger = f"Bearer {make_key('acme')[0]}"
                assert await code(channel, method, stranger) == grpc.StatusCode.UNAUTHENTICATED, method
                if admin:
                    assert await code(channel, method, f"Bearer {key}") == grpc.StatusCode.PERMISSION_DENIED, method
            if not admin:
                assert await code(channel, "/grpc.health.v1.Health/Check") == grpc.StatusCode.OK
                assert await code(channel, "/octavo.inference.v1.ModelService/ListModels", f"Bearer {key}") == OK
    finally:
        await gateway.stop(0)


OK = grpc.StatusCode.OK
PUBLIC = (generation_pb2, load_pb2, model_pb2, tokenizer_pb2)


def methods_of(*modules: Any) -> list[str]:
    services = [service for module in modules for service in module.DESCRIPTOR.services_by_name.values()]
    found = [f"/{service.full_name}/{method.name}" for service in services for method in service.methods]
    assert found
    reflection = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    return found if admin_pb2 in modules else [*found, reflection]


async def code(channel: grpc.aio.Channel, method: str, authorization: str = "") -> grpc.StatusCode:
    """The status of a call with an empty request."""
    call: Any = channel.stream_stream(method)(metadata=(("authorization", authorization),) if authorization else ())
    try:
        await call.write(b"")
        await call.done_writing()
        while await call.read() is not grpc.aio.EOF:
            pass
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        pass  # the code says it
    status: grpc.StatusCode = await call.code()
    return status
