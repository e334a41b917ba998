"""The CNI executables: pass the request to cnid over its socket, print what it answers.

This file is installed whole, as `cymric-cni` and `cymric-cni-ipam`, and run by `python3 -IS`. A
container runtime starts it for every pod, so the interpreter's start is its whole cost: it imports
three C modules and nothing else unless something goes wrong. It knows nothing and holds nothing.

Request: one line of JSON {"version", "plugin", "env", "config"}, where `config` is standard input
as text. Answer: one line "cymric-cni <version> <exit code>", then standard output as it should be.
Source: CNI specification 1.0.0.
"""

import sys

# CPython's C halves of json, socket and os: the whole modules cost as much as the interpreter.
from _json import encode_basestring_ascii as quote
from _socket import AF_UNIX, SOCK_STREAM
from _socket import socket as open_socket
from posix import environ

PROTOCOL = 1
MAX_BYTES = 1 << 20
TIMEOUT_S = 60.0
DEFAULT_SOCKET = "/run/cymric/cni.sock"
IPAM_NAMES = ("cymric-cni-ipam", "calico-ipam")
VERSIONS = '{"cniVersion":"1.0.0","supportedVersions":["0.3.1","0.4.0","1.0.0"]}'

INVALID_ENVIRONMENT = 4
DECODING_FAILURE = 6
TRY_AGAIN = 11


def main() -> int:
    """Serve one call. Returns the exit code."""
    env = {
        name.decode(): text.decode("utf-8", "replace")
        for name, text in environ.items()
        if name.startswith(b"CNI_")
    }
    command = env.get("CNI_COMMAND", "")
    if command == "VERSION":
        print(VERSIONS)
        return 0
    config = sys.stdin.buffer.read(MAX_BYTES).decode("utf-8", "replace")
    if command not in ("ADD", "DEL", "CHECK"):
        return fail(config, INVALID_ENVIRONMENT, "CNI_COMMAND must be ADD, DEL, CHECK or VERSION")
    path = DEFAULT_SOCKET
    if '"socket"' in config:
        try:
            path = socket_path(config)
        except ValueError as error:
            return fail(
                config, DECODING_FAILURE, "the network configuration is no JSON", str(error)
            )
    name = sys.argv[0].rpartition("/")[2]
    plugin = "ipam" if name in IPAM_NAMES else "main"
    pairs = ",".join(quote(key) + ":" + quote(text) for key, text in env.items())
    request = (
        f'{{"version":{PROTOCOL},"plugin":"{plugin}","env":{{{pairs}}},"config":{quote(config)}}}\n'
    )
    try:
        status, _, output = ask(path, request.encode()).partition(b"\n")
        words = status.split()
        if len(words) != 3 or words[0] != b"cymric-cni" or int(words[1]) != PROTOCOL:
            raise OSError(f"the answer is not of protocol version {PROTOCOL}")
    except OSError as error:
        return fail(config, TRY_AGAIN, "cnid does not answer at " + path, str(error))
    sys.stdout.buffer.write(output)
    sys.stdout.buffer.flush()
    return int(words[2])


def ask(path: str, request: bytes) -> bytes:
    """Send one request, return the whole answer. Raises OSError."""
    connection = open_socket(AF_UNIX, SOCK_STREAM)
    try:
        connection.settimeout(TIMEOUT_S)
        connection.connect(path)
        connection.sendall(request)
        answer = b""
        while part := connection.recv(65536):
            answer += part
        return answer
    finally:
        connection.close()


def socket_path(config: str) -> str:
    """The socket that the network configuration names, at its top or in `ipam`."""
    import json

    tree = json.loads(config)
    if not isinstance(tree, dict):
        raise ValueError("it is no object")
    ipam = tree.get("ipam")
    inner = ipam.get("socket") if isinstance(ipam, dict) else None
    path = tree.get("socket") or inner or DEFAULT_SOCKET
    if not isinstance(path, str):
        raise ValueError("socket is no text")
    return path


def fail(config: str, code: int, message: str, details: str = "") -> int:
    """Print an error as the CNI specification wants it."""
    import json

    try:
        version = json.loads(config)["cniVersion"]
    except (ValueError, KeyError, TypeError):
        version = "1.0.0"
    error = {"cniVersion": version, "code": code, "msg": message}
    if details:
        error["details"] = details
    print(json.dumps(error))
    return 1


if __name__ == "__main__":
    sys.exit(main())
