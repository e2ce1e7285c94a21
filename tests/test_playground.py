"""beyond/playground.py and beyond/browser.py: what the server answers and refuses, and what a browser makes of its page."""

import http.client
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from beyond.attribution import BROWSERS
from beyond.browser import Browser
from beyond.playground import (
    HAS_ANSWERED,
    LONGEST_BODY,
    LONGEST_QUESTION,
    Playground,
    Server,
    read_page,
)
from run.arguments import sample_arguments
from run.plug import plug_in
from sample import generate
from tests.helpers import ENVIRONMENT, ROOT, VALUE, byte_pairs, refused, worked

needs_browser = pytest.mark.skipif(
    not any(map(shutil.which, BROWSERS)), reason=f"none of {', '.join(BROWSERS)} is installed"
)
HOSTILE = "<script>alert('&amp;')</script> <img src=x onerror=\"x\">"


@pytest.fixture
def server(home, checkpoint, tmp_path, monkeypatch):
    """A playground that is running, with three bases to choose from, and two that do not fit."""
    shutil.copytree(home / "out", tmp_path / "out")
    shutil.copytree(
        tmp_path / "out/seed0/tiny-s", tmp_path / "out/seed0/tiny-m"
    )  # the same one under another name
    shutil.copytree(checkpoint, tmp_path / "out/smollm2-135m")
    for name, tokenizer in (("tiny-l", byte_pairs()), ("tiny-b-m", b"none")):
        shutil.copytree(tmp_path / "out/seed0/tiny-s", tmp_path / "out/seed0" / name)
        (tmp_path / "out/seed0" / name / "tokenizer.model").write_bytes(tokenizer)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys,
        "argv",
        ["sample.py", "--value", str(VALUE), *"--web --port 0 --max-new-tokens 24".split()],
    )
    args = sample_arguments()
    running = Server(Playground(plug_in(args), args, plug_in), args.port)
    threading.Thread(target=running.serve_forever, args=[0.02], daemon=True).start()
    yield running
    running.shutdown()
    running.stop()


def request(
    server, method: str, path: str, body: bytes | str | None = None, **headers: str
) -> tuple[int, str]:
    """Status and content."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=120)
    connection.request(method, path, body, headers)
    reply = connection.getresponse()
    content = reply.read().decode()
    connection.close()
    return reply.status, content


def question(text: str = "Greet Mira.", **changes) -> str:
    return json.dumps(
        {"question": text, "base": "tiny-s", "alpha": 1, "temperature": 0, "seed": 0, "prefix": []}
        | changes
    )


def ask(server, text: str = "Greet Mira.", **changes) -> tuple[list[dict], str]:
    """The records of the tokens, and the base's own answer."""
    status, content = request(server, "POST", "/answer", question(text, **changes))
    assert status == 200, content
    *tokens, last = map(json.loads, content.splitlines())
    return tokens, last["alone"]


def expected(server, text: str, alpha: float = 1.0, prefix=(), **options) -> list[int]:
    """What sample.generate says."""
    speaker = server.playground.first.guided
    prompt, settings = speaker.prepare([("user", text)], server.playground.args)
    settings["max_new_tokens"] -= len(prefix)
    with server.turn:
        speaker.guided.alpha = alpha
        return generate(speaker.guided, [prompt + list(prefix)], **settings | options)[0]


# ---- answers


def test_an_answer_streams_the_tokens_that_generate_gives(server):
    for options in ({}, {"temperature": 1.5, "seed": 7}):
        tokens, alone = ask(server, **options)
        ids = [record["token"] for record in tokens]
        assert ids == expected(server, "Greet Mira.", **options)
        text = "".join(record["text"] for record in tokens)
        assert text.strip() == server.playground.first.guided.tokenizer.decode(ids).strip()
        for record in tokens:
            assert record["decided"] in ("base", "value", "chance") and 0 <= record["p_post"] <= 1
            for token, *numbers in record["raised"] + record["lowered"]:
                assert record["names"][str(token)] and len(numbers) == 3
        if not options:
            first = server.playground.first
            assert alone == first.alone.answer([("user", "Greet Mira.")], server.playground.args)


def test_without_guidance_the_base_speaks(server):
    tokens, alone = ask(server, alpha=0)
    assert {record["decided"] for record in tokens} == {"base"} and "".join(
        record["text"] for record in tokens
    ).strip() == alone
    assert expected(server, "Greet Mira.", alpha=0) == [record["token"] for record in tokens]
    assert all(
        not record["raised"] and not record["lowered"] and record["z_delta"] == 0
        for record in tokens
    )


