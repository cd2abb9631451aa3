"""Whose traffic a request is, and whether it may go in: decided without a sandbox, from the request alone."""

from __future__ import annotations

import base64
import hashlib
import string
from urllib.parse import urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from sandbox_tools.engine.access import Keys, Refusal, refusal
from sandbox_tools.engine.routing import Address, AddressError, Asked, address_of, names_the_sandbox
from sandbox_tools.models import ENVD_PORT, INTERPRETER_PORT

ids = st.text(string.ascii_lowercase + string.digits, min_size=1, max_size=24)
ports = st.integers(1, 65535)
clients = st.sampled_from(["", "-6532622b"])
control_paths = st.sampled_from(["/sandboxes", "/sandboxes/i1/pause", "/v2/sandboxes", "/snapshots", "/templates/t"])
guest_paths = st.sampled_from(["/", "/health", "/execute", "/contexts/c", "/files", "/process.Process/Start", "/v22"])
paths = control_paths | guest_paths
domains = st.sampled_from(["localhost", "127.0.0.1:3000", "e2b.app", "sbx:8443"])

TOKENS = {"i1": "t" * 48, "i2": "u" * 48}


def asked(path: str = "/", query: str = "", method: str = "GET", **headers: str) -> Asked:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Asked(method=method, path=path, query=query, headers=Headers(named))


def address(of: Asked) -> Address | None:
    return address_of(of, TOKENS.items())


