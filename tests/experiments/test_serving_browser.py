"""The page in a real browser, served by a real process."""

import re
import shutil
import subprocess
import sys

import PIL.Image
import pytest

from vvt_jax.data.sources import open_source

pytest.importorskip("selenium")
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (BROWSER and DRIVER), reason="chromium and chromium-driver are not installed"
    ),
]


@pytest.fixture(scope="module")
def url(digits_folder):
    """Of the page."""
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.serving.app", f"--model={digits_folder}", "--port=0"],
        cwd=digits_folder.parents[2],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stderr:
            if found := re.search(r"running on (http://\S+)", line):
                break
        else:
            raise AssertionError("the server ended")
        yield found[1]
    finally:
        process.terminate()
        process.communicate()


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    # No sandbox within a sandbox: in containers, root's chromium would not start
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    service = webdriver.ChromeService(executable_path=DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_page_load_timeout(120)
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three digits as PNG, by what they are, and a text."""
    folder = tmp_path_factory.mktemp("files")
    digits = open_source("digits", "test")
    found = {}
    for i in range(3):
        example = digits.examples[i]
        path = folder / f"{i}.png"
        PIL.Image.fromarray(example["image"][..., 0]).save(path)
        found[str(example["label"])] = path
    (folder / "text.png").write_text("no image")
    return found, folder / "text.png"


def _wait(browser, condition):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 60).until(condition)


def _first_class(browser):
    """The texts of the first row, read at once: rows are replaced while a test looks on."""
    return browser.execute_script(
        "return [...document.querySelectorAll('#classes tr:first-child td')].map(x => x.innerText)"
    )


def _shown(browser):
    """Whether both pictures are there and whole."""
    return browser.execute_script(
        """
        const [result, ...pictures] = ["result", "image", "heatmap"].map(
            (id) => document.getElementById(id));
        return !result.hidden && pictures.every((x) => x.complete && x.naturalWidth);
        """
    )


def test_an_image_is_chosen(browser, url, files):
    browser.get(url)
    assert browser.find_element("tag name", "h1").text == "What is it?"
    for label, path in files[0].items():
        browser.find_element("id", "file").send_keys(str(path))
        _wait(browser, lambda b, label=label: (_first_class(b) or [None])[0] == label)
        _wait(browser, _shown)
        assert float(_first_class(browser)[1].removesuffix(" %")) > 50
    size = browser.execute_script("return document.getElementById('heatmap').naturalWidth")
    assert size == 224
    assert len(browser.find_elements("css selector", "#classes tr")) == 5


def test_an_image_is_dropped(browser, url, files):
    browser.get(url)
    label, path = next(iter(files[0].items()))
    browser.execute_script(
        """
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(arguments[0])], "digit.png"));
        const dropped = new DragEvent("drop", {dataTransfer: data, cancelable: true});
        document.getElementById("drop").dispatchEvent(dropped);
        """,
        list(path.read_bytes()),
    )
    _wait(browser, _shown)
    assert _first_class(browser)[0] == label


def test_what_is_no_image_is_told(browser, url, files):
    browser.get(url)
    browser.find_element("id", "file").send_keys(str(files[1]))
    status = browser.find_element("id", "status")
    _wait(browser, lambda _: status.get_attribute("class") == "error")
    assert "not an image" in status.text
    assert not browser.find_element("id", "result").is_displayed()
    refused = [entry for entry in browser.get_log("browser") if "Content Security" in str(entry)]
    assert not refused
