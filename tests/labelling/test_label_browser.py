"""The page of label.py in a real browser: keys, what a reply cannot do, sizes and colours."""

import fast_blas  # noqa: F401  isort: skip

import json
import os
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from label_setup import REPLIES, Server, rows_of, write_samples
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium or its driver is not installed here"
)
SECONDS = 20  # that a page may take on a busy machine


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


class Page:
    """A person in front of it."""

    def __init__(self, browser, server):
        self.browser = browser
        browser.get(server.address)
        self.wait(lambda: self.count)

    def wait(self, test):
        """What `test` gives, once that is true."""
        end = time.monotonic() + SECONDS
        while not (found := test()):
            assert time.monotonic() < end, self.browser.page_source
            time.sleep(0.01)
        return found

    def script(self, code, *words):
        return self.browser.execute_script(code, *words)

    def text(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector).text

    @property
    def count(self):
        return self.text("#count")

    def press(self, keys, count=None):
        """Keys one after the other; then wait until so many are labelled."""
        for key in keys if len(keys) > 1 else [keys]:
            self.wait(lambda: not self.script("return busy"))
            ActionChains(self.browser).send_keys(key).perform()
        if count is not None:
            self.wait(lambda: self.count.startswith(f"{count} of"))


def test_labelling_with_keys(browser, tmp_path):
    write_samples(tmp_path, [REPLIES] * 8)
    with Server(tmp_path) as server:
        page = Page(browser, server)
        first = [page.text(f".reply:nth-child({n}) .text") for n in (1, 2)]
        page.press("1", 1)
        row = rows_of(tmp_path)[0]  # on the disk when the page says so
        assert row["chosen"].strip() == first[0] and row["rejected"].strip() == first[1]
        page.press("2", 2)
        assert rows_of(tmp_path)[1]["shown"] == [1, 0]
        page.press("ts", 4)
        page.press(Keys.ARROW_LEFT, 5)
        assert [r.get("tie", r.get("skipped")) for r in rows_of(tmp_path)] == [
            None,
            None,
            True,
            True,
            None,
        ]
        page.press("u", 4)
        page.press("u", 3)
        assert len(rows_of(tmp_path)) == 3
        page.press("n")
        field = page.wait(lambda: browser.switch_to.active_element)
        field.send_keys("12tsu: typed, no keys" + Keys.ENTER)
        assert page.count.startswith("3 of")
        page.press("2", 4)
        assert rows_of(tmp_path)[3]["note"] == "12tsu: typed, no keys"
        browser.refresh()  # nothing of it was only on the page
        page.wait(lambda: page.count.startswith("4 of 8"))
        assert "left" in page.text("#left")
        page.press("1111", 8)
        page.wait(lambda: "All done" in page.text("#waiting"))
        page.press("q")
        page.wait(lambda: "has ended" in page.text("#waiting"))
        assert server.process.wait(timeout=SECONDS) == 0
    assert [row["note"] for row in rows_of(tmp_path) if "note" in row] == ["12tsu: typed, no keys"]


def test_lists_and_aspects_with_keys(browser, tmp_path):
    words = ("--samples", "3", "--aspects", "helpful,harmless")
    write_samples(tmp_path, [[" one", " two", " three"]] * 3, *words)
    with Server(tmp_path, *words) as server:
        page = Page(browser, server)
        shown = [page.text(f".reply:nth-child({n}) .text") for n in (1, 2, 3)]
        assert "best" in page.text("#question")
        page.press("2")
        assert "next best" in page.text("#question")
        page.press("u")  # begins this one again
        page.press("31")
        assert "most helpful" in page.text("#question")
        page.press("3")
        assert "most harmless" in page.text("#question")
        page.press("t", 1)
        page.press("t12", 2)
    row, tie = rows_of(tmp_path)
    assert [text.strip() for text in row["responses"]] == [shown[2], shown[0], shown[1]]
    assert row["aspects"] == {"helpful": 0, "harmless": "tie"} and row["scores"] == [2, 1, 0]
    assert tie["tie"] is True and tie["aspects"] == {"helpful": 0, "harmless": 1}


def test_a_reply_alone_with_keys(browser, tmp_path):
    write_samples(tmp_path, [[" 22 30"], [" 7"]], "--samples", "1")
    with Server(tmp_path, "--samples", "1") as server:
        page = Page(browser, server)
        assert page.text("#question") == "Is it good?"
        page.press("g", 1)
        page.press("b", 2)
    assert [row["label"] for row in rows_of(tmp_path)] == [True, False]


# ------------------------------------------------------------------------------ what replies try

