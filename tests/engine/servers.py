"""Servers that user code runs inside a sandbox, for the tests of what reaches them."""

from __future__ import annotations

# Ordinary ones: an ASGI application behind uvicorn, and tornado's WebSockets; both are in every sandbox.
APPLICATION = """
import asyncio, hashlib, threading
import tornado.web, tornado.websocket
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

visits = []
ticks = []

async def digest(request):
    total, read = hashlib.sha256(), 0
    async for piece in request.stream():
        total.update(piece)
        read += len(piece)
    return JSONResponse({"bytes": read, "sha256": total.hexdigest()})

async def blob(request):
    async def body():
        for _ in range(request.path_params["mb"]):
            yield bytes(range(256)) * 4096
    return StreamingResponse(body())

class Echo:
    async def __call__(self, scope, receive, send):
        await send({"type": "http.response.start", "status": 200})
        more = True
        while more:
            message = await receive()
            more = message.get("more_body", False)
            await send({"type": "http.response.body", "body": message.get("body", b"").upper(), "more_body": more})

async def asked(request):
    visits.append(request.method)
    query = request.scope["query_string"].decode()
    path = request.scope["raw_path"].decode()
    headers = [[name.decode(), value.decode("latin-1")] for name, value in request.headers.raw]
    return JSONResponse({"method": request.method, "path": path, "query": query, "headers": headers},
                        status_code=int(request.query_params.get("status", 200)),
                        headers={"x-own": "yes", "server": "mine"})

async def events(request):
    async def body():
        number = 0
        while True:
            yield f"data: {number}\\n\\n"
            ticks.append(number)
            number += 1
            await asyncio.sleep(0.01)
    return StreamingResponse(body(), media_type="text/event-stream")

app = Starlette(routes=[
    Route("/digest", digest, methods=["POST"]),
    Route("/blob/{mb:int}", blob),
    Route("/echo", Echo(), methods=["POST"]),
    Route("/events", events),
    Route("/{path:path}", asked, methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]),
])

class Talk(tornado.websocket.WebSocketHandler):
    def select_subprotocol(self, offered):
        return "second" if "second" in offered else None
    def open(self):
        self.closed = closed
    def on_message(self, message):
        if message == "headers":
            self.write_message({name: value for name, value in self.request.headers.get_all()})
        elif message == "close":
            self.close(4321, "enough")
        elif message == "flood":
            asyncio.create_task(self.flood())
        else:
            self.write_message(message, binary=isinstance(message, bytes))
    async def flood(self):
        for number in range(1000):
            await self.write_message(bytes(1 << 20), binary=True)
            sent.append(number)
    def on_close(self):
        closed.append((self.close_code, self.close_reason))

sent, closed = [], []

class Refuse(tornado.web.RequestHandler):
    def get(self):
        self.set_status(418)
        self.finish("no talk here")

async def main():
    talk = tornado.web.Application([("/talk", Talk), ("/refuse", Refuse)], websocket_max_message_size=1 << 27)
    talk.listen(8002, "127.0.0.1")
    config = uvicorn.Config(app, port=8000, lifespan="off", log_config=None, ws="none", server_header=False)
    global server
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None
    await server.serve()

threading.Thread(target=lambda: asyncio.run(main()), daemon=True).start()

import socket, time
for port in (8000, 8002):
    for _ in range(2000):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except OSError:
            time.sleep(0.01)
"""

# One that answers with exactly the bytes that it is told, and then does as it is told.
ODD = """
import base64, socket, threading
heard = []

def talk(connection):
    head = b""
    while b"\\r\\n\\r\\n" not in head:
        if not (piece := connection.recv(65536)):
            return
        head += piece
    heard.append(head)
    answer, then = head.split(b" ")[1].decode().removeprefix("/_").split("/")
    try:
        connection.sendall(base64.urlsafe_b64decode(answer))
        if then == "wait":
            connection.recv(65536)  # the end, or a request too many
            heard.append(b"end")
        while then == "forever":
            connection.sendall(b"X: y\\r\\n" * 1000)
    except OSError as error:
        heard.append(type(error).__name__.encode())
    finally:
        connection.close()

odd = socket.create_server(("127.0.0.1", 8001))

def serve():
    while True:
        connection, _ = odd.accept()
        threading.Thread(target=talk, args=(connection,), daemon=True).start()

threading.Thread(target=serve, daemon=True).start()
"""