def test_a_branch_keeps_what_is_before_it(server):
    tokens, _ = ask(server)
    ids = [record["token"] for record in tokens]
    at = next(index for index in range(2, len(tokens)) if tokens[index]["lowered"])
    prefix = [*ids[:at], tokens[at]["lowered"][0][0]]
    (first, *branch), _ = ask(server, prefix=prefix)
    assert [record["token"] for record in branch] == expected(server, "Greet Mira.", prefix=prefix)
    said = "".join(first["prefix"]) + "".join(record["text"] for record in branch)
    whole = prefix + [record["token"] for record in branch]
    assert len(first["prefix"]) == len(prefix) and len(whole) <= 24
    assert said.strip() == server.playground.first.guided.tokenizer.decode(whole).strip()
    # from the tokens of the answer itself, the rest of it
    (_, *rest), _ = ask(server, prefix=ids[:3])
    assert [record["token"] for record in rest] == ids[3:]
    # behind the end there is nothing
    end = server.playground.first.guided.tokenizer.eos_id
    (first, *rest), _ = ask(server, prefix=[*ids[:2], end])
    assert len(first["prefix"]) == 3 and not rest


def test_bases_that_fit_are_on_offer_and_loaded_when_asked_for(server):
    _, content = request(server, "GET", "/settings")
    assert json.loads(content)["bases"] == ["tiny-s", "tiny-m", "smollm2-135m"] and set(
        server.playground.loaded
    ) == {"tiny-s"}
    assert ask(server, base="tiny-m") == ask(server) and set(server.playground.loaded) == {
        "tiny-s",
        "tiny-m",
    }
    tokens, alone = ask(
        server, base="smollm2-135m", alpha=0
    )  # not of the tiny world: asking on the page is asking enough
    assert 0 < len(tokens) <= 24 and "".join(
        record["text"] for record in tokens
    ).strip() == alone.removesuffix("\ufffd")
    shutil.rmtree("out/seed0/tiny-m")
    assert ask(server, base="tiny-m") == ask(server)  # it was kept


def test_what_people_and_models_write_is_never_part_of_the_page(server):
    """It comes as JSON, and the script makes text of it."""
    token = server.playground.first.guided.tokenizer.encode("<")[-1]
    (first, *_), _ = ask(server, HOSTILE, prefix=[token])
    assert first["prefix"][-1].endswith("<")
    status, page = request(server, "GET", "/")
    assert (
        status == 200
        and page == read_page()
        and page.count("<script>") == 1
        and "{{" not in page
        and "Mira" not in page
    )
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "src=",
        "href=",
        "url(",
        "@import",
        "<link",
    ):
        assert way not in page
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    connection.request("POST", "/answer", question(HOSTILE))
    headers = connection.getresponse().headers
    assert (
        headers["Content-Type"] == "application/x-ndjson"
        and headers["X-Content-Type-Options"] == "nosniff"
    )
    assert "default-src 'none'" in headers["Content-Security-Policy"]


# ---- what is refused


def test_only_this_machine_and_its_own_page_may_ask(server):
    port = server.server_port
    assert server.server_address[0] == "127.0.0.1"
    for host in (
        "example.com",
        f"example.com:{port}",
        "127.0.0.1.example.com",
        f"localhost:{port}.example.com",
        "127.0.0.1:1",
        "",
    ):
        assert (
            request(server, "GET", "/", Host=host)[0]
            == request(server, "POST", "/answer", question(), Host=host)[0]
            == 403
        ), host
    for origin in (
        "http://example.com",
        "null",
        f"https://127.0.0.1:{port}",
        "http://127.0.0.1:1",
        f"http://localhost:{port}",
    ):
        assert request(server, "POST", "/answer", question(), Origin=origin)[0] == 403, origin
    for host in (f"127.0.0.1:{port}", f"localhost:{port}"):
        assert (
            request(server, "POST", "/answer", question(), Host=host, Origin=f"http://{host}")[0]
            == 200
        )


def test_what_is_too_long_is_refused(server):
    assert request(server, "POST", "/answer", b" " * (LONGEST_BODY + 1))[0] == 413
    assert request(server, "POST", "/answer", b"x" * 2**20)[0] == 413
    status, content = request(
        server, "POST", "/answer", question("word " * 700)
    )  # more tokens than the base has positions
    assert status == 400 and "tokens long" in content
    assert request(server, "POST", "/answer", question("x" * 4001))[0] == 400
    assert (
        request(server, "POST", "/answer", question(prefix=[5] * 25))[0] == 400
    )  # --max-new-tokens is 24
    ask(server)


