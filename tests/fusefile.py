"""A file system in user space that answers nobody, and a message that carries a file of it.

Run as a script: ``fusefile.py FOLDER SOCKET_NUMBER``. It mounts itself, opens a file, and sends that
as the layer of a snapshot. Whoever else asks something of the file waits until this process ends, which it
does with its standard input.
"""

import ctypes
import os
import socket
import struct
import sys
import threading

LOOKUP, GETATTR, OPEN, FLUSH, INIT = 1, 3, 14, 25, 26
HEADER = struct.Struct("<IIQQIIIHH")
MNT_DETACH = 2


def attributes(node: int) -> bytes:
    mode = 0o40755 if node == 1 else 0o100644
    return struct.pack("<6Q10I", node, 1 << 20, 8, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


ANSWERS = {
    INIT: struct.pack("<4I2HI", 7, 31, 0, 0, 16, 12, 4096).ljust(64, b"\0"),
    LOOKUP: struct.pack("<4Q2I", 2, 0, 3600, 3600, 0, 0) + attributes(2),
    OPEN: struct.pack("<QII", 1, 0, 0),
}


def serve(device: int) -> None:
    """Answer what this process asks, and the kernel by itself; nobody else."""
    while True:
        request = os.read(device, 1 << 16)
        _, opcode, unique, node, _, _, asker, *_ = HEADER.unpack_from(request)
        if asker not in (0, os.getpid()):
            continue
        answer = ANSWERS.get(opcode)
        if opcode == GETATTR:
            answer = struct.pack("<QII", 3600, 0, 0) + attributes(node)
        error = 0 if answer is not None or opcode == FLUSH else -38
        body = answer or b""
        os.write(device, struct.pack("<IiQ", 16 + len(body), error, unique) + body)


def main() -> None:
    from layerfiles import layer_id
    from rawmessages import snapshot_message

    folder, number = sys.argv[1].encode(), int(sys.argv[2])
    libc = ctypes.CDLL(None, use_errno=True)
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = b"fd=%d,rootmode=40000,user_id=0,group_id=0" % device
    if libc.mount(b"test", folder, b"fuse", 0, options):
        raise SystemExit(f"mount: {os.strerror(ctypes.get_errno())}")
    try:
        threading.Thread(target=serve, args=(device,), daemon=True).start()
        file = os.open(folder + b"/layer", os.O_RDWR | os.O_CLOEXEC)
    finally:
        libc.umount2(folder, MNT_DETACH)
    with socket.socket(fileno=number) as sock:
        socket.send_fds(sock, [snapshot_message([layer_id(1)])], [file])
        # Left to the end of this process, it would wait for an answer of its own for ever.
        os.close(file)
        sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
