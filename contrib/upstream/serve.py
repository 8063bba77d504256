"""Serves the images of a directory to one `criu restore --stream`: the least that an image streamer does.

    python3 serve.py IMAGES DIR        # binds DIR/streamer-serve.sock

It says which images CRIU did not read to their end.
"""

import array, os, socket, struct, sys, threading

images, directory = sys.argv[1:]


def feed(fd, path):
    with open(path, "rb") as image:
        try:
            while block := image.read(1 << 12):
                os.write(fd, block)
        except BrokenPipeError:
            print(os.path.basename(path), "was not read to its end")
    os.close(fd)


listener = socket.socket(socket.AF_UNIX)
listener.bind(os.path.join(directory, "streamer-serve.sock"))
listener.listen()
criu, _ = listener.accept()
while length := criu.recv(4, socket.MSG_WAITALL):
    request = criu.recv(struct.unpack("<I", length)[0], socket.MSG_WAITALL)
    name = request[2:].decode()                      # field 1, a string of less than 128 bytes
    path = os.path.join(images, name)
    there = os.path.exists(path)
    criu.sendall(struct.pack("<I", 2) + bytes([8, there]))
    if there:
        rights = array.array("i")
        _, [(_, _, data)], _, _ = criu.recvmsg(1, socket.CMSG_SPACE(4))
        rights.frombytes(data[:4])
        threading.Thread(target=feed, args=(rights[0], path)).start()