def basic(user: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:".encode()).decode()


def sign(path: str, operation: str, user: str, token: str, expiration: int | None = None) -> str:
    """As the SDKs do."""
    raw = f"{path}:{operation}:{user}:{token}" + ("" if expiration is None else f":{expiration}")
    return "v1_" + base64.b64encode(hashlib.sha256(raw.encode()).digest()).decode().rstrip("=")


# Who is meant.


@given(ids, clients, ports, guest_paths, st.sampled_from(["e2b", "ppio"]))
def test_the_sandbox_headers_name_a_port_of_a_sandbox(
    sandbox_id: str, client: str, port: int, path: str, vendor: str
) -> None:
    request = asked(path, **{f"{vendor}_sandbox_id": sandbox_id + client, f"{vendor}_sandbox_port": str(port)})

    assert address(request) == Address(sandbox_id=sandbox_id, port=port)


@given(ids, clients, ports, domains, paths)
def test_a_host_name_is_a_port_of_a_sandbox_whatever_the_path(
    sandbox_id: str, client: str, port: int, domain: str, path: str
) -> None:
    """A server that user code runs may have a path of its own that is called `/templates`."""
    request = asked(path, host=f"{port}-{sandbox_id}{client}.{domain}", x_access_token="any")

    assert address(request) == Address(sandbox_id=sandbox_id, port=port)


@given(ids, clients, ports, paths)
def test_a_user_name_that_is_an_address_routes_as_the_host_would(
    sandbox_id: str, client: str, port: int, path: str
) -> None:
    """PPIO's SDK reaches `run_code` this way where the domain is `sbx@host:port`."""
    request = asked(path, host="127.0.0.1:8443", authorization=basic(f"{port}-{sandbox_id}{client}.sbx"))

    assert address(request) == Address(sandbox_id=sandbox_id, port=port)


@given(st.text(max_size=40).filter(lambda user: "." not in user), guest_paths)
def test_any_other_user_name_is_a_user_inside_and_routes_nothing(user: str, path: str) -> None:
    assert address(asked(path, host="localhost", authorization=basic(user))) is None
    assert not names_the_sandbox(basic(user), "i1")


@given(st.text(string.printable, max_size=60), guest_paths)
def test_an_authorization_of_any_other_kind_is_left_alone(authorization: str, path: str) -> None:
    assert address(asked(path, host="localhost", authorization=authorization)) is None


@pytest.mark.parametrize(
    ("path", "port"),
    [
        ("/execute", INTERPRETER_PORT),
        ("/contexts", INTERPRETER_PORT),
        ("/contexts/c/restart", INTERPRETER_PORT),
        ("/contextsx", ENVD_PORT),
        ("/health", ENVD_PORT),
        ("/files", ENVD_PORT),
        ("/filesystem.Filesystem/Stat", ENVD_PORT),
    ],
)
def test_the_path_decides_the_service_where_no_port_is_named(path: str, port: int) -> None:
    """PPIO's SDK sends its token alone after a connect."""
    for request in (asked(path, x_access_token=TOKENS["i2"]), asked(path, ppio_sandbox_id="i2-6532622b")):
        assert address(request) == Address(sandbox_id="i2", port=port)


def test_a_token_that_no_sandbox_has_is_a_sandbox_that_is_not_found() -> None:
    """Its sandbox was killed: what a client then asks must not be answered by the control plane's `/health`."""
    assert address(asked("/health", x_access_token="gone")) == Address(sandbox_id="", port=ENVD_PORT)
    assert address(asked("/health", x_access_token="\xe9")) == Address(sandbox_id="", port=ENVD_PORT)


@given(control_paths)
def test_on_the_control_planes_paths_only_what_is_certain_names_a_sandbox(path: str) -> None:
    """PPIO's SDK sends its sandbox headers and token on control-plane calls too."""
    assert address(asked(path, x_access_token=TOKENS["i1"])) is None
    assert address(asked(path, e2b_sandbox_id="i1", e2b_sandbox_port=str(ENVD_PORT), host="localhost")) is None
    assert address(asked(path, ppio_sandbox_id="i1")) is None
    assert address(asked(path, e2b_sandbox_id="i1", e2b_sandbox_port="8000")) == Address(sandbox_id="i1", port=8000)


@given(paths, st.sampled_from(["localhost", "127.0.0.1:3000", "[::1]:3000", "engine", "10-0-0-7.example.com", "a-b.c"]))
def test_a_request_that_names_no_sandbox_is_the_control_planes(path: str, host: str) -> None:
    assert address(asked(path, host=host, x_api_key="key")) is None


@given(st.sampled_from(sorted(TOKENS)), st.text(max_size=30), st.text(max_size=9), st.none() | st.integers(0, 2**40))
def test_the_signature_of_a_file_finds_its_sandbox_and_lets_the_request_in(
    sandbox_id: str, path: str, user: str, expiration: int | None
) -> None:
    """A signed URL on the plain base address holds no sandbox id at all."""
    for method, operation in (("GET", "read"), ("POST", "write")):
        query = {"path": path, "signature": sign(path, operation, user, TOKENS[sandbox_id], expiration)}
        query |= {"username": user} if user else {}
        query |= {} if expiration is None else {"signature_expiration": str(expiration)}
        request = asked("/files", urlencode(query, errors="surrogatepass"), method)

        assert address(request) == Address(sandbox_id=sandbox_id, port=ENVD_PORT)
        assert enter(request, TOKENS[sandbox_id], now=expiration or 0) is None


@pytest.mark.parametrize(
    ("request_", "status", "words"),
    [
        (asked(host="8000-i1"), 400, "Invalid host"),
        (asked(host="8000-i1:3000"), 400, "Invalid host"),
        (asked(host="99999-i1.localhost"), 400, "Invalid sandbox port"),
        (asked(host="0-i1.localhost"), 400, "Invalid sandbox port"),
        (asked(host="8000-i_1.localhost"), 400, "Invalid sandbox ID"),
        (asked(e2b_sandbox_id="I1", e2b_sandbox_port="8000"), 400, "Invalid sandbox ID"),
        (asked(e2b_sandbox_id="i1-a-b", e2b_sandbox_port="8000"), 400, "Invalid sandbox ID"),
        (asked(e2b_sandbox_id="../i1", e2b_sandbox_port="8000"), 400, "Invalid sandbox ID"),
        (asked(e2b_sandbox_id="i1", e2b_sandbox_port="80a"), 400, "Invalid sandbox port"),
        (asked(e2b_sandbox_id="i1", e2b_sandbox_port="-1"), 400, "Invalid sandbox port"),
        (asked(e2b_sandbox_port="8000"), 400, "missing header"),
        (asked("/files", "path=a&signature=v1_x"), 401, "invalid signature"),
    ],
)
def test_what_names_a_sandbox_wrongly_is_refused_in_the_edges_words(request_: Asked, status: int, words: str) -> None:
    with pytest.raises(AddressError, match=words) as refused:
        address(request_)

    assert refused.value.status == status


# Who may come in.


def enter(
    request: Asked,
    token: str = TOKENS["i1"],
    port: int = ENVD_PORT,
    *,
    secure: bool = True,
    now: float = 0,
    **keys: str,
) -> Refusal | None:
    sandbox = Keys(token=token, secure=secure, **keys)
    return refusal(sandbox, port, request.method, request.path, request.headers, request.arguments, now)


def status(refused: Refusal | None) -> int | None:
    return refused and refused.status


@given(st.text(min_size=1, max_size=60))
def test_envd_and_execute_demand_the_token_and_no_other(wrong: str) -> None:
    wrong = wrong.encode("latin-1", "ignore").decode("latin-1")
    for path, port in (("/process.Process/Start", ENVD_PORT), ("/envs", ENVD_PORT), ("/execute", INTERPRETER_PORT)):
        assert enter(asked(path, x_access_token=TOKENS["i1"]), port=port) is None
        assert status(enter(asked(path), port=port)) == 401
        if wrong != TOKENS["i1"]:
            assert status(enter(asked(path, x_access_token=wrong), port=port)) == 401
            assert status(enter(asked(path, x_access_token=wrong), port=port, secure=False)) == 401


def test_what_needs_no_token_needs_none() -> None:
    assert enter(asked("/health", x_access_token="wrong")) is None
    assert enter(asked("/contexts"), port=INTERPRETER_PORT) is None
    assert enter(asked("/"), port=8000) is None
    assert enter(asked("/process.Process/Start"), secure=False) is None
    assert enter(asked("/files"), secure=False) is None


@pytest.mark.parametrize("path", ["/execute", "/execute/", "/execute\n", "/", "/contextsx", "/health\n"])
def test_no_spelling_of_a_path_gets_around_the_token(path: str) -> None:
    """A router may take `/execute` and a line end for `/execute`."""
    assert status(enter(asked(path), port=INTERPRETER_PORT)) == 401
    assert status(enter(asked(path), port=ENVD_PORT)) == 401


@pytest.mark.parametrize("path", ["/init", "/init/", "/init\n", "/reboot", "/reboot/\n"])
def test_how_the_engine_speaks_with_its_guest_is_nobody_elses(path: str) -> None:
    assert status(enter(asked(path, method="POST", x_access_token=TOKENS["i1"]))) == 404
    assert enter(asked(path), port=8000) is None


def test_a_traffic_token_guards_every_port_but_envds() -> None:
    for port in (8000, INTERPRETER_PORT):
        assert status(enter(asked("/contexts"), port=port, traffic_token="secret")) == 403
        assert (
            status(enter(asked("/contexts", e2b_traffic_access_token="no"), port=port, traffic_token="secret")) == 403
        )
        assert enter(asked("/contexts", e2b_traffic_access_token="secret"), port=port, traffic_token="secret") is None
    assert enter(asked("/files", x_access_token=TOKENS["i1"]), traffic_token="secret") is None


@given(st.data())
def test_a_signature_is_good_for_one_path_user_operation_token_and_time(data: st.DataObject) -> None:
    good = {"path": "/home/user/a", "username": "root", "signature_expiration": "1000"}
    good["signature"] = sign("/home/user/a", "read", "root", TOKENS["i1"], 1000)
    assert enter(asked("/files", urlencode(good)), now=1000) is None

    late = enter(asked("/files", urlencode(good)), now=1001)
    assert late == Refusal(status=401, message="signature is already expired")

    name = data.draw(st.sampled_from(sorted(good)))
    other = good | {name: data.draw(st.text(max_size=12).filter(lambda text: text != good[name]))}
    for request in (
        asked("/files", urlencode(other, errors="surrogatepass")),
        asked("/files", urlencode({key: value for key, value in good.items() if key != name})),
        asked("/files", urlencode(good), "POST"),
    ):
        assert status(enter(request, now=0)) == 401
    assert status(enter(asked("/files", urlencode(good)), TOKENS["i2"], now=0)) == 401


def test_a_files_token_replaces_its_signature_and_a_wrong_one_spoils_it() -> None:
    signed = urlencode({"path": "a", "signature": sign("a", "read", "", TOKENS["i1"])})
    assert enter(asked("/files", "path=a", x_access_token=TOKENS["i1"])) is None
    assert status(enter(asked("/files", signed, x_access_token="wrong"))) == 401
    missing = enter(asked("/files", "path=a"))
    assert missing == Refusal(status=401, message="missing signature query parameter")
