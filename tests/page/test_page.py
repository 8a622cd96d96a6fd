"""Drives the page in headless Chromium: against a server that runs already, or against the mock of this folder.

    pip install -r tests/page/requirements.txt
    tests/page/run.sh KVFOLD MODEL                                     # all of it
    python tests/page/test_page.py                                     # the mock, all cases
    python tests/page/test_page.py http://127.0.0.1:8000/              # a server of a retrofitted model, the cases it can pass
    python tests/page/test_page.py --screenshot /tmp/page.png [--dark] # a picture of a compared answer, and no tests

Chromium is the system's (`apt-get install chromium`); --chromium says where else it is.
"""
import argparse
import base64
import contextlib
import re
import shutil
import sys
import traceback

import mock_server
from playwright.sync_api import expect, sync_playwright

PROMPT = "Once upon a time there was a girl"
#: A failed request is what some cases are about, and the browser writes each to its console.
EXPECTED = re.compile(r"^Failed to load resource: the server responded with a status of 4\d\d")


class Page:
    """The page of one case, with what the browser had to complain about."""

    def __init__(self, browser, address, **context):
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        self.address = address
        self.complaints = []
        self.page.on("console", self.heard)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        # Violations of the Content-Security-Policy, also those that the console would not show.
        self.page.add_init_script(
            "document.addEventListener('securitypolicyviolation',"
            " (e) => console.error(`CSP: ${e.violatedDirective} ${e.blockedURI}`))"
        )

    def heard(self, message):
        if message.type in ("error", "warning") and not EXPECTED.match(message.text):
            self.complaints.append(message.text)

    def open(self):
        self.page.goto(self.address)
        expect(self("model")).not_to_have_text("…")
        return self

    def __call__(self, testid):
        return self.page.get_by_test_id(testid)

    def send(self, text):
        self("composer").fill(text)
        self("composer").press("Enter")

    def answered(self, which="held", state="done", nth=-1):
        answer = self(f"answer-{which}").nth(nth)
        expect(answer).to_have_attribute("data-state", state, timeout=60_000)
        return answer

    def wait_for_text(self):
        expect(self("answer-held").last.get_by_test_id("answer-text")).not_to_have_text(re.compile("^(Reading|$)"))

    def close(self):
        self.context.close()
        assert not self.complaints, self.complaints


def loads(page):
    expect(page("version")).not_to_be_empty()
    expect(page("composer")).to_be_focused()
    expect(page("stop")).to_be_hidden()
    expect(page("page-error")).to_be_hidden()
    policy = page.page.request.get(page.address).headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy, policy


def sends_and_streams(page):
    # Each text that the answer had on its way.
    page.page.evaluate(
        """() => { window.seen = new Set(); new MutationObserver(() => {
             const text = document.querySelector('[data-testid=answer-text]');
             if (text) seen.add(text.textContent); }).observe(document.body, {subtree: true, childList: true, characterData: true}) }"""
    )
    page("max-tokens").fill("400")
    page.send(PROMPT)
    expect(page("composer")).to_have_value("")
    answer = page.answered()
    expect(page("asked")).to_have_text(PROMPT)
    assert page.page.evaluate("seen.size") > 2, "the answer came in one piece"
    expect(answer.get_by_test_id("facts")).to_contain_text("seed")
    expect(page("tokens-seen")).to_have_text(re.compile(r"^[\d,]+$"))
    for counter in ("logical-ratio", "physical-ratio"):
        expect(page(counter)).to_have_text(re.compile(r"^\d+\.\d\dx$"))
    expect(page("kv-bytes")).to_have_text(re.compile("B$"))
    expect(page("chart").get_by_role("img")).to_have_attribute("aria-label", re.compile(r"tokens seen, .* slots held"))


