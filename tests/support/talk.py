"""Programs that talk in namespaces: a server of TCP ports, a probe, and a flood of datagrams.

Run as a script by the interpreter of the host, so only its standard library is used.

    talk.py serve <port>…                    accepts on all addresses of both families
    talk.py probe <address> <port>           exit code 0 if a connection is accepted within a second
    talk.py hold <address> <port>            connects, then echoes a line for every line of stdin
    talk.py receive <port>…                  counts datagrams; prints `<port> <count>…` when asked
    talk.py flood <address> <port>…          datagrams to each port until asked how many
"""

from __future__ import annotations

import selectors
import socket
import sys

PAUSE_S = 0.002
SO_RCVBUFFORCE = 33


def serve(ports: list[int]) -> None:
    """Accept connections and answer what they send."""
    chosen = selectors.DefaultSelector()
    listeners = [socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
                 for port in ports]  # fmt: skip
    for one in listeners:
        chosen.register(one, selectors.EVENT_READ)
    print("ready", flush=True)
    while True:
        for key, _ in chosen.select():
            caller = key.fileobj
            assert isinstance(caller, socket.socket)
            if caller in listeners:
                chosen.register(caller.accept()[0], selectors.EVENT_READ)
                continue
            try:
                data = caller.recv(4096)
            except OSError:
                data = b""
            if data:
                caller.sendall(data)
            else:
                chosen.unregister(caller)
                caller.close()


def probe(address: str, port: int) -> None:
    """One connection."""
    socket.create_connection((address, port), timeout=1.0).close()


def hold(address: str, port: int) -> None:
    """One connection for as long as stdin is open; a line is answered by `ok` or `lost`."""
    one = socket.create_connection((address, port), timeout=5.0)
    one.settimeout(1.0)
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            one.sendall(line.encode())
            print("ok" if one.recv(4096) else "lost", flush=True)
        except OSError:
            print("lost", flush=True)


def receive(ports: list[int]) -> None:
    """Count datagrams until stdin says something; then tell, and go on."""
    chosen = selectors.DefaultSelector()
    count_by_port = dict.fromkeys(ports, 0)
    for port in ports:
        one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        one.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 22)
        one.bind(("0.0.0.0", port))
        chosen.register(one, selectors.EVENT_READ, port)
    chosen.register(sys.stdin, selectors.EVENT_READ, None)
    print("ready", flush=True)
    while True:
        for key, _ in chosen.select():
            if key.data is None:
                if not sys.stdin.readline():
                    return
                print(*(f"{port} {count}" for port, count in count_by_port.items()), flush=True)
            else:
                assert isinstance(key.fileobj, socket.socket)
                key.fileobj.recv(64)
                count_by_port[key.data] += 1


def flood(address: str, ports: list[int]) -> None:
    """Datagrams from ever new ports, so that each is judged as a new connection."""
    chosen = selectors.DefaultSelector()
    chosen.register(sys.stdin, selectors.EVENT_READ)
    print("ready", flush=True)
    number = 0
    while not chosen.select(PAUSE_S):
        for port in ports:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
                one.bind(("", 20000 + number % 40000))
                one.sendto(b"x", (address, port))
        number += 1
    print(number, flush=True)


def main(words: list[str]) -> None:
    """See the chapter."""
    match words:
        case ["serve", *ports]:
            serve(list(map(int, ports)))
        case ["probe", address, port]:
            probe(address, int(port))
        case ["hold", address, port]:
            hold(address, int(port))
        case ["receive", *ports]:
            receive(list(map(int, ports)))
        case ["flood", address, *ports]:
            flood(address, list(map(int, ports)))


if __name__ == "__main__":
    main(sys.argv[1:])
