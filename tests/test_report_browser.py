"""The report in a real browser: no request, no console message, every image decoded. Skipped where chromium is not installed."""
import html, json, re, shutil, subprocess

import numpy as np
import pytest

from geolab.core import write_json
from geolab.data.raster import write_geotiff
from geolab.evaluation.metrics import metrics_at
from geolab.evaluation.scores import ScoreHistogram, save_scores
from geolab.report import SECTIONS, build_report

CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine; install one with: apt-get install chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--enable-logging=stderr", "--virtual-time-budget=5000"]


def made_scores():
    "Logits of 30 made tiles, four of them with positives."
    rng = np.random.default_rng(1)
    mask = np.zeros((30, 16, 16), int)
    mask[:4, :6, :6] = 1
    return ScoreHistogram(["a", "b"]).update((3*mask - 2 + rng.normal(0, 1.5, mask.shape)).astype(np.float32), mask, block=["a", "b"]*15)


def browse(page, profile, *flags):
    "What the browser makes of a page: its document, and what its console said."
    done = subprocess.run([CHROMIUM, *FLAGS, *flags, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    "The report of a small made run with vectors and pixels."
    from affine import Affine
    rng, run = np.random.default_rng(0), tmp_path_factory.mktemp("made")/"run"
    run.mkdir()
    (run/"config.yaml").write_text("recipe: thaw_slump\nprofile: quick\nconfig: {early_stopping_metric: val_iou}\n")
    write_json(run/"history.json", [dict(epoch=e, train_loss=1/e, val_loss=1/e, val_iou=1 - 1/e, lr=1e-3) for e in (1, 2, 3)])
    write_geotiff(run/"map"/"a_probability.tif", rng.random((300, 400), dtype=np.float32), crs="EPSG:32608", transform=Affine(3, 0, 5e5, 0, -3, 7.6e6), nodata=np.nan)
    np.savez(run/"samples.npz", images=rng.integers(0, 255, (3, 3, 32, 32), dtype=np.uint8), truth=rng.integers(0, 2, (3, 32, 32), dtype=np.uint8),
             probability=rng.random((3, 32, 32)).astype(np.float16), valid=np.ones((3, 32, 32), bool), labels=np.array(["best", "typical", "worst"]), ids=np.array(["a", "b", "<i>c</i>"]))
    save_scores(run/"scores.npz", {"test": made_scores()})
    write_json(run/"calibration.json", dict(temperature=2., bias=-1.))
    write_json(run/"threshold.json", {"chosen": "1:500", "1:500": dict(logit=1.5, probability=.4, target_precision=.8, reason="made")})
    return build_report(run)


def test_opens_without_a_word(report, tmp_path):
    dom, console = browse(report, tmp_path, "--host-resolver-rules=MAP * ~NOTFOUND")
    assert console == []
    for anchor, title, _ in SECTIONS: assert f'id="{anchor}">{title}</h2>' in dom


def test_every_image_is_decoded(report, tmp_path):
    page = report.read_text()
    kinds = set(re.findall(r'src="data:image/([a-z+]+);', page))
    assert kinds >= {"svg+xml", "jpeg"}
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', page).group()
    probe = "<script>onload = () => { document.title = JSON.stringify([...document.images].map(i => [i.naturalWidth, i.clientWidth, i.alt.length])) }</script>"
    copy = tmp_path/"probe.html"
    copy.write_text(page.replace(policy, "").replace("</body>", f"{probe}</body>"))
    dom, console = browse(copy, tmp_path/"profile", "--window-size=500,900")
    sizes = [list(map(int, s.split(","))) for s in re.findall(r"\[(\d+,\d+,\d+)\]", re.search(r"<title>(.*?)</title>", dom).group(1))]
    assert console == [] and len(sizes) == page.count("<img") >= 7
    assert all(natural > 0 and 0 < shown <= 500 and alt for natural, shown, alt in sizes)  # decoded, and not wider than the window


def test_the_sliders_follow(report, tmp_path):
    "Moved by hand, they say what the metrics say of the same histogram."
    page = report.read_text()
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', page).group()
    probe = """<script>onload = () => {
      const cut = document.querySelector(".cut"), rare = document.querySelector(".rare"), says = document.querySelector(".says"), seen = []
      const move = (dial, value) => { dial.value = value; dial.dispatchEvent(new Event("input")); seen.push([Number(cut.value), Number(rare.value), says.textContent, cut.getAttribute("aria-valuetext")]) }
      seen.push([Number(cut.value), Number(rare.value), says.textContent, cut.getAttribute("aria-valuetext")])
      move(rare, 0); move(cut, 120); move(rare, 7); document.querySelector(".dials button").click()
      setTimeout(() => { document.title = JSON.stringify({seen, back: says.textContent, tiles: [...document.querySelectorAll(".tiles figcaption")].map(e => e.textContent), hidden: document.querySelector(".live").hidden}) }, 500)
    }</script>"""
    copy = tmp_path/"probe.html"
    copy.write_text(page.replace(policy, "").replace("</body>", f"{probe}</body>"))
    dom, console = browse(copy, tmp_path/"profile")
    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom).group(1)))
    assert console == [] and not found["hidden"] and len(found["tiles"]) == 3 and found["back"] == found["seen"][0][2]
    data, hist, ratios = json.loads(re.search(r'<script type="application/json">(.*?)</script>', page).group(1)), made_scores(), {0: None, 7: "1:20", 14: "1:500"}
    assert [row[1] for row in found["seen"]] == [14, 0, 0, 7]            # it begins at the ratio of the map
    for cut, rare, says, spoken in found["seen"]:
        want = metrics_at(hist, data["logit"][cut] - .001, ratios[rare])   # the page rounds to a thousandth, a tenth of a bin
        assert f"Precision {want['precision']:.{3 if want['precision'] < .0995 else 2}f}, recall {want['recall']:.{3 if want['recall'] < .0995 else 2}f}" in says, (says, want)
        assert spoken.startswith("logit ")


def test_the_policy_stops_scripts(report, tmp_path):
    copy = tmp_path/"evil.html"
    copy.write_text(report.read_text().replace("</body>", "<script>document.title = 'taken'</script><img src='http://127.0.0.1:9/x.png'></body>"))
    dom, console = browse(copy, tmp_path/"profile")
    assert "<title>taken</title>" not in dom and len(console) == 2 and all("Content Security Policy" in line for line in console)
