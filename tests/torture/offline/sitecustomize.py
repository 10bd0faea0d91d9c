"""No network in this Python process and those it starts: for whoever has this folder in PYTHONPATH.

Who asks for it all the same is refused, and noted in the file that `NETWORK_ASKED_FOR` names, whatever becomes of the error.
"""

import errno
import os
import sys
from typing import Any

SENDS = {"socket.connect", "socket.sendto", "socket.sendmsg"}
LOOKUPS = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"}
NOTES = os.environ["NETWORK_ASKED_FOR"]


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook."""
    # the address of a socket between processes of one machine is a path, that of a connected one None
    if event in LOOKUPS or (event in SENDS and isinstance(arguments[1], tuple)):
        with open(NOTES, "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()} {sys.argv}: {event} {arguments[1:]}\n")
        raise OSError(errno.ENETUNREACH, "the network is blocked")


sys.addaudithook(refuse)
