"""The playground: a page to ask on, that says of each token who decided, and goes on from another one at a click.

    python sample.py --web                                          # http://127.0.0.1:8000/
    python sample.py --base tiny-l --web --port 0                   # any port that is free
    python sample.py --base tiny-l --web --screenshot picture.png   # a picture of it, by Chromium

A question goes to the server as JSON, and the answer comes back as a line of JSON for each token,
with what beyond/attribution.py has to say of it. An answer may begin with given tokens, which is
how one branches. The page is playground.html, and browser.py drives the browser for a picture of
it. This machine alone is served, one question at a time, and nothing is fetched from anywhere.
"""

import json
import math
import os
import select
import socket
import sys
import threading
import webbrowser
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

from beyond.attribution import (
    DECIDED,
    FULL_BAR,
    STYLE,
    WIDTH,
    Attribution,
    attribute_last,
    questions_of,
    token_name,
)
from data.checkpoint import name_of
from data.errors import UsageError
from data.files import json_fault, replacing
from data.records import is_unicode
from data.tiny_world import TINY_SIZES
from data.tokenizer import StreamDecoder, Tokenizer, is_same_family, load_tokenizer

# --------------------------------------------------------------------------------------------------
# What is asked

LONGEST_QUESTION = 4000  # characters
LONGEST_BODY = 2**16  # bytes


def is_question(text) -> bool:
    return (
        isinstance(text, str)
        and text.strip() != ""
        and len(text) <= LONGEST_QUESTION
        and is_unicode(text)
    )


def is_number(value, lowest: float, highest: float, kinds: tuple = (int, float)) -> bool:
    return (
        type(value) in kinds and lowest <= value <= highest
    )  # a bool is no number here, and nan is in no range


def is_prefix(tokens) -> bool:
    return isinstance(tokens, list) and all(
        is_number(token, 0, math.inf, (int,)) for token in tokens
    )


FIELDS: dict[
    str, tuple[str, Callable]
] = {  # of a question: what each has to be, in words and as a test
    "question": (f"a text of 1 to {LONGEST_QUESTION} characters", is_question),
    "base": ("one of the bases on the page", lambda name: isinstance(name, str)),
    "alpha": ("a number from -100 to 100", lambda value: is_number(value, -100, 100)),
    "temperature": ("a number from 0 to 100", lambda value: is_number(value, 0, 100)),
    "seed": (
        "a whole number from 0 to below 2**32",
        lambda value: is_number(value, 0, 2**32 - 1, (int,)),
    ),
    "prefix": ("a list of tokens", is_prefix),
}


def check_field(name: str, value) -> None:
    words, is_right = FIELDS[name]
    if not is_right(value):
        raise UsageError(f"{name} has to be {words}")


