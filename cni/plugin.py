"""The CNI executables: pass the request to cnid over its socket, print what it answers.

Where there was a C compiler, `client.c` does this for ordinary calls, and runs this file (then
named `cymric-cni.py` and `cymric-cni-ipam.py`) for the others, with what went wrong as its
argument if cnid was asked already. Where there was none, this file is `cymric-cni` and
`cymric-cni-ipam` itself.

It is installed whole and run by `python3 -IS`. A container runtime may start it for every pod, so
the interpreter's start is its whole cost: it imports one C module, passes bytes through unread, and
leaves without tidying up. It knows nothing and holds nothing. What is only needed when something is
wrong imports what it likes.

Request: a line `cymric-cni 2 main|ipam <bytes of environment> <bytes of configuration>`, then both:
the variables named CNI_… as NAME=VALUE with a zero byte after each, and standard input. Answer: a
line `cymric-cni 2 <exit code>`, then standard output as it should be.
Source: CNI specification 1.1.0.
"""

import sys
from posix import _exit, environ, read, write

PROTOCOL = 2
MAX_BYTES = 1 << 20
TIMEOUT_S = 60
DEFAULT_SOCKET = "/run/cymric/cni.sock"
IPAM_NAMES = ("cymric-cni-ipam", "cymric-cni-ipam.py", "calico-ipam", "calico-ipam.py")
COMMANDS = (b"ADD", b"DEL", b"CHECK", b"GC", b"STATUS")
WORDS = "ADD, DEL, CHECK, GC, STATUS, VERSION"
VERSIONS = b'{"cniVersion":"1.1.0","supportedVersions":["0.3.1","0.4.0","1.0.0","1.1.0"]}\n'

INVALID_ENVIRONMENT = 4
DECODING_FAILURE = 6
TRY_AGAIN = 11
NOT_AVAILABLE = 50


def main() -> int:
    """Serve one call. Returns the exit code."""
    command = environ.get(b"CNI_COMMAND", b"")
    if command == b"VERSION":
        return say(VERSIONS)
    config = b""
    while part := read(0, 65536):
        config += part
        if len(config) > MAX_BYTES:
            return fail(b"", DECODING_FAILURE, "the configuration is over 1 MiB")
    if command not in COMMANDS:
        return fail(config, INVALID_ENVIRONMENT, "CNI_COMMAND is none of " + WORDS)
    path = DEFAULT_SOCKET
    if b'"socket"' in config:
        path = socket_path(config)
        if not path:
            return fail(config, DECODING_FAILURE, "the network configuration cannot be read")
    env = b"".join([k + b"=" + v + b"\0" for k, v in environ.items() if k.startswith(b"CNI_")])
    kind = b"ipam" if sys.argv[0].rpartition("/")[2] in IPAM_NAMES else b"main"
    unavailable = NOT_AVAILABLE if command == b"STATUS" else TRY_AGAIN
    if len(sys.argv) > 1:
        return fail(config, unavailable, "cnid does not answer at " + path, sys.argv[1])
    request = b"cymric-cni %d %s %d %d\n" % (PROTOCOL, kind, len(env), len(config)) + env + config
    try:
        status, _, output = ask(path, request).partition(b"\n")
        words = status.split()
        is_answer = len(words) == 3 and words[:2] == [b"cymric-cni", b"%d" % PROTOCOL]
        if not (is_answer and words[2].isdigit()):
            raise OSError("the answer is not of this protocol's version")
    except OSError as error:
        return fail(config, unavailable, "cnid does not answer at " + path, str(error))
    return say(output, int(words[2]))


def ask(path: str, request: bytes) -> bytes:
    """Send one request, return the whole answer. Raises OSError."""
    from _socket import socket  # the module `socket` costs as much as the interpreter

    connection = socket(1, 1)  # AF_UNIX, SOCK_STREAM
    # SO_RCVTIMEO and SO_SNDTIMEO: with Python's own time limit a full queue at cnid would be an
    # error, so it has to be the kernel's, which waits.
    limit = TIMEOUT_S.to_bytes(8, sys.byteorder) + bytes(8)
    connection.setsockopt(1, 20, limit)
    connection.setsockopt(1, 21, limit)
    connection.connect(path)
    try:
        connection.sendall(request)
    except BrokenPipeError:  # refused before all of it was read: the answer says why
        request = b""
    answer = b""
    while part := connection.recv(65536):
        answer += part
    return answer


def say(output: bytes, code: int = 0) -> int:
    """Print all of it."""
    while output:
        output = output[write(1, output) :]
    return code


def socket_path(config: bytes) -> str:
    """The socket that the configuration names, at its top or in `ipam`; empty if unreadable."""
    _, _, after = config.partition(b'"socket"')
    words = after.split(b'"', 2)
    is_single = b'"socket"' not in after and len(words) == 3 and words[0].strip() == b":"
    if is_single and words[1].startswith(b"/") and b"\\" not in words[1]:
        return words[1].decode("utf-8", "replace")  # the plain case, without a parser
    import json

    try:
        tree = json.loads(config)
        path = tree.get("socket") or (tree.get("ipam") or {}).get("socket") or DEFAULT_SOCKET
    except (ValueError, AttributeError):
        return ""
    return path if isinstance(path, str) else ""


def fail(config: bytes, code: int, message: str, details: str = "") -> int:
    """Print an error as the CNI specification wants it."""
    import json

    try:
        version = json.loads(config)["cniVersion"]
    except (ValueError, KeyError, TypeError):
        version = "1.0.0"
    error = {"cniVersion": version, "code": code, "msg": message}
    if details:
        error["details"] = details
    return say(json.dumps(error).encode() + b"\n", 1)


if __name__ == "__main__":
    _exit(main())  # a tidy end of the interpreter takes a fifth of its whole time
