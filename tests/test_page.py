"""The page that stands alone, in a real browser."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import chromium, console, show
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from quire.pictures.model import PAGE, Pages, Picture, Row, Sample, Total
from quire.pictures.page import frame, page
from quire.pictures.text import printable

OWN = "document.title='owned'"
HOSTILE = f'</script><script>{OWN}</script><img src=x onerror="{OWN}">\u202e\x00\n'


def row(first: int, count: int, kind: str = "private data", name: str = "", **more: object) -> Row:
    given = {"protection": "rw-p", "committed": count * PAGE, "resident": PAGE, **more}
    return Row(first * PAGE, (first + count) * PAGE, kind, name, **given)


ROWS = (
    row(0x555555554, 4, "image", "/usr/bin/program", protection="r-xp", details=(("Offset", "0x1000"),)),
    row(0x555560000, 33, "heap", "[heap]", resident=20 * PAGE),
    row(
        0x7F0000000,
        8,
        name=HOSTILE,
        pages=Pages.of(8, [0, 1, 4], shared=[0], swapped=[2], written=[1]),
    ),
    row(0x7F0000010, 1 << 18, "mapped file", "/data", resident=0),
    row(0x7FFFFFF00, 33, "stack", "[stack]"),
    row(0xFFFFFFFFFF600, 1, "kernel", "[vsyscall]", resident=None),
)
LATER = (
    ROWS[0],
    row(0x555560000, 40, "heap", "[heap]", resident=30 * PAGE),
    *ROWS[3:],
    row(0xFFFFFFFFFF700, 1),
)
ONE = Picture(
    HOSTILE, (Sample("now", ROWS, (Total("page tables", 0, 0, PAGE, PAGE),), note="partly read"),), HOSTILE
)
TWO = Picture("two", (Sample("0 s", ROWS, time_s=0), Sample("1 s", LATER, time_s=1)))


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    with chromium() as started:
        yield started


@pytest.fixture
def loaded(
    driver: webdriver.Chrome, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[webdriver.Chrome]:
    """The page of the picture asked for, loaded; nothing in the console when the test ends."""
    path = tmp_path / "page.html"
    path.write_text(page(getattr(request, "param", ONE)), "utf-8")
    show(driver, path)
    assert driver.execute_script("return document.body.dataset.ready") == "yes"
    yield driver
    assert console(driver) == []


def names(driver: webdriver.Chrome) -> list[str]:
    cells = driver.find_elements(By.CSS_SELECTOR, "#body > div > div:last-child")
    return [cell.get_property("textContent") for cell in cells]


def kind_button(driver: webdriver.Chrome, kind: str) -> webdriver.remote.webelement.WebElement:
    return driver.find_element(By.XPATH, f"//table[@id='kinds']//button[contains(., '{kind}')]")


def text_of(driver: webdriver.Chrome, name: str) -> str:
    return driver.find_element(By.ID, name).get_property("textContent")


def keys(driver: webdriver.Chrome, name: str, *pressed: str) -> None:
    driver.execute_script("document.getElementById(arguments[0]).focus()", name)
    ActionChains(driver).send_keys(*pressed).perform()


# Without a browser


def test_page_is_whole_and_loads_nothing() -> None:
    drawn = page(ONE)
    seen = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            seen.extend((tag, name) for name, _ in attrs)

    Reader().feed(drawn)
    assert len(seen) > 50
    assert not {name for _, name in seen} & {"src", "href", "action", "style", "onclick", "onerror"}
    assert not re.search(r"@import|url\(|https?:|fetch\(|innerHTML|eval\(", drawn)
    assert "default-src 'none'" in drawn
    # The data element and the script: nothing of a name ends or opens one.
    assert drawn.lower().count("<script") == drawn.lower().count("</script") == 2
    assert "$" not in re.sub(r"<script.*</script>", "", drawn, flags=re.DOTALL)


def test_page_needs_samples_and_page_boundaries() -> None:
    with pytest.raises(ValueError, match="one sample"):
        page(Picture("none", ()))
    with pytest.raises(ValueError, match="0x1001 is not at the boundary"):
        page(Picture("odd", (Sample("now", (Row(0x1000, 0x1001, "heap"),)),)))


def test_frame_holds_the_page() -> None:
    framed = frame(ONE)
    assert framed.count("<") == 2, "everything of the page is escaped"
    assert 'sandbox="allow-scripts"' in framed


# In a browser


def test_names_are_shown_and_not_run(loaded: webdriver.Chrome) -> None:
    assert loaded.title.startswith("</script>")
    assert loaded.find_element(By.TAG_NAME, "h1").text == printable(HOSTILE)
    assert printable(HOSTILE) in names(loaded)
    assert not loaded.find_elements(By.TAG_NAME, "img")
    assert text_of(loaded, "note") == "partly read"


def test_kinds_and_counts(loaded: webdriver.Chrome) -> None:
    lines = [line.text for line in loaded.find_elements(By.CSS_SELECTOR, "#kinds tbody tr")]
    assert lines == [
        "image 1 16 KiB 16 KiB 4 KiB",
        "mapped file 1 1 GiB 1 GiB 0",
        "heap 1 132 KiB 132 KiB 80 KiB",
        "private data 1 32 KiB 32 KiB 4 KiB",
        "stack 1 132 KiB 132 KiB 4 KiB",
        "kernel 1 4 KiB 4 KiB 0",
        "page tables 0 0 4 KiB 4 KiB",
        "all 6 1 GiB 1 GiB 96 KiB",
    ]
    bars = loaded.find_elements(By.CSS_SELECTOR, "#bars .stack")
    assert [bar.get_attribute("aria-label") for bar in bars] == [
        "virtual by kind", "committed by kind", "resident by kind",
    ]  # fmt: skip
    heap = bars[2].find_element(By.CSS_SELECTOR, "[aria-label^=heap]")
    assert heap.get_attribute("aria-label") == "heap: 80 KiB, 83 %"
    assert heap.size["width"] > 0.8 * bars[2].size["width"]


def test_click_on_a_kind_filters(loaded: webdriver.Chrome) -> None:
    kind_button(loaded, "heap").click()
    assert names(loaded) == ["[heap]"]
    assert text_of(loaded, "count") == "1 of 6 mappings"
    assert kind_button(loaded, "heap").get_attribute("aria-pressed") == "true"
    ActionChains(loaded).key_down(Keys.SHIFT).click(kind_button(loaded, "stack")).key_up(Keys.SHIFT).perform()
    assert names(loaded) == ["[heap]", "[stack]"]
    loaded.find_element(By.ID, "clear").click()
    assert len(names(loaded)) == 6
    loaded.find_element(By.CSS_SELECTOR, "#bars .stack [aria-label^=image]").click()
    assert names(loaded) == ["/usr/bin/program"]


def test_kinds_by_keyboard(loaded: webdriver.Chrome) -> None:
    loaded.execute_script("arguments[0].focus()", kind_button(loaded, "stack"))
    ActionChains(loaded).send_keys(Keys.SPACE).perform()
    assert names(loaded) == ["[stack]"]
    # The focus is where it was, though the table was drawn again.
    ActionChains(loaded).send_keys(Keys.SPACE).perform()
    assert len(names(loaded)) == 6


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("HEAP", ["[heap]"]),
        ("0x7fffffff01abc", []),
        ("7fffffff5abc", []),
        ("0x7fffffF05abc", ["[stack]"]),
        ("$^", []),
    ],
)
def test_find(loaded: webdriver.Chrome, query: str, found: list[str]) -> None:
    loaded.find_element(By.ID, "query").send_keys(query)
    assert names(loaded) == found


def test_sorting(loaded: webdriver.Chrome) -> None:
    def header(title: str) -> webdriver.remote.webelement.WebElement:
        return loaded.find_element(By.XPATH, f"//div[@id='head']//button[starts-with(., '{title}')]")

    header("Size").click()
    assert names(loaded)[0] == "/data"
    header("Size").click()
    assert names(loaded)[-1] == "/data"
    sorted_by = loaded.find_element(By.CSS_SELECTOR, "#head [aria-sort=ascending]")
    assert sorted_by.text.startswith("Size")


def test_table_by_keyboard(loaded: webdriver.Chrome) -> None:
    keys(loaded, "grid", Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    chosen = loaded.find_element(By.CSS_SELECTOR, "#body [aria-selected=true]")
    assert "[heap]" in chosen.text
    assert loaded.find_element(By.ID, "grid").get_attribute("aria-activedescendant") == chosen.get_attribute(
        "id"
    )
    assert "555560000000-555560021000" in text_of(loaded, "facts")
    keys(loaded, "grid", Keys.END)
    assert "ffffffffff600000-ffffffffff601000" in text_of(loaded, "facts")
    keys(loaded, "grid", Keys.HOME)
    assert "0x1000" in text_of(loaded, "facts"), "details are shown"


def test_line_by_keyboard_and_mouse(loaded: webdriver.Chrome) -> None:
    view = "return state.view[1] - state.view[0]"
    keys(loaded, "line", Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert "[heap]" in text_of(loaded, "status")
    keys(loaded, "line", "+")
    assert loaded.execute_script(view) == pytest.approx(0.5)
    keys(loaded, "line", Keys.ENTER)
    assert loaded.execute_script("return rowAt((state.view[0] + state.view[1]) / 2, 0)") == 1
    keys(loaded, "line", Keys.HOME)
    assert loaded.execute_script(view) == 1
    line = loaded.find_element(By.ID, "line")
    width = line.size["width"]
    brush = ActionChains(loaded).move_to_element_with_offset(line, -width // 4, 0).click_and_hold()
    brush.move_by_offset(width // 4, 0).release().perform()
    assert loaded.execute_script(view) == pytest.approx(0.25, abs=0.01)
    loaded.find_element(By.ID, "zoom-all").click()
    x = (
        loaded.execute_script("return (placeOf(rows.start[1]) + placeOf(rows.end[1])) / 2") * width
        - width / 2
    )
    ActionChains(loaded).move_to_element_with_offset(line, int(x), 0).click().perform()
    assert loaded.execute_script("return state.selected") == 1


def test_pages_of_the_selected_mapping(loaded: webdriver.Chrome) -> None:
    heat = loaded.find_element(By.ID, "heat-box")
    keys(loaded, "grid", Keys.HOME)
    assert not heat.is_displayed(), "nobody looked at these pages"
    keys(loaded, "grid", Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    assert heat.is_displayed()
    seen = [text_of(loaded, "heat-status")]
    for _ in range(3):
        keys(loaded, "heat", Keys.ARROW_RIGHT)
        seen.append(text_of(loaded, "heat-status"))
    assert seen == [
        "0x7f0000000000-7f0000001000: in memory, shared",
        "0x7f0000001000-7f0000002000: in memory, this process's alone, written",
        "0x7f0000002000-7f0000003000: swapped out",
        "0x7f0000003000-7f0000004000: not in memory",
    ]


@pytest.mark.parametrize("loaded", [TWO], indirect=True)
def test_timeline_and_comparison(loaded: webdriver.Chrome) -> None:
    assert text_of(loaded, "sample-title") == "2 of 2: 1 s", "the last sample is shown"
    loaded.find_element(By.CSS_SELECTOR, "#against option[value=previous]").click()
    loaded.find_element(By.ID, "only-changes").click()
    cells = loaded.find_elements(By.CSS_SELECTOR, "#body > div > div:nth-child(5)")
    assert [cell.text for cell in cells] == ["▲ +28 KiB, resident +40 KiB", "− removed", "+ added"]  # noqa: RUF001
    keys(loaded, "sample", Keys.ARROW_LEFT)
    assert text_of(loaded, "sample-title") == "1 of 2: 0 s"
    timeline = loaded.find_element(By.ID, "timeline")
    assert timeline.get_attribute("aria-label").startswith("resident by kind over 2 samples")
    ActionChains(loaded).move_to_element_with_offset(
        timeline, timeline.size["width"] // 2 - 20, 0
    ).click().perform()
    assert text_of(loaded, "sample-title") == "2 of 2: 1 s"


MANY = Picture(
    "many",
    (
        Sample(
            "now",
            tuple(
                row(0x100000 + 2 * n, 1, "heap" if n % 2 else "image", f"/name/{n}") for n in range(10_000)
            ),
        ),
    ),
)


@pytest.mark.parametrize("loaded", [MANY], indirect=True)
def test_ten_thousand_mappings(loaded: webdriver.Chrome) -> None:
    assert text_of(loaded, "count") == "10000 mappings"
    assert 10 < len(names(loaded)) < 100, "only lines in sight are elements"
    keys(loaded, "grid", Keys.END)
    assert names(loaded)[-1] == "/name/9999"
    assert loaded.find_element(By.ID, "grid").get_attribute("aria-rowcount") == "10001"
    loaded.find_element(By.ID, "query").send_keys("/name/777")
    assert names(loaded) == ["/name/777", *(f"/name/777{n}" for n in range(10))]
    kind_button(loaded, "heap").click()
    assert names(loaded) == ["/name/777", *(f"/name/777{n}" for n in (1, 3, 5, 7, 9))]
    # Zoomed to one of them, it fills most of the line.
    keys(loaded, "grid", Keys.HOME)
    loaded.find_element(By.ID, "zoom-row").click()
    shown = loaded.execute_script(
        "const [r, [from, to]] = [state.selected, state.view];"
        "return (placeOf(rows.end[r]) - placeOf(rows.start[r])) / (to - from)"
    )
    assert shown == pytest.approx(1 / 2.2, abs=0.01)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_readable_in_light_and_dark_and_on_small_screens(
    driver: webdriver.Chrome, tmp_path: Path, dark: bool, width: int
) -> None:
    path = tmp_path / "page.html"
    path.write_text(page(ONE), "utf-8")
    show(driver, path, dark=dark, width=width)
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width, "nothing sticks out"
    paper, writing = driver.execute_script(
        "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    )
    low, high = sorted(sum(int(n) for n in re.findall(r"\d+", each)[:3]) for each in (paper, writing))
    assert high - low > 500
    assert (paper < writing) == dark
    unnamed = driver.execute_script("""
        const named = (each) => each.textContent.trim() || each.getAttribute("aria-label")
            || each.getAttribute("aria-labelledby") || each.labels?.length;
        const all = document.querySelectorAll("button, input, select, canvas[tabindex]");
        return [...all].filter((each) => !named(each)).map((each) => each.outerHTML);""")
    assert unnamed == [], "everything that can be used says what it is"
    assert console(driver) == []