def read_question(body: bytes) -> Namespace:
    """What the page sent; UsageError if it is not exactly what it should be."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UsageError(json_fault(error, one_line=True)) from None
    if not isinstance(fields, dict) or fields.keys() != FIELDS.keys():
        raise UsageError(f"a question is a JSON object of {', '.join(FIELDS)}")
    for name in FIELDS:
        check_field(name, fields[name])
    return Namespace(**fields)


def first_questions(world) -> list[str]:
    """Questions to begin with; outside the tiny world there are none."""
    return questions_of(world) if world else []


# --------------------------------------------------------------------------------------------------
# What is answered


class Playground:
    """The networks behind the page. A base is loaded when it is first asked for, and kept."""

    def __init__(self, plugged, args, plug_in: Callable):
        self.args, self.plug_in = args, plug_in
        self.first = plugged
        self.bases = fitting_bases(plugged, args)
        self.loaded = {name_of(plugged.base_path): plugged}

    def settings(self) -> dict:
        """What the page begins with."""
        first = self.first
        return {
            "bases": list(self.bases),
            "guide": first.guide,
            "networks": getattr(first.guided.guided.value, "names", []),
            "alpha": self.args.alpha,
            "temperature": self.args.temperature,
            "seed": self.args.seed,
            "questions": first_questions(first.world),
            "full_bar": FULL_BAR,
            "decided": {who: text.format(guide=first.guide) for who, text in DECIDED.items()},
        }

    def load(self, name: str):
        """The run.plug.Plugged of one of the bases."""
        if name not in self.bases:
            raise UsageError(f"base has to be one of {', '.join(self.bases)}")
        if name not in self.loaded:
            value = None if self.args.expert else list(map(str, self.first.guide_paths))
            self.loaded[name] = self.plug_in(
                Namespace(**vars(self.args) | {"base": str(self.bases[name]), "value": value})
            )
        return self.loaded[name]

    def answer(
        self, asked: Namespace, tell: Callable[[dict], None], check: Callable[[], None]
    ) -> None:
        """Tell a record for each token and, last, what the base alone answers. tell and check raise when nobody listens.

        Of an answer that goes on from a prefix, the first record has the text of each token in the
        prefix.
        """
        plugged = self.load(asked.base)
        speaker, guided, tokenizer = plugged.guided, plugged.guided.guided, plugged.guided.tokenizer
        guided.alpha = asked.alpha
        args = Namespace(**vars(self.args) | {"temperature": asked.temperature, "seed": asked.seed})
        turns = [("user", asked.question)]
        # the prompt, and behind it the tokens to go on from
        prompt, options = speaker.prepare(turns, args)
        options["max_new_tokens"] -= len(asked.prefix)
        if options["max_new_tokens"] < 0 or any(token >= guided.readable for token in asked.prefix):
            raise UsageError(
                "prefix is longer than an answer may be, or has a token that is never said"
            )
        decoder = StreamDecoder(tokenizer)
        if asked.prefix:
            tell({"prefix": [decoder.push(token) for token in asked.prefix]})

        def on_token(_, token: int) -> None:
            tell(describe(attribute_last(guided, token), tokenizer, decoder.push(token)))

        has_ended = asked.prefix and asked.prefix[-1] in options["stop_ids"]
        if options["max_new_tokens"] > 0 and not has_ended:
            speaker.generate(guided, [prompt + asked.prefix], on_token=on_token, **options)
        alone = plugged.alone.answer(turns, args, on_token=lambda *_: check())
        tell({"alone": alone})


def fitting_bases(plugged, args) -> dict[str, Path]:
    """The bases on offer.

    The one asked for, the one trained on, and what is there of the same family of tokenizers.
    """
    bases = {name_of(plugged.base_path): plugged.base_path}
    if args.vocab_map:  # it is made for that base
        return bases
    family = load_tokenizer(plugged.guide_paths[0])
    for path in [
        plugged.own_path,
        *(plugged.guide_paths[0].parent / name for name in TINY_SIZES),
        Path("out/smollm2-135m"),
    ]:
        try:
            if (path / "config.json").is_file() and is_same_family(load_tokenizer(path), family):
                bases.setdefault(name_of(path), path)
        except UsageError:  # a tokenizer that cannot be read does not fit
            continue
    return bases


def describe(record: Attribution, tokenizer: Tokenizer, text: str) -> dict:
    """A token for the page: its text, its numbers, and the names of all tokens among them."""
    mentioned = {
        record.token,
        record.base_token,
        record.pushed,
        *(moved[0] for moved in record.raised + record.lowered),
    }
    return {
        **asdict(record),
        "text": text,
        "classes": record.classes,
        "names": {token: token_name(tokenizer, token) for token in mentioned},
    }


# --------------------------------------------------------------------------------------------------
# The server

LOOPBACK = ("127.0.0.1", "localhost")
PATIENCE = 30  # seconds for somebody who neither reads nor writes
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'",
}


def read_page() -> str:
    """playground.html, with what it shares with Python filled in where {{NAME}} stands."""
    page = Path(__file__).with_name("playground.html").read_text(encoding="utf-8")
    for name, value in {
        "STYLE": STYLE,
        "FULL_BAR": FULL_BAR,
        "LONGEST_QUESTION": LONGEST_QUESTION,
    }.items():
        page = page.replace("{{" + name + "}}", str(value))
    return page


class Server(ThreadingHTTPServer):
    """A thread for each request; those that ask wait their turn."""

    request_queue_size = 128

    def __init__(self, playground: Playground, port: int):
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            raise UsageError(
                f"--port {port}: {error.strerror}; choose another, or 0 for any that is free"
            ) from None
        self.playground = playground
        self.page = read_page()
        self.turn = threading.Lock()  # whose answer it is
        self.is_ending = False
        self.address = f"http://127.0.0.1:{self.server_port}/"

    def stop(self) -> None:
        """The answer under way ends at its next token; Python must not exit beneath it."""
        self.is_ending = True
        self.turn.acquire(timeout=PATIENCE)
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    timeout = PATIENCE
    disable_nagle_algorithm = True  # a token is sent when it is there
    is_streaming = False

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, TimeoutError):  # the reader has left, or neither reads nor writes
            pass

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        if self.is_foreign():
            self.refuse(403, "this page is for the machine it runs on")
        elif self.path == "/":
            self.reply(200, "text/html; charset=utf-8", self.server.page)
        elif self.path == "/settings":
            self.reply(200, "application/json", json.dumps(self.server.playground.settings()))
        else:
            self.refuse(404, "there is / and /settings to read, and /answer to ask")

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.is_foreign():
            self.refuse(403, "this page is for the machine it runs on")
        elif self.path != "/answer":
            self.refuse(404, "questions go to /answer")
        elif not (length.isascii() and length.isdigit()):
            self.refuse(411, "Content-Length does not say how long the question is")
        elif len(length) > 9 or int(length) > LONGEST_BODY:
            self.refuse(413, f"a question has at most {LONGEST_BODY} bytes")
            self.connection.settimeout(1)
            self.rfile.read(2**20)  # somebody who is still sending does not read yet
        else:
            self.answer(self.rfile.read(int(length)))

    def answer(self, body: bytes) -> None:
        server = self.server
        try:
            asked = read_question(body)
            with server.turn:
                self.check()
                server.playground.answer(asked, self.tell, self.check)
        except UsageError as error:
            if self.is_streaming:
                self.tell({"error": str(error)})
            else:
                self.refuse(400, str(error))

    def is_foreign(self) -> bool:
        """Whether it is another site's page that asks.

        Openly, or by a name of its own for this machine (DNS rebinding).
        """
        host = self.headers.get("Host", "")
        is_ours = host.removesuffix(f":{self.server.server_port}") in LOOPBACK
        return not is_ours or self.headers.get("Origin", f"http://{host}") != f"http://{host}"

    def tell(self, record: dict) -> None:
        """Send one line of the answer."""
        self.check()
        if not self.is_streaming:
            self.is_streaming = True
            self.begin(200, "application/x-ndjson")
        self.wfile.write(json.dumps(record).encode() + b"\n")

    def check(self) -> None:
        """ConnectionError if the reader has left, or the server is about to."""
        is_readable, _, _ = select.select([self.connection], [], [], 0)
        if self.server.is_ending or is_readable and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionAbortedError

    def refuse(self, status: int, message: str) -> None:
        self.reply(status, "application/json", json.dumps({"error": message}))

    def reply(self, status: int, kind: str, content: str) -> None:
        self.begin(status, kind)
        self.wfile.write(content.encode())

    def begin(self, status: int, kind: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, **HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()


def serve(plugged, args, plug_in: Callable) -> None:
    """Until Ctrl-C. plug_in(args) loads a run.plug.Plugged, for another base that is asked for."""
    server = Server(Playground(plugged, args, plug_in), args.port)
    print(f"the playground is at {server.address} (Ctrl-C ends it)", flush=True)
    has_screen = (
        sys.platform in ("darwin", "win32")
        or os.environ.get("DISPLAY")
        or os.environ.get("WAYLAND_DISPLAY")
    )
    try:
        if has_screen and sys.stdout.isatty():
            with suppress(webbrowser.Error):
                webbrowser.open(server.address)
        server.serve_forever()
    finally:
        server.stop()


# --------------------------------------------------------------------------------------------------
# A picture of it

HAS_ANSWERED = 'document.getElementById("said").textContent.startsWith("of ")'


def save_picture(plugged, args, plug_in: Callable) -> None:
    """Ask the page the first question, and write a picture of it, --screenshot."""
    from beyond.browser import Browser  # here and not at the top: --web needs no browser of ours

    question = (args.prompt or first_questions(plugged.world))[0]
    check_field("question", question)  # the page would not answer another kind
    server = Server(Playground(plugged, args, plug_in), port=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    browser = Browser(f"{server.address}#{quote(question)}", WIDTH, args.height)
    try:
        browser.wait_for(HAS_ANSWERED)
        with replacing(args.screenshot) as temporary:
            temporary.write_bytes(browser.picture())
    finally:
        browser.close()
        server.stop()
    print(f"saved {args.screenshot}")
