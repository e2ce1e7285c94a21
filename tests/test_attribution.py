"""beyond/attribution.py: the page, and what a browser makes of it."""

import html
import re
import shutil
import struct
import subprocess

import pytest

from beyond.attribution import BROWSERS, WIDTH, Attribution, page, screenshot
from data.errors import UsageError
from data.tokenizer import load_tokenizer
from tests.helpers import VALUE, refused, words, worked

BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed"
)


def record(token: int, decided: str = "value", kl: float = 4.0) -> Attribution:
    moved = [(token + step, 0.01, 0.4, 12.3) for step in range(4)]
    return Attribution(token, decided, 7, 0.0004, 0.97, 12.34, 3.2, kl, 9, moved, moved)


@pytest.fixture
def tokenizer(home):
    return load_tokenizer(home / "out/seed0/tiny-s")


def test_what_a_model_wrote_is_escaped(tokenizer):
    """Every token of a hostile answer, in running text and in the numbers; nothing becomes an element."""
    hostile = "<script>alert('&amp;')</script> <img src=x onerror=\"x\">"
    tokens = tokenizer.encode(hostile)
    made = page(hostile, tokenizer, [(hostile, hostile, [record(token) for token in tokens])])
    assert "<script" not in made and "<img" not in made and made.count(html.escape(hostile)) == 4
    text = re.sub('<span class="detail.*?</span>|<[^>]*>', "", made[made.index('class="tokens"') :])
    assert html.escape(hostile)[:20] in text.replace("␣", " ")
    for kind in ("src=", "href=", "url(", "@import", "<link"):  # nothing is fetched from anywhere
        assert kind not in made.replace(html.escape(hostile), "").replace("src=x", "")


def test_a_page_of_512_tokens_is_under_a_megabyte(tokenizer):
    made = page(
        "big", tokenizer, [("question", "answer", [record(400 + number) for number in range(512)])]
    )
    assert made.count('class="token value"') == 512 and 200_000 < len(made.encode()) < 1_000_000


def make_page(home, *arguments) -> str:
    """Run the command, and return what it said."""
    command = f"sample.py --explain --page out/page.html --value {VALUE} --max-new-tokens 12"
    return worked(home, command, *words(*arguments))


def test_the_command_writes_a_page_for_each_kind_of_instruction(home):
    said = make_page(home)
    made = (home / "out/page.html").read_text(encoding="utf-8")
    assert made.count("<h2>") == said.count("tokens the base agreed with") == 6
    assert (
        "saved out/page.html" in said
        and made.startswith("<!DOCTYPE html>")
        and made.rstrip().endswith("</html>")
    )
    counts = [int(number) for number in re.findall(r"of (\d+) tokens", made)]
    assert counts[0] == sum(counts[1:]) == len(re.findall('class="token (?:base|value)"', made))
    assert (
        make_page(home, "--prompt", "Greet <Mira>.", "--page", "one.html").count("base agreed") == 1
    )
    assert "Greet &lt;Mira&gt;." in (home / "one.html").read_text(encoding="utf-8")


def test_bad_input_to_the_page_is_one_line(home):
    for arguments, message in [
        (["--page", "nowhere/a.html"], "there is no folder nowhere"),
        (["--screenshot", "a.png"], "--screenshot goes with --web, or with --explain --page"),
        (["--top-p", "2"], "at most 1"),
        (["--height", "0"], "positive whole number"),
        (["--value", "none"], "none: no such folder"),
    ]:
        assert message in refused(home, "sample.py", "--explain", *arguments)
    assert "--page goes with --explain" in refused(home, "sample.py", "--page", "a.html")


def test_a_missing_browser_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match="needs Chromium"):
        screenshot(tmp_path / "a.html", tmp_path / "a.png", 500)


@needs_browser
def test_a_browser_shows_it_at_1280_pixels(home, tmp_path, tokenizer):
    """Nothing is cut off at the side, type is not small, and the numbers of one token stand there."""
    file = tmp_path / "page.html"
    records = [
        record(400 + number, "base" if number % 3 else "value", number / 50)
        for number in range(512)
    ]
    measuring = """<script>
        const words = [...document.querySelectorAll("p, h1, h2, .token, .detail.shown *")];
        const type = words.map(e => parseFloat(getComputedStyle(e).fontSize));
        const shown = [...document.querySelectorAll(".detail")].filter(e => getComputedStyle(e).display != "none");
        const boxes = [...document.querySelectorAll(".token")].map(e => e.getBoundingClientRect());
        document.title = [document.documentElement.scrollWidth, Math.min(...type), shown.length, boxes.length,
                          Math.max(...boxes.map(b => b.right)), shown[0].getBoundingClientRect().left].join(" ");</script>"""
    file.write_text(
        page("a title", tokenizer, [("A question?", "x" * 400, records)]) + measuring,
        encoding="utf-8",
    )
    command = [
        BROWSER,
        *(
            f"--headless --no-sandbox --disable-gpu --user-data-dir={tmp_path}/profile "
            f"--window-size={WIDTH},900 --dump-dom"
        ).split(),
        file.as_uri(),
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    wide, smallest, shown, tokens, right, left = map(
        float, re.search("<title>([^<]*)</title>", dom)[1].split()
    )
    assert wide <= WIDTH and smallest >= 13 and shown == 1 and tokens == 512 and right < left
    screenshot(file, tmp_path / "page.png", 700)
    header = (tmp_path / "page.png").read_bytes()[:24]
    assert header[1:4] == b"PNG" and struct.unpack(">II", header[16:]) == (WIDTH, 700)
    said = make_page(home, f"--screenshot {tmp_path}/made.png --prompt", "Greet Mira.")
    assert "made.png" in said and (tmp_path / "made.png").stat().st_size > 10_000
