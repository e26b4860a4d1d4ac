"""The server's page in a real browser: tasks chosen, images given, answers shown, without a mouse and on a phone."""

import shutil

import pytest

from lpt.serve.bank import TaskBank
from lpt.server.app import create_app
from lpt.server.watching import ClosedFolder
from tests.support.serving import in_thread, picture, write_library, write_task
from tests.support.toy import small_backbone

TOKEN = "a-token-of-the-tests"
PHONE = {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("chromium is not at hand (Debian's package is called so)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder, backbone = tmp_path_factory.mktemp("library"), small_backbone()
    write_library(folder, backbone)
    write_task(folder / "<b>odd & 'ends'.safetensors", backbone, "deep", 4)
    (folder / "broken.safetensors").write_bytes(b"x")
    closed = ClosedFolder(folder)
    with in_thread(create_app(TaskBank(backbone, closed), closed, token=TOKEN, watch_seconds=1000)) as address:
        yield address


def said_amiss(message):
    """A status such as 422 is an answer, of which a browser says that something failed to load."""
    return message.type == "error" and "status of 4" not in message.text


@pytest.fixture
def page(browser, address):
    """The page with its token given; what went wrong in it, and every address that it asked for, are looked at."""
    context = browser.new_context(color_scheme="light")
    page = context.new_page()
    page.set_default_timeout(60_000)
    mistakes, asked = [], []
    page.on("pageerror", lambda error: mistakes.append(str(error)))
    page.on("console", lambda message: mistakes.append(message.text) if said_amiss(message) else None)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.get_by_label("Token of this server").fill(TOKEN)
    page.keyboard.press("Tab")
    page.get_by_text("5 tasks on one").wait_for()
    yield page
    assert not mistakes, mistakes
    assert all(url.startswith((address, "blob:", "data:")) for url in asked)
    context.close()


def images(*pictures):
    return [{"name": f"{k}.png", "mimeType": "image/png", "buffer": picture} for k, picture in enumerate(pictures)]


def give(page, *pictures):
    page.get_by_label("Choose images").set_input_files(images(*pictures))
    page.get_by_text("answered", exact=False).first.wait_for()


def only(page, *tasks):
    """Chooses these tasks and no others."""
    for box in page.locator("#tasks input").all():
        box.set_checked(False)
    for task in tasks:
        page.get_by_role("checkbox", name=task).check()


def test_tasks_are_chosen_and_images_answered(page):
    assert page.locator("#about").inner_text().startswith("5 tasks on one untrained:")
    assert page.get_by_role("checkbox", name="auto: find it by the image").is_checked()
    only(page, "shoes", "lamps")
    page.get_by_label("Classes shown").fill("3")
    give(page, picture(1), picture(2))
    assert page.get_by_role("status").last.inner_text() == "2 images answered"
    cards = page.locator("article")
    assert cards.count() == 2
    first = cards.first
    assert first.locator("h3").all_inner_texts() == ["shoes", "lamps"]
    assert first.locator("li.class").count() == 6 and "training images" in first.inner_text()
    assert "group prompts" in first.inner_text() and " ms: " in first.inner_text()
    shares = [float(text.partition(" ")[0]) for text in first.locator("li.class > span:nth-child(2)").all_inner_texts()]
    assert shares[:3] == sorted(shares[:3], reverse=True)
    widths = first.locator(".track div").evaluate_all("bars => bars.map(bar => parseFloat(bar.style.width))")
    assert all(abs(width - share) < 0.06 for width, share in zip(widths, shares, strict=True))


def test_auto_and_what_is_no_image(page):
    give(page, picture(3), b"no image")
    page.get_by_text("2 images answered").wait_for()
    texts = page.locator("article").all_inner_texts()
    assert "cannot be decoded" in texts[0] and ("found by the image" in texts[1] or "nearest is" in texts[1])


def test_names_are_text_and_files_that_are_not_served_are_named(page):
    page.get_by_label("Search").fill("odd")
    assert page.locator(".task").all_inner_texts()[0].startswith("<b>odd & 'ends'")
    page.get_by_label("Search").fill("nothing like it")
    assert page.get_by_text("no task has such a name").is_visible()
    page.locator("#refused summary").click()
    assert "broken.safetensors" in page.locator("#refused li").inner_text()


def test_it_is_used_without_a_mouse(page):
    page.locator("body").press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.type("lamp")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert page.get_by_role("checkbox", name="lamps").is_checked()
    page.get_by_label("Search").press("Escape")
    assert page.locator(".task").count() == 6
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"files", "topk"} <= reached


def test_everything_has_a_name_for_those_who_do_not_see_it(page):
    only(page, "lamps")
    give(page, picture(1))
    unnamed = page.evaluate(
        """[...document.querySelectorAll("input, button, summary, section")].filter(element =>
             !element.labels?.length && !element.getAttribute("aria-label") && !element.textContent.trim())
           .map(element => element.outerHTML)"""
    )
    assert unnamed == []
    assert page.locator("h1").count() == 1 and page.evaluate("document.documentElement.lang") == "en"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_can_be_read_in_the_dark(page, scheme):
    page.set_viewport_size(PHONE)
    page.emulate_media(color_scheme=scheme)
    only(page, "shoes")
    give(page, picture(1))
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    luminance = """element => {
        const of = color => { const [r, g, b] = color.match(/[\\d.]+/g).map(x => x / 255)
            .map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        let back = element;
        while (getComputedStyle(back).backgroundColor === "rgba(0, 0, 0, 0)") back = back.parentElement;
        return [of(getComputedStyle(element).color), of(getComputedStyle(back).backgroundColor)];
    }"""
    for element in page.locator("p:visible, h2, h3, li span, legend, label").all()[:30]:
        text, back = element.evaluate(luminance)
        assert (max(text, back) + 0.05) / (min(text, back) + 0.05) >= 4.5, element.inner_text()
        assert (back < 0.2) == (scheme == "dark")
