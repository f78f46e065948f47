"""JupyterLab in a real browser: a notebook runs from end to end, shows its figures, and its sliders move. Skipped where no browser is installed.

With GEOLAB_ALL_NOTEBOOKS=1 every notebook is opened and run, which takes as long as `nbdev_test` in one process; without it, two with figures."""
import os, re, shutil, socket, subprocess, sys, time
from pathlib import Path
from urllib.request import urlopen

import nbformat
import pytest

CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver on this machine; install them with: apt-get install chromium chromium-driver")
ROOT = Path(__file__).parents[1]
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--disable-dev-shm-usage", "--window-size=1300,1800"]
EXPLORER = "83_explorer.ipynb"  # the one with widgets
EVERY = sorted(str(path.relative_to(ROOT/"nbs")) for path in (ROOT/"nbs").rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in path.relative_to(ROOT/"nbs").parts))
NOTEBOOKS = EVERY if os.environ.get("GEOLAB_ALL_NOTEBOOKS") else [EXPLORER, "evaluation/41_metrics.ipynb", "nn/31_attention.ipynb"]
FLAGGED = re.compile(r"^#\|\s*(slow|gpu|cuda|eval:\s*false)", re.M)  # as for nbdev_test, these cells are not run


def live_cells(name):
    "The cells of a notebook that are run."
    return [c for c in nbformat.read(ROOT/"nbs"/name, 4).cells if "nbdev_export()" not in c.source and not (c.cell_type == "code" and FLAGGED.search(c.source))]


def figures_of(code_cells): return sum("image/png" in out.get("data", {}) for c in code_cells for out in c.outputs)


def cells(browser, script):
    return browser.execute_script(f"const nb = window.jupyterapp.shell.currentWidget.content; {script}")


def wait(what, seconds, every=.3):
    "The first true value of `what()`."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := what(): return found
        except Exception as error: last = error
        else: last = None
        time.sleep(every)
    raise AssertionError(f"waited {seconds} s in vain{f': {last}' if last else ''}")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A JupyterLab server over a copy of the notebooks, and its address."
    home, port = tmp_path_factory.mktemp("lab"), None
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for name in NOTEBOOKS:
        (home/"nbs"/name).parent.mkdir(parents=True, exist_ok=True)
        live = live_cells(name)
        for cell in live:
            if cell.cell_type == "code": cell.outputs = []
        if name == EXPLORER: live.append(nbformat.v4.new_code_cell("explorer"))
        nbformat.write(nbformat.v4.new_notebook(cells=live, metadata=dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))), home/"nbs"/name)
    shutil.copytree(ROOT/"nbs"/"images", home/"nbs"/"images")
    env = os.environ | dict(JUPYTER_CONFIG_DIR=str(home/"config"), JUPYTER_DATA_DIR=str(home/"data"), JUPYTER_RUNTIME_DIR=str(home/"runtime"), IPYTHONDIR=str(home/"ipython"), OMP_NUM_THREADS="1",
                           PYTHONPATH=str(ROOT))
    log = open(home/"log", "w")
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--IdentityProvider.token=", "--ServerApp.password=",
                               f"--ServerApp.root_dir={home}", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.news_url=None", "--expose-app-in-browser"],
                              stdout=log, stderr=subprocess.STDOUT, env=env)
    try:
        wait(lambda: urlopen(f"http://127.0.0.1:{port}/api/status", timeout=2).status == 200, 60)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)
        log.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService
    options = ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]: options.add_argument(flag)
    chrome = Chrome(options=options, service=ChromeService(DRIVER))
    yield chrome
    chrome.quit()


def run_all(browser, lab, name):
    "Open a notebook, run all its cells, and return (count of cells, outputs of kind error, images)."
    browser.get(f"{lab}/lab/tree/nbs/{name}?reset")
    wait(lambda: browser.execute_script("const w = window.jupyterapp?.shell?.currentWidget; return w?.context?.isReady && w.sessionContext?.session?.kernel?.status == 'idle'"), 90)
    browser.execute_script("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    done = """return nb.widgets.filter(c => c.model.type == 'code').every(c => c.model.executionCount > 0 || !c.model.sharedModel.getSource().trim())
              && window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status == 'idle'"""
    failed = "return nb.widgets.filter(c => c.model.type == 'code').flatMap(c => { const o = c.model.outputs, out = []; for (let i = 0; i < o.length; i++) if (o.get(i).type == 'error') out.push(JSON.stringify(o.get(i).toJSON()).slice(0, 500)); return out })"
    wait(lambda: cells(browser, failed) or cells(browser, done), 300)
    return cells(browser, failed)


@pytest.mark.parametrize("name", [name for name in NOTEBOOKS if name != EXPLORER])
def test_notebook_runs(lab, browser, name):
    "No cell fails, and there are as many pictures as are stored."
    stored = figures_of([c for c in live_cells(name) if c.cell_type == "code"])
    assert run_all(browser, lab, name) == []
    shown = cells(browser, "return nb.widgets.filter(c => c.model.type == 'code').map(c => { let n = 0; const o = c.model.outputs; for (let i = 0; i < o.length; i++) n += 'image/png' in (o.get(i).data ?? {}); return n }).reduce((a, b) => a + b, 0)")
    browser.execute_async_script("const done = arguments[0]; window.jupyterapp.shell.currentWidget.sessionContext.shutdown().then(done, done)")  # a kernel holds memory
    assert shown == stored and (stored or len(NOTEBOOKS) > 3)


def test_sliders_move(lab, browser):
    "The explorer answers the keyboard: precision changes with the threshold, and with rarity; the picture follows."
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    assert run_all(browser, lab, EXPLORER) == []
    cells(browser, "nb.activeCellIndex = nb.widgets.length - 1; nb.scrollToItem(nb.widgets.length - 1)")
    box = wait(lambda: browser.find_elements(By.CSS_SELECTOR, ".widget-vbox")[-1], 30)
    says = lambda: box.find_element(By.CSS_SELECTOR, ".widget-html-content p").text
    picture = lambda: browser.execute_script("return arguments[0].querySelector('img').src", box)
    first, _ = wait(says, 30), wait(picture, 30)
    assert re.match(r"Precision \d\.\d\d, recall \d\.\d\d", first)
    for handle, key in zip(box.find_elements(By.CSS_SELECTOR, ".noUi-handle"), (Keys.ARROW_LEFT, Keys.ARROW_RIGHT), strict=True):
        before, shown = says(), picture()
        for _ in range(6): handle.send_keys(key)
        wait(lambda: says() != before and picture() != shown, 30)
    assert browser.execute_script("const i = arguments[0].querySelector('img'); return i.complete && i.naturalWidth", box) > 300
