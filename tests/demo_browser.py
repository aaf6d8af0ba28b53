"""The demo page in a real browser: a prompt is typed, the list changes, a chip is turned round, and a picture is taken.

    python tests/demo_browser.py RUN_FOLDER [PICTURE.png]

RUN_FOLDER has to know its users (users.safetensors). Needs selenium (pip), chromium and chromium-driver (Debian's packages), and gradio. Ends with code 0 if all held.
"""

import sys
from pathlib import Path

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from recbole_dpr import load
from recbole_dpr.serving.demo import launch

_HOSTILE = "<img src=x onerror=\"document.title='injected'\"> ${document.title='injected'} {{1+1}}"
_PORT = 7871


def main(folder, picture=None):
    rec = load(folder)
    rec.titles[rec.items.index(rec.recommend().items[0])] += _HOSTILE  # the first that everybody sees
    blocks, address = launch(rec, port=_PORT, block=False)
    browser = _browser()
    try:
        _try_out(browser, rec, address)
        if picture:
            _take(browser, rec, address, picture)
    finally:
        browser.quit()
        blocks.close()
    print("the page holds")


def _browser():
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(argument)
    options.binary_location = "/usr/bin/chromium"
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))


def _try_out(browser, rec, address):
    wait = WebDriverWait(browser, 30, ignored_exceptions=[StaleElementReferenceException])
    browser.get(address)
    box = wait.until(lambda b: b.find_element(By.CSS_SELECTOR, "#prompt textarea, #prompt input"))

    def texts(selector):  # read in one go: the page may put new elements in their place
        return browser.execute_script("return [...document.querySelectorAll(arguments[0])].map(e => e.innerText.trim())", selector)

    def titles(section):
        return texts(f"#lists section:nth-of-type({section}) .title")

    wait.until(lambda b: len(titles(1)) == 10)
    plain = titles(1)
    assert "<img src=x" in plain[0] and not titles(2)  # shown, not run
    box.send_keys("a western, but no horror " + _HOSTILE, Keys.ENTER)
    wait.until(lambda b: len(titles(2)) == 10 and len(texts("#wishes label")) >= 2)
    asked, chips = titles(2), texts("#wishes label")
    assert titles(1) == plain and asked != plain
    assert chips[0] == "wanted: a western" and chips[1].startswith("avoided: horror"), chips
    wait.until(lambda b: b.find_element(By.CSS_SELECTOR, "#wishes label").click() is None)
    wait.until(lambda b: titles(2) != asked and texts("#wishes label")[0] == "avoided: a western")
    box.send_keys("a drama", Keys.ENTER)
    wait.until(lambda b: len(texts("#wishes label")) > len(chips))
    browser.find_element(By.ID, "restart").click()
    wait.until(lambda b: not titles(2))
    for name, said in (("<b>nobody</b>", "unknown user '<b>nobody</b>'"), (rec.users[0], "items in the history")):
        user = browser.find_element(By.CSS_SELECTOR, "#user input")
        user.send_keys(Keys.CONTROL, "a")
        user.send_keys(Keys.DELETE, name, Keys.ENTER, Keys.TAB)
        wait.until(lambda b: said in texts("#lists")[0])
    assert browser.title == "RecBole-DPR", browser.title
    for size in ((390, 844), (1280, 900)):  # a phone, a wide screen: nothing sticks out
        browser.set_window_size(*size)
        assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth + 1"), size
    asked_for = [entry["message"] for entry in browser.get_log("performance") if '"Network.requestWillBeSent"' in entry["message"]]
    elsewhere = [m for m in asked_for if '"url":"http' in m and f'"url":"{address.rstrip("/")}' not in m]
    assert asked_for and not elsewhere, elsewhere


def _take(browser, rec, address, picture):
    """The page with a known user and a prompt, at the width of a laptop."""
    wait = WebDriverWait(browser, 30)
    browser.set_window_size(1280, 1000)
    rec.titles = [title.removesuffix(_HOSTILE) for title in rec.titles]
    browser.get(address)
    box = wait.until(lambda b: b.find_element(By.CSS_SELECTOR, "#prompt textarea, #prompt input"))
    for number, title in enumerate(("Fargo", "Pulp Fiction", "Usual Suspects")):
        watched = browser.find_element(By.CSS_SELECTOR, "#watched input")
        watched.send_keys(title, Keys.ENTER)
        wait.until(lambda b: f"{number + 1} items" in b.find_element(By.ID, "lists").text)
    box.send_keys("a comedy, but no romance", Keys.ENTER)
    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#lists .move"))
    browser.execute_script("document.activeElement.blur()")
    Path(picture).write_bytes(browser.get_screenshot_as_png())


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