NO_QUESTIONS = [
    "",
    "{",
    "[]",
    "3",
    "null",
    "[" * 60_000,
    "9" * 5000,
    '"\\ud800"',
    question("\ud800"),
    question(""),
    question(" \n"),
    question(3),
    question(base="tiny-x"),
    question(base="../tiny-s"),
    question(base=["tiny-s"]),
    question(alpha="1"),
    question(alpha=float("nan")),
    question(alpha=1e300),
    question(alpha=True),
    question(alpha=None),
    question(temperature=-1),
    question(temperature=float("inf")),
    question(seed=1.5),
    question(seed=-1),
    question(seed=2**32),
    question(prefix=None),
    question(prefix=[-1]),
    question(prefix=[10**6]),
    question(prefix=[1.0]),
    question(prefix=[True]),
    question(prefix=[10**30]),
    question(more=1),
    b"\xff\xfe",
    b"\x00",
]


def test_a_question_that_is_none_gets_one_line(server, capfd):
    for body in NO_QUESTIONS:
        status, content = request(server, "POST", "/answer", body)
        assert (
            status == 400
            and list(json.loads(content)) == ["error"]
            and "\n" not in json.loads(content)["error"]
        ), body[:100]
    assert capfd.readouterr().err == ""


def test_other_requests_are_refused(server):
    assert (
        request(server, "GET", "/etc/passwd")[0]
        == request(server, "GET", "/../sample.py")[0]
        == 404
    )
    assert request(server, "POST", "/")[0] == 404
    assert request(server, "PUT", "/answer", question())[0] == 501
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    connection.putrequest("POST", "/answer")
    connection.endheaders()
    assert connection.getresponse().status == 411


# ---- many at once, and those who leave


def test_fifty_at_once_wait_their_turn_and_nothing_is_lost(server):
    first, at_once, most = server.playground.first, 0, 0

    def watched(*arguments, **options):
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.005)
        try:
            return generate(*arguments, **options)
        finally:
            at_once -= 1

    first.guided.generate = first.alone.generate = watched
    texts = [f"Greet number {number}." for number in range(50)]
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda text: ask(server, text, alpha=1 + len(text) % 2), texts))
    assert most == 1
    for text, (tokens, _) in zip(texts, answers):
        assert [record["token"] for record in tokens] == expected(
            server, text, alpha=1 + len(text) % 2
        )


@pytest.mark.parametrize("during", ["the answer", "the base's own answer"])
def test_an_answer_ends_when_its_reader_leaves(server, during, capfd):
    begun, go_on, ended, count = threading.Event(), threading.Event(), threading.Event(), 0
    speaker = (
        server.playground.first.guided if during == "the answer" else server.playground.first.alone
    )

    def slow(guided, prompts, *, on_token, **options):
        def on_token_slowly(prompt, token):
            nonlocal count
            count += 1
            if count == 3:
                begun.set()
                assert go_on.wait(60)
            on_token(prompt, token)

        try:
            return generate(
                guided, prompts, on_token=on_token_slowly, **options | {"stop_ids": set()}
            )
        finally:
            ended.set()

    speaker.generate = slow
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    connection.request("POST", "/answer", question())
    reply = connection.getresponse()
    assert begun.wait(60)
    reply.close()
    connection.close()
    go_on.set()
    assert ended.wait(60) and count <= 4  # of 24
    speaker.generate = generate
    ask(server)
    assert "Traceback" not in capfd.readouterr().err


# ---- the command