def heat_map_has_every_head(page):
    page.send(PROMPT)
    page.answered()
    cells = page("heat-cell")
    last = cells.last
    layers = max(int(cell) for cell in cells.evaluate_all("all => all.map(c => c.dataset.layer)")) + 1
    heads = int(last.get_attribute("data-head")) + 1
    assert cells.count() == layers * heads > 1, (cells.count(), layers, heads)
    expect(cells.first).to_have_attribute("aria-label", re.compile(r"^layer 0, head 0: [\d.,]+ of [\d,]+ \(\d+ %\)$"))
    cells.first.click()
    expect(cells.first).to_have_attribute("aria-selected", "true")
    expect(page("all-heads")).to_have_attribute("aria-pressed", "false")
    page.page.keyboard.press("ArrowRight")
    expect(page("heat-readout")).to_contain_text("layer 1, head 0")
    page.page.keyboard.press("ArrowDown")
    expect(page("heat-readout")).to_contain_text("layer 1, head 1")
    page("all-heads").click()
    expect(page("all-heads")).to_have_attribute("aria-pressed", "true")
    return layers, heads


def trace_shows_slots(page):
    page.send(PROMPT)
    page.answered()
    tokens = page("token")
    seen = int(page("tokens-seen").text_content().replace(",", ""))
    assert tokens.count() == seen, (tokens.count(), seen)
    tokens.nth(1).hover()
    expect(page("trace-detail")).to_contain_text("(token 1)")
    expect(tokens.nth(1)).to_have_class(re.compile(r"\bat\b"))
    shared = None
    for cell in page("heat-cell").all():
        cell.click()
        joined = page.page.locator(".token.fold, .token.evicted")
        if joined.count():
            shared = joined.first
            break
    assert shared, "no head folded or evicted anything"
    shared.hover()
    lit = page.page.locator(".token.lit").count()
    assert lit > 1, lit
    expect(page("trace-detail")).to_contain_text(re.compile("shares one slot|evicted"))
    assert page.page.locator("[data-testid=heat-cell].dot").count() or "shares" in page("trace-detail").text_content()
    page("composer").hover()
    page("tokens").focus()
    page.page.keyboard.press("End")
    expect(tokens.last).to_have_attribute("aria-selected", "true")
    page.page.keyboard.press("ArrowLeft")
    expect(page("tokens")).to_have_attribute("aria-activedescendant", f"token-{seen - 2}")
    expect(page("trace-detail")).to_contain_text(f"(token {seen - 2})")
    page.page.keyboard.press("ArrowUp")
    expect(page("tokens")).not_to_have_attribute("aria-activedescendant", f"token-{seen - 2}")


def compares(page):
    page("compare").check()
    page("seed").fill("7")
    page.send(PROMPT)
    held, full = page.answered(), page.answered("full")
    expect(page("difference-note")).to_be_visible()
    texts = [answer.get_by_test_id("answer-text").text_content() for answer in (held, full)]
    assert (texts[0] == texts[1]) == ("same" in page("difference-note").text_content())
    expect(page("difference")).to_have_count(0 if texts[0] == texts[1] else 2)
    for answer in (held, full):
        expect(answer.get_by_test_id("facts")).to_contain_text(re.compile(r"\d\s(.i)?B.*seed\s7$"))
    full.get_by_test_id("show-cache").click()
    expect(page("cache-of")).to_contain_text("full cache")
    expect(page("trace-blank")).to_contain_text("folds and evicts nothing")
    assert page("logical-ratio").text_content() == "1.00x"


def stops(page):
    """A fast server may be done before it is stopped, which is as good."""
    page("max-tokens").fill("400")
    page.send(PROMPT + " slow")
    with contextlib.suppress(Exception):
        page("stop").click(timeout=5_000)
    expect(page("answer-held")).to_have_attribute("data-state", re.compile("stopped|done"), timeout=60_000)
    expect(page("send")).to_be_visible()


def errors_keep_the_text(page):
    def refuse(route):
        error = {"message": "The queue is full.", "type": "rate_limit_error", "param": None, "code": None}
        route.fulfill(status=429, headers={"retry-after": "3"}, json={"error": error})

    page.page.route("**/v1/*completions", refuse)
    page.page.route("**/v1/chat/completions", refuse)
    page.send(PROMPT)
    expect(page("error")).to_have_text("429: The queue is full. The server asks to wait 3 s.")
    expect(page("composer")).to_have_value(PROMPT)
    page.page.unroute_all()
    page("again").click()
    page.answered()
    expect(page("turn")).to_have_count(1)
    expect(page("composer")).to_have_value("")