JS = "window.sprung=1;document.title='sprung'"
PAYLOADS = [
    f"<script>{JS}</script>",
    f'<img src=x onerror="{JS}">',
    f'<svg onload="{JS}"></svg><svg/onload={JS}>',
    '<iframe srcdoc="<script>parent.sprung=1</script>"></iframe>',
    f'<a href="javascript:{JS}">click me</a>',
    f"[click me](javascript:{JS})",
    f"[click me](  JaVaScRiPt:{JS})",
    f"[click me](javascript&colon;{JS})",
    f"[click me](java\tscript:{JS}) [x](&#106;avascript:{JS}) [y](vbscript:{JS})",
    f"<javascript:{JS}>",
    "[click me](data:text/html;base64,PHNjcmlwdD5wYXJlbnQuc3BydW5nPTE8L3NjcmlwdD4=)",
    f"![x](data:image/svg+xml,<svg/onload={JS}>) ![y](javascript:{JS})",
    f"[ref]\n\n[ref]: javascript:{JS}",
    f'![x](x"onerror="{JS}) [x](http://a.b/"onmouseover="{JS})',
    f"[x](http://a.b 'x\" onmouseover=\"{JS}')",
    f'```"><script>{JS}</script>\nx\n```\n```html onload="{JS}"\ny\n```',
    f"`</code><script>{JS}</script>`",
    f"| <script>{JS}</script> | b |\n|---|---|\n| <img src=x onerror={JS}> | 2 |",
    "</div></article><style>body{display:none}</style><base href=//evil>"
    f"<meta http-equiv=refresh content=0;url=javascript:{JS}>",
    f"<form action=//evil><button id=skip>Skip</button></form><input autofocus onfocus={JS}>",
    f"&lt;script&gt;{JS}&lt;/script&gt; &#60;img src=x onerror={JS}&#62;",
    f"<!--><script>{JS}</script>--> <![CDATA[<script>{JS}</script>]]>",
    f"{{{{constructor.constructor('{JS}')()}}}} ${{{JS}}} \u2028{JS}",
    f"<math><mtext></mtext><mglyph><style><img src=x onerror={JS}></style></mglyph></math>",
]


class Elsewhere:
    """A server that a reply may try to reach; it counts who asks."""

    def __init__(self):
        asked = self.asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"


def test_nothing_in_a_reply_or_a_prompt_runs_or_is_fetched(browser, tmp_path):
    elsewhere = Elsewhere()
    url = elsewhere.address
    reaching = [
        f"![x]({url}/image.png) <img src={url}/img> <link rel=stylesheet href={url}/css>",
        f"[x]({url}/link) <{url}/auto> {url}/plain <video src={url}/video></video>",
        f"<style>@import url({url}/import)</style> <script src={url}/script></script>",
    ]
    texts = PAYLOADS + reaching
    prompts = [f"{number} {text}" for number, text in enumerate(texts)]
    write_samples(tmp_path, [[text, f"plain {i}"] for i, text in enumerate(texts)], prompts=prompts)
    with Server(tmp_path) as server:
        page = Page(browser, server)
        browser.get_log("browser")
        for number in range(len(texts)):
            tags = page.script(
                "return [...document.querySelectorAll('#prompt *, #replies *')]"
                ".map(e => [e.tagName, ...e.getAttributeNames()].join(' '))"
            )
            allowed = {"class", "dir", "start"}  # no handler, no address, no style
            for tag in tags:
                name, *attributes = tag.split()
                assert set(attributes) <= allowed, (texts[number], tag)
                assert name not in ("A", "IMG", "SCRIPT", "STYLE", "IFRAME", "SVG", "FORM", "BASE")
            for element in browser.find_elements(By.CSS_SELECTOR, "#replies .text *"):
                page.script(
                    "arguments[0].click(); arguments[0].dispatchEvent(new "
                    "MouseEvent('mouseover', {bubbles: true}))",
                    element,
                )
            assert page.script("return window.sprung") is None, texts[number]
            assert browser.current_url == server.address, texts[number]
            assert browser.title != "sprung" and page.count == f"{number} of {len(texts)}"
            assert page.script("return getComputedStyle(document.body).display") == "flex"
            page.press("2", number + 1)
        # The policy held nothing back: there was nothing to hold back.
        said = [entry["message"] for entry in browser.get_log("browser")]
        assert not [message for message in said if "policy" in message.lower()]
    assert elsewhere.asked == []
    elsewhere.server.shutdown()