def test_the_command_serves_until_ctrl_c(home):
    command = [sys.executable, ROOT / "sample.py", *f"--value {VALUE} --web --port 0".split()]
    process = subprocess.Popen(
        command,
        cwd=home,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # it may be ignored here
    try:
        line = next(line for line in process.stdout if "playground" in line)
        port = int(line.partition("127.0.0.1:")[2].partition("/")[0])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/answer", question())
        assert connection.getresponse().readline().startswith(b'{"token"')  # and it goes on writing
        assert (
            "already in use"
            in refused(home, f"sample.py --value {VALUE} --web --port", port).lower()
        )
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and errors == "sample.py: stopped\n"


def test_flags_that_do_not_go_together_are_told(home):
    for arguments, message in [
        (["--web", "--chat"], "leave out --chat"),
        (["--web", "--explain"], "leave out --explain"),
        (["--port", "80"], "--port goes with --web"),
        (["--web", "--port", "65536"], "no port from 0 to 65535"),
    ]:
        assert message in refused(home, "sample.py", *arguments)


# ---- in a browser

LAYOUT = """(() => {
    const all = [...document.querySelectorAll("body *")].filter(e => e.checkVisibility() && !["SCRIPT", "STYLE"].includes(e.tagName));
    return [document.documentElement.scrollWidth, Math.min(...all.map(e => parseFloat(getComputedStyle(e).fontSize))),
            Math.max(...all.map(e => e.getBoundingClientRect().right))]; })()"""
TOKENS = '[...document.querySelectorAll(".token")].map(e => e.textContent)'


def click(browser: Browser, element: str) -> None:
    """The mouse goes where an element is in sight, and is pressed there."""
    browser.evaluate(f"{element}.scrollIntoView({{block: 'center'}})")
    left, top, width, height = browser.evaluate(
        f"(box => [box.x, box.y, box.width, box.height])({element}.getBoundingClientRect())"
    )
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        browser.call(
            "Input.dispatchMouseEvent",
            type=kind,
            x=left + width / 2,
            y=top + height / 2,
            button="left",
            clickCount=1,
        )


@pytest.mark.slow
@needs_browser
def test_a_person_asks_moves_alpha_and_branches(server):
    browser = Browser(server.address, 1280, 800)
    try:
        browser.wait_for('document.getElementById("base")?.options.length === 3')
        click(browser, 'document.getElementById("question")')
        browser.evaluate('document.getElementById("question").select()')
        browser.call("Input.insertText", text="Greet <b>Mira</b>.")
        click(browser, 'document.querySelector("form button")')
        browser.wait_for(HAS_ANSWERED)
        guided = browser.evaluate(TOKENS)
        assert len(guided) == len(expected(server, "Greet <b>Mira</b>."))
        assert browser.evaluate('document.querySelectorAll("b").length') == 0

        # alpha to 0: the base's own words
        browser.evaluate('document.getElementById("alpha").focus()')
        for _ in range(20):
            browser.call(
                "Input.dispatchKeyEvent", type="keyDown", key="ArrowLeft", windowsVirtualKeyCode=37
            )
        browser.wait_for('document.getElementById("alpha-said").textContent === "0.00"')
        browser.wait_for(
            f'{HAS_ANSWERED} && document.querySelectorAll(".token.value").length === 0'
        )
        assert len(browser.evaluate(TOKENS)) == len(expected(server, "Greet <b>Mira</b>.", alpha=0))

        # back to 1, and another token than the last one at which some were lowered
        browser.evaluate(
            'document.getElementById("alpha").value = 1; document.getElementById("alpha").onchange()'
        )
        browser.wait_for(f"{HAS_ANSWERED} && {TOKENS}.join() === {json.dumps(','.join(guided))}")
        at = max(
            index
            for index, record in enumerate(ask(server, "Greet <b>Mira</b>.")[0])
            if record["lowered"]
        )
        click(browser, f'document.querySelectorAll(".token")[{at}]')
        assert browser.evaluate(
            'document.querySelector(".token.pinned") !== null && document.querySelector("#detail dl") !== null'
        )
        click(browser, 'document.querySelector("#detail table:last-child button")')
        browser.wait_for(
            f'{HAS_ANSWERED} && document.querySelectorAll(".token.chosen").length === 1'
        )
        branch = browser.evaluate(TOKENS)
        assert branch[:at] == guided[:at] and branch[at] != guided[at]
        assert "you chose 1" in browser.evaluate('document.getElementById("said").textContent')

        # the other base, and a mistake
        browser.evaluate(
            'document.getElementById("base").value = "tiny-m"; document.getElementById("base").onchange()'
        )
        browser.wait_for(
            f'{HAS_ANSWERED} && document.getElementById("name").textContent.startsWith("tiny-m")'
        )
        browser.evaluate(
            'document.getElementById("seed").value = -1; document.getElementById("seed").onchange()'
        )
        browser.wait_for('document.getElementById("said").textContent.startsWith("seed has to be")')
    finally:
        browser.close()


@pytest.mark.slow
@needs_browser
def test_a_browser_shows_it_at_1280_and_at_390_pixels(server):
    browser = Browser(f"{server.address}#{'long' * 60}", 1280, 800)
    try:
        browser.wait_for(HAS_ANSWERED)
        for width in (1280, 390):
            browser.resize(width, 800)
            wide, smallest, right = browser.evaluate(LAYOUT)
            assert wide <= width and right <= width and smallest >= 13, (
                width,
                wide,
                right,
                smallest,
            )
    finally:
        browser.close()


@pytest.mark.slow
@needs_browser
def test_the_command_makes_a_picture(home, tmp_path):
    picture = tmp_path / "playground.png"
    command = ["sample.py", "--web", "--value", VALUE, "--screenshot", picture, "--height", "500"]
    assert f"saved {picture}" in worked(home, *command)
    header = picture.read_bytes()[:24]
    assert header[1:4] == b"PNG" and struct.unpack(">II", header[16:]) == (1280, 500)
    assert os.path.getsize(picture) > 10_000


@pytest.mark.slow
@needs_browser
def test_a_picture_takes_a_question_that_the_page_answers(home, tmp_path):
    command = ["sample.py", "--web", "--value", VALUE, "--screenshot", tmp_path / "none.png"]
    for prompt in ("", "x" * (LONGEST_QUESTION + 1)):
        said = refused(home, *command, "--prompt", prompt)
        assert "question has to be a text of 1 to 4000 characters" in said