def new_chat_is_empty(page):
    page.send(PROMPT)
    page.answered()
    page("new-chat").click()
    expect(page("turn")).to_have_count(0)
    expect(page("heat-cell")).to_have_count(0)
    expect(page("tokens-seen")).to_have_text("–")
    expect(page("composer")).to_be_focused()


def fits_a_phone(page):
    page.page.set_viewport_size({"width": 360, "height": 640})
    page("compare").check()
    page.send(PROMPT + " wide")
    page.answered()
    page.answered("full")
    width = page.page.evaluate("document.documentElement.scrollWidth")
    assert width <= 360, width


def continues_text(page):
    page("mode-text").check(force=True)
    expect(page("send")).to_have_text("Continue")
    page.send(PROMPT)
    page.answered()
    page("further").click()
    page.answered()
    expect(page("turn")).to_have_count(2)
    expect(page("asked").last).to_contain_text(PROMPT)


def html_stays_text(page):
    page.send("<img src=x onerror=alert(1)><b>bold</b>")
    page.answered()
    expect(page("asked")).to_have_text("<img src=x onerror=alert(1)><b>bold</b>")
    assert page.page.locator("[data-testid=messages] img, [data-testid=messages] b").count() == 0


def traces_are_read_right(page):
    """Bits against a plain reading of them, for both methods."""
    bits = [0, 1, 1, 0, 0, 0, 0, 1, 1, 0]
    packed = base64.b64encode(sum(bit << place for place, bit in enumerate(bits)).to_bytes(2, "little")).decode()
    read = """async ([packed, method]) => {
        const { Trace, firstDifference, wordAt } = await import(new URL("page/folds.js", location));
        const trace = new Trace({ delay: 1, method, tokens: [..."abcdefghij"], folds: [[packed]] });
        const all = [...trace.tokens.keys()];
        return {
          slots: [...trace.slots(0, 0)].map(({ first, last }) => [first, last]),
          gone: all.map((t) => Number(trace.gone(0, 0, t))),
          undecided: all.filter((t) => trace.undecided(t)),
          different: [["ab", "ac", false], ["ab", "abc", false], ["ab", "abc", true], ["ab", "ab", true], ["x\U0001F600", "x\U0001F601", false]]
            .map((texts) => firstDifference(...texts)),
          words: [wordAt("one two three", 5), wordAt("one", 3), wordAt("one  two", 3)],
        }; }"""
    dmc, dms = (page.page.evaluate(read, [packed, method]) for method in ("dmc", "dms"))
    slots = [[0, 2], [3, 3], [4, 4], [5, 5], [6, 8], [9, 9]]
    assert dmc["slots"] == dms["slots"] == slots, (dmc, dms)
    assert dmc["gone"] == bits, dmc
    assert dms["gone"] == [*bits[1:], 0], dms
    assert (dmc["undecided"], dms["undecided"]) == ([9], [8, 9])
    assert dmc["different"] == [1, None, 2, None, 1], dmc
    assert dmc["words"] == [[4, 7], [3, 3], [0, 5]], dmc


# Of the mock alone, whose answers are known.


def stops_in_time(page):
    for stop in (lambda: page("stop").click(), lambda: page.page.keyboard.press("Escape")):
        page.send("slow")
        page.wait_for_text()
        stop()
        page.answered(state="stopped")
        expect(page("answer-held").last.get_by_test_id("facts")).to_contain_text("stopped")
    expect(page("trace-blank")).to_contain_text("has no trace")


def says_what_the_api_says(page):
    page.send("refuse this")
    expect(page("error")).to_contain_text("400: The prompt has 9000 tokens")
    expect(page("composer")).to_have_value("refuse this")
    page.send("break")
    answer = page.answered(state="failed")
    expect(answer.get_by_test_id("error")).to_have_text("No page is left for this request.")
    expect(answer.get_by_test_id("answer-text")).to_contain_text("Once upon a time")
    expect(page("turn")).to_have_count(1)