def test_the_policy_alone_would_stop_a_script_too(browser, tmp_path):
    """Were a tag to get through, the browser would not run it, nor fetch anything."""
    elsewhere = Elsewhere()
    write_samples(tmp_path, [REPLIES])
    with Server(tmp_path) as server:
        page = Page(browser, server)
        for html in (
            f'<img src=x onerror="{JS}"><svg onload="{JS}"></svg>',
            f"<img src='{elsewhere.address}/x'><video src='{elsewhere.address}/y'></video>",
            f'<a id=trap href="javascript:{JS}">x</a>',
        ):
            page.script("document.querySelector('#prompt').innerHTML = arguments[0]", html)
        page.script("document.querySelector('#trap').click()")
        page.script(
            f"const s = document.createElement('script'); s.textContent = {json.dumps(JS)};"
            "document.body.append(s)"
        )
        page.script(f"fetch('{elsewhere.address}/z').catch(() => {{}})")
        time.sleep(0.3)
        assert page.script("return window.sprung") is None and elsewhere.asked == []
        assert browser.current_url == server.address
    elsewhere.server.shutdown()


# ------------------------------------------------------------------------------ how it looks


def size(browser, width, height, dark=False):
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


LONG = "A **reply** with `code`.\n\n```\n" + "x = 1; " * 40 + "\n```\n\n" + "longword" * 40
WIDE = "\n\n| " + " | ".join("column" for _ in range(12)) + " |\n" + "|---" * 12 + "|\n"


def test_readable_on_a_phone_and_in_the_dark(browser, tmp_path):
    words = ("--samples", "4", "--aspects", "helpful")
    texts = [LONG + WIDE, "short", "LONG" * 100, "some\n\nwords"]
    write_samples(tmp_path, [texts] * 2, *words)
    with Server(tmp_path, *words) as server:
        try:
            for width, height, dark in ((1280, 800, False), (360, 740, False), (360, 740, True)):
                size(browser, width, height, dark)
                page = Page(browser, server)
                if folder := os.environ.get("SCREENSHOTS"):
                    name = f"{folder}/{width}{'_dark' * dark}.png"
                    browser.save_screenshot(name)
                assert page.script("return document.documentElement.scrollWidth") <= width
                for selector in (".reply", "button", "header", "footer", ".text"):
                    right = page.script(
                        "return Math.max(...[...document.querySelectorAll(arguments[0])]"
                        ".map(e => e.getBoundingClientRect().right))",
                        selector,
                    )
                    assert right <= width, selector
                shown = page.script("return document.querySelector('main').clientHeight")
                assert shown >= 0.5 * height  # most of the screen is for reading
                smallest = page.script(
                    "return Math.min(...[...document.querySelectorAll('.text, button, p')]"
                    ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
                )
                assert smallest >= 14
                back, text = page.script(
                    "return ['backgroundColor', 'color'].map(n => getComputedStyle("
                    "document.querySelector('.reply'))[n])"
                )
                assert contrast(back, text) >= 7  # WCAG AAA
                assert (luminance(back) < 0.2) == dark
        finally:
            browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def luminance(colour: str) -> float:
    """Relative luminance of "rgb(r, g, b)" (WCAG 2.2)."""
    parts = [int(part) / 255 for part in colour.strip("rgba()").split(",")[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_a_reply_from_right_to_left_begins_at_the_right(browser, tmp_path):
    write_samples(tmp_path, [["שלום עולם, hello", "hello, שלום"]], "--labeller", "me")
    with Server(tmp_path, "--labeller", "me") as server:
        page = Page(browser, server)
        found = page.script(
            "return [...document.querySelectorAll('.reply .text')].map("
            "(box) => [box.textContent.trim()[0], getComputedStyle(box).direction])"
        )
    assert sorted(found) == [["h", "ltr"], ["ש", "rtl"]]


def test_a_page_whose_server_is_gone_says_so_and_saves_later(browser, tmp_path):
    """A stopped process stands for a laptop that sleeps: the label is kept and sent again."""
    import signal

    write_samples(tmp_path, [REPLIES] * 3)
    with Server(tmp_path) as server:
        page = Page(browser, server)
        page.script(
            "window.fetchAgain = window.fetch; let lost = 2;"
            "window.fetch = async (...w) => { const a = await fetchAgain(...w);"
            "if (w[0] === 'label' && lost-- > 0) throw new Error('lost'); return a; }"
        )
        page.press("1")  # it arrives, and its answer gets lost twice
        page.wait(lambda: "Not saved yet" in page.text("#problem"))
        page.wait(lambda: page.count.startswith("1 of 3"))
        assert len(rows_of(tmp_path)) == 1 and page.text("#problem") == ""
        server.process.send_signal(signal.SIGSTOP)
        ActionChains(browser).send_keys("2").send_keys("1").send_keys("1").perform()
        time.sleep(0.2)
        assert page.count.startswith("1 of 3")  # nothing is said before it is true
        server.process.send_signal(signal.SIGCONT)
        page.wait(lambda: page.count.startswith("2 of 3"))
        assert len(rows_of(tmp_path)) == 2  # keys that met no question are no labels