def keeps_the_conversation(page):
    bodies = []
    page.page.on("request", lambda r: bodies.append(r.post_data_json) if "completions" in r.url else None)
    page.page.get_by_text("System prompt", exact=True).first.click()
    page("system").fill("Be brief.")
    page("temperature").fill("0")
    page("max-tokens").fill("9")
    page("seed").fill("3")
    for said in ("one", "two"):
        page.send(said)
        page.answered()
    assert [m["role"] for m in bodies[1]["messages"]] == ["system", "user", "assistant", "user"], bodies[1]
    assert (bodies[1]["temperature"], bodies[1]["max_tokens"], bodies[1]["seed"]) == (0, 9, 3), bodies[1]
    assert bodies[1]["kvfold"] == {"enabled": True, "live": True, "trace": True}, bodies[1]
    expect(page("facts").last).to_contain_text("ended")
    page("composer").fill("first line")
    page("composer").press("Shift+Enter")
    expect(page("composer")).to_have_value("first line\n")
    page("composer").press("Control+Enter")
    expect(page("turn")).to_have_count(3)
    page.answered()


def does_without_a_template(page):
    expect(page("notice")).to_contain_text("no chat template")
    expect(page("mode-text")).to_be_checked()
    page.send(PROMPT)
    page.answered()
    page("mode-chat").check(force=True)
    page.send("Hello")
    expect(page("error").last).to_contain_text("no chat template")
    expect(page("mode-text")).to_be_checked()
    expect(page("composer")).to_have_value("Hello")


ANY_SERVER = [
    loads, sends_and_streams, heat_map_has_every_head, trace_shows_slots, compares, stops, errors_keep_the_text,
    new_chat_is_empty, fits_a_phone, continues_text, html_stays_text, traces_are_read_right,
]
#: The mock's settings, and what is tried with them.
MOCKS = [
    ({}, [stops_in_time, says_what_the_api_says, keeps_the_conversation]),
    ({"no_chat": True}, [does_without_a_template]),
    ({"method": "dms", "layers": 5, "heads": 3}, [heat_map_has_every_head, trace_shows_slots, compares]),
    ({}, ANY_SERVER),
]


def run(browser, address, cases):
    failed = 0
    for case in cases:
        page = Page(browser, address)
        try:
            case(page.open())
            page.close()
            print(f"ok      {case.__name__}")
        except Exception:
            traceback.print_exc()
            print(f"FAILED  {case.__name__}")
            failed += 1
    return failed


def photograph(browser, address, path, scheme):
    page = Page(browser, address, color_scheme=scheme, viewport={"width": 1440, "height": 900}).open()
    page("compare").check()
    page.send("Tell me a story about a girl and a bird." if page("mode-chat").is_checked() else PROMPT)
    page.answered()
    page.answered("full")
    page("heat-cell").nth(page("heat-cell").count() // 2).click()
    joined = page.page.locator(".token.fold, .token.evicted")
    if joined.count():
        joined.nth(joined.count() // 3).hover()
    page.page.screenshot(path=path)
    page.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", nargs="?", help="of a server that runs; without it the mock is started")
    parser.add_argument("--own", action="store_true", help="of the mock's cases, those that no other server has")
    parser.add_argument("--screenshot", metavar="PNG")
    parser.add_argument("--dark", action="store_true", help="the picture in dark colours")
    parser.add_argument("--chromium", default=shutil.which("chromium") or "/usr/bin/chromium")
    arguments = parser.parse_args()
    address = arguments.address and arguments.address.rstrip("/") + "/"
    mocks = MOCKS[:2] if arguments.own else MOCKS
    plans = [(address, ANY_SERVER)] if address else [(mock_server.start(**settings)[1], cases) for settings, cases in mocks]
    # Generous: what is tried here is what the page does, not how fast a busy machine does it.
    expect.set_options(timeout=30_000)
    with sync_playwright() as playwright:
        # Chromium's sandbox wants rights that root and containers lack.
        browser = playwright.chromium.launch(executable_path=arguments.chromium, args=["--no-sandbox"])
        if arguments.screenshot:
            photograph(browser, plans[0][0], arguments.screenshot, "dark" if arguments.dark else "light")
            return
        failed = sum(run(browser, address, cases) for address, cases in plans)
        browser.close()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
